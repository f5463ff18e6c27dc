"""Group-robust against uniform and importance-weighted DPO and IPO on the linear bandit: curves, bars, trade-off."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from bandits import figures
from bandits.group import GROUP_NAMES, GroupArm, GroupCurves, mle_reward, train_closed_form, train_gradient
from bandits.linear import (
    NUM_GROUPS,
    SCENARIOS,
    FeatureMap,
    HeldOutStates,
    LinearWorld,
    Pairs,
    Scenario,
    draw_pairs,
)
from bandits.report import Claim, Report
from utils import UserError, log

SHOWN = (
    "val_loss/worst_group",
    "val_loss/mean_group",
    "reward_error/worst_group",
    *(f"weights/{g}" for g in GROUP_NAMES),
)


@dataclass(frozen=True)
class Data:
    """Everything drawn for one scenario, for all seeds."""

    train: Pairs
    validation: Pairs
    test: HeldOutStates


@dataclass(frozen=True)
class GroupStudy:
    """Settings of one experiment of this family. A cell of its tables is "<label>@<scenario>".

    scenarios    names of bandits.linear.SCENARIOS: even_imbalanced, uneven_balanced, uneven_imbalanced
    arms         what is compared in every scenario
    num_train, num_validation, num_test   pairs in all, pairs in all (equal groups), states
    label_certainty   per group: probability that the larger reward wins for certain; otherwise the label is Bradley-Terry
    eval_every   iterations between evaluations
    figures      paper: DPO curves, IPO curves and reward errors per scenario | weights | tradeoff over chi | variants: bars |
                 errors: the worst group's, absolute and relative
    """

    arms: list[GroupArm]
    features: FeatureMap = "swapped"
    scenarios: list[str] = field(default_factory=lambda: list(SCENARIOS))
    state_dim: int = 2
    num_actions: int = 8
    num_train: int = 300
    num_validation: int = 1000
    num_test: int = 1000
    label_certainty: tuple[float, float] = (1.0, 1.0)
    num_seeds: int = 20
    seed: int = 2021
    eval_every: int = 100
    figures: list[Literal["paper", "weights", "tradeoff", "variants", "errors"]] = field(
        default_factory=lambda: ["paper"]
    )
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.scenarios:
            if name not in SCENARIOS:
                raise UserError(f"scenarios: {name}: must be one of {', '.join(SCENARIOS)}")
        labels = [arm.label for arm in self.arms]
        for label in {x for x in labels if labels.count(x) > 1}:
            raise UserError(f"arms: two arms are called {label!r}")
        if self.num_seeds < 2:
            raise UserError(f"num_seeds={self.num_seeds}: an interval needs at least 2")
        for name, least in (("num_validation", NUM_GROUPS), ("num_test", 1), ("eval_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)}: must be at least {least}")

    @property
    def seeds(self) -> range:
        """Replicates."""
        return range(self.seed, self.seed + self.num_seeds)

    def data(self, scenario: Scenario) -> Data:
        """Training and validation pairs from one generator, and test states."""
        world = LinearWorld(self.features, self.state_dim, self.num_actions)
        half = self.num_validation // NUM_GROUPS

        def pairs(counts: tuple[int, ...], split: str) -> Pairs:
            return draw_pairs(world, counts, scenario.uneven, self.seeds, split, self.label_certainty)

        return Data(
            pairs(scenario.counts(self.num_train), "train"),
            pairs((half, self.num_validation - half), "validation"),
            HeldOutStates.draw(world, self.num_test, self.seeds),
        )

    def run(self, report: Report) -> None:
        """Every arm in every scenario; then baselines, tables and figures."""
        curves: dict[tuple[str, GroupArm], GroupCurves] = {}
        for name in self.scenarios:
            data = self.data(SCENARIOS[name])
            self._baselines(report, name, data)
            for arm in self.arms:
                run = train_gradient if arm.solver == "gradient" else train_closed_form
                every = max(1, arm.iterations // 50) if arm.solver == "closed_form" else self.eval_every
                found = run(arm, data.train, data.validation, data.test, self.seeds, every)
                curves[name, arm] = found
                metrics = {n: v.numpy() for n, v in found.metrics.items()}
                cell = f"{arm.label}@{name}"
                report.curve(
                    cell, found.steps, [self.num_train] * len(found.steps), metrics, self.seeds, SHOWN
                )
                for f in range(found.theta.shape[1]):
                    report.cell(cell, f"theta_{f}", found.theta[:, f].numpy())
                log.info(
                    "%-40s worst val loss %.3f  mean %.3f  worst reward error %.3f  weight of group_0 %.2f",
                    cell,
                    *(metrics[m][-1].mean() for m in SHOWN[:4]),
                )
        with figures.style():
            for kind in self.figures:
                report.figure(kind, getattr(self, f"_{kind}")(curves))

    def _baselines(self, report: Report, name: str, data: Data) -> None:
        """Reward errors of the greedy policy of: one maximum-likelihood reward; each group's true parameters; chance."""
        world = LinearWorld(self.features, self.state_dim, self.num_actions)
        policies = {"MLE reward": mle_reward(data.train)}
        for g, group in enumerate(GROUP_NAMES):
            policies[f"true parameters of {group}"] = torch.from_numpy(world.theta(g)).expand(
                self.num_seeds, -1
            )
        for label, theta in policies.items():
            for metric, values in data.test.of_policy(theta).items():
                for g, group in enumerate(GROUP_NAMES):
                    report.cell(f"{label}@{name}", f"{metric}/{group}", values[:, g].numpy())
                report.cell(f"{label}@{name}", f"{metric}/worst_group", values.max(1).values.numpy())
        best = data.test.rewards.max(-1).values.mean(-1)
        for g, group in enumerate(GROUP_NAMES):
            report.cell(f"best possible@{name}", f"reward/{group}", best[:, g].numpy())

    def _paper(self, curves: dict[tuple[str, GroupArm], GroupCurves]):
        """Rows: scenarios; columns: worst validation loss of the DPO arms, of the IPO arms, converged reward errors."""
        figure, axes = figures.panels(len(self.scenarios), 3, 2.5, 2.0)
        for row, name in zip(axes, self.scenarios, strict=True):
            for ax, loss in zip(row, ("dpo", "ipo"), strict=False):
                for i, arm in enumerate(a for a in self.arms if a.loss == loss):
                    found = curves[name, arm]
                    values = found.metrics["val_loss/worst_group"].numpy()
                    # balanced groups: importance weights are uniform ones, and the lines coincide
                    line = figures.look(i) | ({"linestyle": "--"} if arm.weighting == "importance" else {})
                    figures.band(ax, found.steps, values, f"{arm.weighting} weights", **line)
                ax.set(
                    title=name.replace("_", ", "),
                    xlabel="iteration",
                    ylabel=f"worst val. {loss.upper()} loss",
                )
            ends = np.stack(
                [curves[name, a].metrics["reward_error/worst_group"][-1].numpy() for a in self.arms]
            )
            order = [a.weighting for a in self.arms if a.loss == self.arms[0].loss]
            colours = [figures.COLOURS[order.index(a.weighting)] for a in self.arms]
            figures.bars(row[2], [a.label for a in self.arms], {"": ends}, 40, colours)
            row[2].set(title=name.replace("_", ", "), ylabel="worst reward error")
        figures.legend_above(figure, axes[:, :2], figures.over_seeds(self.num_seeds))
        return figure

    def _weights(self, curves: dict[tuple[str, GroupArm], GroupCurves]):
        """Weight of group 0 in the objective of the robust arms."""
        figure, axes = figures.panels(1, len(self.scenarios), 2.5, 2.0)
        for ax, name in zip(axes[0], self.scenarios, strict=True):
            for i, arm in enumerate(a for a in self.arms if a.weighting == "robust"):
                found = curves[name, arm]
                progress = np.array(found.steps) / arm.iterations
                figures.band(
                    ax, progress, found.metrics["weights/group_0"].numpy(), arm.label, **figures.look(i)
                )
            ax.set(
                title=name.replace("_", ", "),
                xlabel="fraction of iterations",
                ylabel="weight of group 0",
                ylim=(0, 1),
            )
        figures.legend_above(figure, axes, figures.over_seeds(self.num_seeds))
        return figure

    def _tradeoff(self, curves: dict[tuple[str, GroupArm], GroupCurves]):
        """Worst and mean validation loss at the end, against chi; one column per scenario, one row per loss."""
        losses = list(dict.fromkeys(arm.loss for arm in self.arms))
        figure, axes = figures.panels(len(losses), len(self.scenarios), 2.6, 2.0)
        for row, loss in zip(axes, losses, strict=True):
            arms = [arm for arm in self.arms if arm.loss == loss]
            for ax, name in zip(row, self.scenarios, strict=True):
                for i, (metric, label) in enumerate(
                    (("worst_group", "worst group"), ("mean_group", "mean of groups"))
                ):
                    ends = np.stack([curves[name, a].metrics[f"val_loss/{metric}"][-1].numpy() for a in arms])
                    figures.band(ax, [a.chi for a in arms], ends, label, marker="o", **figures.look(i))
                ax.set(
                    title=f"{loss.upper()}, {name.replace('_', ', ')}", xlabel="chi", ylabel="validation loss"
                )
        figures.legend_above(figure, axes, figures.over_seeds(self.num_seeds))
        return figure

    def _variants(self, curves: dict[tuple[str, GroupArm], GroupCurves]):
        """Worst validation loss at the end of every arm, one column per scenario."""
        figure, axes = figures.panels(1, len(self.scenarios), 2.9, 2.6)
        for ax, name in zip(axes[0], self.scenarios, strict=True):
            ends = np.stack([curves[name, a].metrics["val_loss/worst_group"][-1].numpy() for a in self.arms])
            figures.bars(ax, [a.label for a in self.arms], {"": ends}, 50)
            ax.set(title=name.replace("_", ", "), ylabel="worst validation loss")
        figure.suptitle(figures.over_seeds(self.num_seeds), fontsize=7)
        return figure

    def _errors(self, curves: dict[tuple[str, GroupArm], GroupCurves]):
        """Worst reward error at the end, absolute and relative to the best reward, by scenario."""
        figure, axes = figures.panels(1, 2, 3.2, 2.4)
        kinds = {"reward_error": "worst reward error", "reward_error_relative": "worst relative reward error"}
        for ax, (metric, name) in zip(axes[0], kinds.items(), strict=True):
            ends = {
                arm.label: np.stack(
                    [curves[s, arm].metrics[f"{metric}/worst_group"][-1].numpy() for s in self.scenarios]
                )
                for arm in self.arms
            }
            figures.bars(ax, [s.replace("_", ",\n") for s in self.scenarios], ends)
            ax.set(ylabel=name)
        figures.legend_above(figure, axes, figures.over_seeds(self.num_seeds))
        return figure
