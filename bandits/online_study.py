"""On-policy against offline data: arms x rewards, tuned learning rates, curves, bars and claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bandits import contextual, figures, oracles
from bandits.continuous import ContinuousBandit
from bandits.length import LengthBandit, small_transformer
from bandits.methods import Arm
from bandits.online import Curves, train
from bandits.policies import Transformer
from bandits.report import Claim, Report
from bandits.worlds import ContextualBandit, SequenceBandit, WarmStart, World
from utils import UserError, log

SHOWN = (
    "reward",
    "kl_policy_reference",
    "kl_reference_policy",
    "entropy",
    "log_ratio/chosen",
    "log_ratio/rejected",
)
REWARDS = {
    "contextual": contextual.DISCRETE,
    "continuous": contextual.CONTINUOUS,
    "sequence": contextual.SEQUENCE,
    "length": contextual.LENGTH,
}
LOWEST_SHOWN = {
    "contextual": -40.0,
    "continuous": -40.0,
    "sequence": -150.0,
    "length": -150.0,
}  # log-ratios without a bound leave the figure
TUNING_OFFSET = 10_000  # tuning seeds are far from the reported ones


@dataclass(frozen=True)
class OnPolicyStudy:
    """Settings of one experiment of this family. A cell of its tables is "<label>, <regime>[, <vary>=<value>]@R<id>".

    bandit        contextual (MLP policy, 100 actions) | continuous (MLP policy, ``dims`` dimensions) | sequence (transformer) |
                  length (transformer, responses that end)
    rewards       reward ids: 4, 5, 8, 9 for contextual, 1-3 for continuous, 6, 7 for sequence, 10-12 for length
    arms          what is compared; an arm without ``lr`` is tuned
    num_seeds     replicates; seeds are seed, seed + 1, ...
    eval_every    gradient steps between evaluations; num_eval: contexts or prompts an evaluation averages over
    warm_steps    Adam steps of imitation of the data policy before anything else
    lr_grid       candidates for tuned arms: the best mean final reward over ``tuning_seeds`` other seeds wins
    vary          an Arm field that distinguishes arms of one label (prompts, reuse, ...): x axis of the bars, and the
                  columns of the log-ratio figure
    latent        continuous: law of the policy before tanh
    dropout       sequence, length: probability of dropout in the policy while it trains; the reference never has any
    legacy_logps  sequence: the published code's unshifted log-probs, to measure what they change
    figures       curves: reward against step | reward_kl | log_ratios of chosen and rejected | bars of final reward
    """

    rewards: list[int]
    arms: list[Arm]
    bandit: Literal["contextual", "continuous", "sequence", "length"] = "contextual"
    num_seeds: int = 20
    seed: int = 0
    eval_every: int = 10
    num_eval: int = 100
    warm_steps: int = 100
    lr_grid: list[float] = field(default_factory=lambda: [0.0003, 0.001, 0.003, 0.01])
    tuning_seeds: int = 5
    vary: str | None = None
    dims: int = 2
    latent: Literal["gaussian", "cauchy"] = "gaussian"
    dropout: float = 0.0
    legacy_logps: bool = False
    figures: list[Literal["curves", "reward_kl", "log_ratios", "bars"]] = field(
        default_factory=lambda: ["curves"]
    )
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        for reward in self.rewards:
            contextual.check_reward(reward, REWARDS[self.bandit])
        known = [f.name for f in dataclasses.fields(Arm)]
        if self.vary is not None and self.vary not in known:
            raise UserError(f"vary={self.vary}: must be a field of an arm: {', '.join(known)}")
        if self.num_seeds < 2:
            raise UserError(f"num_seeds={self.num_seeds}: an interval needs at least 2")
        for name in ("eval_every", "num_eval", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        names = [self.cell(arm, 0) for arm in self.arms]
        for name in {n for n in names if names.count(n) > 1}:
            raise UserError(
                f"arms: two arms are called {name.split('@')[0]!r}: give them labels, or name their difference in vary"
            )

    def cell(self, arm: Arm, reward: int) -> str:
        """Name of the arm under a reward, in every table."""
        varied = "" if self.vary is None else f", {self.vary}={getattr(arm, self.vary)}"
        return f"{arm.label}, {arm.regime}{varied}@R{reward}"

    def world(self, reward: int, seeds: Sequence[int]) -> World:
        """A fresh bandit: its streams start anew, so arms see the same prompts and first samples."""
        warm = WarmStart(self.warm_steps)
        if self.bandit == "contextual":
            return ContextualBandit(reward, seeds, warm, self.num_eval)
        if self.bandit == "continuous":
            return ContinuousBandit(reward, seeds, self.dims, self.latent, warm, self.num_eval)
        if self.bandit == "length":
            warm = WarmStart(self.warm_steps, prompts=16)
            return LengthBandit(reward, seeds, small_transformer(self.dropout), warm, self.num_eval)
        network = Transformer(dropout=self.dropout, legacy_logps=self.legacy_logps)
        return SequenceBandit(reward, seeds, network, warm, self.num_eval)

    def train(self, arm: Arm, reward: int, seeds: Sequence[int], eval_every: int) -> Curves:
        """One arm from its imitation policy."""
        world = self.world(reward, seeds)
        prompts = world.draw_prompts(arm.prompts)
        return train(world, arm, world.warm_start(prompts), prompts, eval_every)

    def tuned(self, arm: Arm, reward: int) -> Arm:
        """The arm with the learning rate of the grid that ends highest on the tuning seeds."""
        if arm.lr is not None:
            return arm
        seeds = range(self.seed + TUNING_OFFSET, self.seed + TUNING_OFFSET + self.tuning_seeds)
        candidates = [dataclasses.replace(arm, lr=lr) for lr in self.lr_grid]
        ends = [float(self.train(c, reward, seeds, c.steps).last("reward").mean()) for c in candidates]
        return candidates[int(np.argmax(ends))]

    def run(self, report: Report) -> None:
        """Every arm under every reward; then tables and figures."""
        seeds = range(self.seed, self.seed + self.num_seeds)
        curves: dict[tuple[int, Arm], Curves] = {}
        for reward in self.rewards:
            self._oracles(report, reward)
            for arm in self.arms:
                tuned = self.tuned(arm, reward)
                found = self.train(tuned, reward, seeds, self.eval_every)
                curves[reward, arm] = found
                cell, metrics = self.cell(arm, reward), {n: v.numpy() for n, v in found.metrics.items()}
                report.curve(cell, found.steps, found.queries, metrics, seeds, SHOWN)
                report.cell(cell, "lr", np.array([tuned.lr]))
                report.cell(cell, "reward_over_training", metrics["reward"].mean(0))
                chosen = metrics["log_ratio/chosen"]
                report.cell(cell, "log_ratio/chosen_drop", chosen.max(0) - chosen[-1])  # below its own peak
                log.info("%-45s lr %-6g reward %.3f", cell, tuned.lr, found.last("reward").mean())
        with figures.style():
            for kind in self.figures:
                report.figure(kind, getattr(self, f"_{kind}")(curves))

    def _oracles(self, report: Report, reward: int) -> None:
        """What infinitely many samples would give the contextual bandit."""
        if self.bandit != "contextual":
            return
        mu, table = contextual.data_policy(), contextual.reward_table(reward)
        n = self.arms[0].samples
        answers = {"data policy": mu}
        answers |= {f"best of {n}^{k}": oracles.best_of_n(mu, table, n**k) for k in (1, 2, 3)}
        for arm in self.arms:
            if arm.method == "ipo":
                answers[f"IPO fixed point, margin {arm.margin:g}"] = oracles.ipo_fixed_point(
                    mu, mu, table, arm.margin
                )
            if arm.method == "rwr" and not arm.standardise:
                answers[f"RWR fixed point, tau {arm.temperature:g}"] = oracles.rwr_fixed_point(
                    mu, table, arm.temperature
                )
        for name, policy in answers.items():
            report.cell(f"oracle: {name}@R{reward}", "reward", np.array([policy @ table]))

    def _labels(self) -> dict[str, dict]:
        labels = list(dict.fromkeys(arm.label for arm in self.arms))
        return {label: figures.look(i) for i, label in enumerate(labels)}

    def _panels(self) -> tuple[Figure, np.ndarray, dict[tuple[int, str], Axes]]:
        """One panel per (reward, regime): rewards are rows, or columns where there is one regime."""
        regimes = list(dict.fromkeys(arm.regime for arm in self.arms))
        keys = [(reward, regime) for reward in self.rewards for regime in regimes]
        shape = (1, len(self.rewards)) if len(regimes) == 1 else (len(self.rewards), len(regimes))
        figure, axes = figures.panels(*shape, 3.2, 2.3)
        where = dict(zip(keys, axes.flat, strict=True))
        for (reward, regime), ax in where.items():
            ax.set(title=f"R{reward}, {regime}", ylabel="expected reward")
        return figure, axes, where

    def _curves(self, curves: dict[tuple[int, Arm], Curves]) -> Figure:
        """Expected reward against gradient step."""
        figure, axes, where = self._panels()
        looks = self._labels()
        for (reward, arm), found in curves.items():
            ax, label, line = where[reward, arm.regime], arm.label, looks[arm.label]
            if self.vary is not None:
                label, line = f"{label}, {self._varied(arm)}", figures.look(self.arms.index(arm))
            figures.band(ax, found.steps, found.metrics["reward"].numpy(), label, **line)
            ax.set(xlabel="gradient step", ylim=(0, 1.03))
        figures.legend_above(figure, axes, figures.over_seeds(self.num_seeds))
        return figure

    def _reward_kl(self, curves: dict[tuple[int, Arm], Curves]) -> Figure:
        """Mean reward against mean KL(policy || reference) along training; a dot at the end."""
        figure, axes, where = self._panels()
        looks = self._labels()
        for (reward, arm), found in curves.items():
            ax = where[reward, arm.regime]
            x, y = (found.metrics[m].mean(-1).numpy() for m in ("kl_policy_reference", "reward"))
            ax.plot(x, y, label=arm.label, **looks[arm.label])
            ax.plot(x[-1:], y[-1:], marker="o", color=looks[arm.label]["color"])
            ax.set(xlabel="KL(policy || reference), nats")
        figures.legend_above(figure, axes, f"mean of n = {self.num_seeds} seeds; dot: end of training")
        return figure

    def _log_ratios(self, curves: dict[tuple[int, Arm], Curves]) -> Figure:
        """log pi / pi_ref of the best sample (solid) and of the others (dashed); columns: the varied field."""
        columns = list(dict.fromkeys(self._varied(arm) for arm in self.arms))
        figure, axes = figures.panels(len(self.rewards), len(columns), 2.5, 2.1)
        looks = self._labels()
        for (reward, arm), found in curves.items():
            ax = axes[self.rewards.index(reward), columns.index(self._varied(arm))]
            for role, dash in (("chosen", "-"), ("rejected", "--")):
                values = found.metrics[f"log_ratio/{role}"].numpy()
                line = {"color": looks[arm.label]["color"], "linestyle": dash}
                figures.band(ax, found.steps, values, f"{arm.label}, {role}", **line)
            ax.set(title=f"R{reward}, {self._varied(arm)}", xlabel="gradient step", ylabel="log-ratio, nats")
        for ax in axes.flat:  # after all arms: it ends autoscaling
            ax.set_ylim(bottom=max(LOWEST_SHOWN[self.bandit], ax.get_ylim()[0]))
        figures.legend_above(figure, axes, figures.over_seeds(self.num_seeds))
        return figure

    def _varied(self, arm: Arm) -> str:
        return arm.regime if self.vary is None else f"{self.vary} {getattr(arm, self.vary)}"

    def _bars(self, curves: dict[tuple[int, Arm], Curves]) -> Figure:
        """Final reward: one group of bars per value of the varied field, or one bar per arm."""
        arms = {(a.label, self._varied(a)): a for a in self.arms}
        groups = list(dict.fromkeys(varied for _, varied in arms))
        figure, axes = figures.panels(
            1, len(self.rewards), max(2.6, 0.75 * len(groups), 0.3 * len(arms)), 2.5
        )
        missing = np.full(self.num_seeds, np.nan)
        for reward, ax in zip(self.rewards, axes[0], strict=True):
            ends = {key: curves[reward, arm].last("reward").numpy() for key, arm in arms.items()}
            ax.set(title=f"R{reward}", ylabel="final expected reward", ylim=(0, 1.03))
            if self.vary is None:
                names = [label if len(groups) == 1 else f"{label}, {varied}" for label, varied in ends]
                figures.bars(ax, names, {"": np.stack(list(ends.values()))}, 50)
                continue
            series = {
                x: np.stack([ends.get((x, group), missing) for group in groups]) for x in self._labels()
            }
            figures.bars(ax, [group.removeprefix(f"{self.vary} ") for group in groups], series)
            ax.set(xlabel=self.vary)
        if self.vary is not None:
            figures.legend_above(figure, axes, figures.over_seeds(self.num_seeds))
        else:
            figure.suptitle(figures.over_seeds(self.num_seeds), fontsize=7)
        return figure
