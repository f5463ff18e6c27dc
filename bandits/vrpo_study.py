"""Variance-reduced estimation on the enumerable bed: simulated against exact n MSE, regret, lambda, double robustness."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

import utils
from bandits import figures, tabular
from bandits.report import Claim, Report
from engine.stats import cluster_bootstrap
from utils import UserError, log

Guess = Literal["none", "right", "noisy", "half", "reversed"]


@dataclass(frozen=True)
class Estimator:
    """One way to estimate theta.

    preference  auxiliary model g; none: the plain loss, whatever the rest says
    pairs       M auxiliary pairs per labelled pair; null: their exact expectation
    lam         control-variate weight; 1 is the paper's, auto is M / (M + 1)
    sampler     law of the auxiliary responses: right (that of the labelled ones) or wrong
    """

    label: str
    preference: Guess
    pairs: int | None = None
    lam: float | Literal["auto"] = 1.0
    sampler: Literal["right", "wrong"] = "right"

    def __post_init__(self) -> None:
        if self.pairs is not None and self.pairs < 1:
            raise UserError(
                f"estimator {self.label!r}: pairs={self.pairs}: must be at least 1, or null for infinitely many"
            )
        if self.lam != "auto" and not 0 <= self.lam <= 1:
            raise UserError(f"estimator {self.label!r}: lam={self.lam}: must lie in [0, 1], or be auto")

    @property
    def weight(self) -> float:
        """lam as a number."""
        if self.lam == "auto":
            return 1.0 if self.pairs is None else self.pairs / (self.pairs + 1)
        return self.lam


@dataclass(frozen=True)
class VRPOStudy:
    """Settings of one experiment of this family. A cell of its tables is the estimator's label.

    bed         single_prompt | five_prompts | well_specified
    base        dpo: Newton's method | ramp: gradient descent from the reference, ``steps`` of size ``lr``
    num         labelled pairs per replicate
    replicates  independent data sets; they play the part of seeds
    figures     pairs: n MSE and regret against M | sources: stacked variance | lam: n MSE against lambda | bias | bars |
                ratios: margin variance and regret over those of the plain loss, against M (and ratios.csv)
    """

    estimators: list[Estimator]
    bed: Literal["single_prompt", "five_prompts", "well_specified"] = "single_prompt"
    base: Literal["dpo", "ramp"] = "dpo"
    num: int = 400
    replicates: int = 400
    seed: int = 0
    steps: int = 400
    lr: float = 0.5
    figures: list[Literal["pairs", "sources", "lam", "bias", "bars", "ratios"]] = field(
        default_factory=lambda: ["pairs", "sources"]
    )
    claims: list[Claim] = field(default_factory=list)

    def __post_init__(self) -> None:
        labels = [e.label for e in self.estimators]
        for label in {x for x in labels if labels.count(x) > 1}:
            raise UserError(f"estimators: two are called {label!r}")
        if self.replicates < 2:
            raise UserError(f"replicates={self.replicates}: an interval needs at least 2")

    @property
    def num_seeds(self) -> int:
        """Replicates are drawn from one stream, but each is a data set of its own."""
        return self.replicates

    def guess(self, bed: tabular.Bed, estimator: Estimator) -> np.ndarray:
        """(X, K, K); the noise of a noisy g is one draw for the whole study. None has weight 0, so any g does."""
        kind = "right" if estimator.preference == "none" else estimator.preference
        return tabular.guess(bed, kind, utils.stream(self.seed, "vrpo/guess"))

    def exact(self, bed: tabular.Bed, estimator: Estimator) -> tabular.Variance | None:
        """Asymptotic n MSE by source; None where the estimator is not consistent or the loss not logistic."""
        if self.base != "dpo" or estimator.sampler == "wrong":
            return None
        if estimator.preference == "none":
            return tabular.exact_variance(bed)
        num_pairs = np.inf if estimator.pairs is None else estimator.pairs
        return tabular.exact_variance(bed, self.guess(bed, estimator), num_pairs, estimator.weight)

    def run(self, report: Report) -> None:
        """Simulate every estimator on the same labelled data; then tables and figures."""
        bed = tabular.BEDS[self.bed]()
        truth = tabular.population(bed)
        for estimator in self.estimators:
            theta, converged = self._simulate(bed, estimator)
            error = theta - (truth if self.base == "dpo" else theta.mean(0))
            regret, value = tabular.policy_values(bed, theta)
            values = {
                "n_mse": self.num * np.square(error).sum(1),
                "n_excess_risk": self.num * tabular.excess_risk(bed, theta),
                "regret": regret,
                "value": value,
                "converged": converged,
            }
            if self.base == "dpo":
                values["n_margin_variance"] = self.num * tabular.margin_spread(bed, theta)
            values |= {f"bias_{f}": error[:, f] for f in range(theta.shape[1])}
            for metric, numbers in values.items():
                report.cell(estimator.label, metric, numbers)
            self._exact_cells(report, bed, estimator, truth)
            log.info(
                "%-32s n MSE %8.2f  exact %8.2f  regret %.4f  converged %.3f",
                estimator.label,
                values["n_mse"].mean(),
                report.cells.get((estimator.label, "exact_n_mse"), np.array([np.nan]))[0],
                regret.mean(),
                converged.mean(),
            )
        with figures.style():
            for kind in self.figures:
                report.figure(kind, getattr(self, f"_{kind}")(report))

    def _simulate(self, bed: tabular.Bed, estimator: Estimator) -> tuple[np.ndarray, np.ndarray]:
        """(R, F) estimates and (R,) whether each converged. Labelled data are the same for every estimator."""
        aux = bed.sampler if estimator.sampler == "right" else tabular.wrong_sampler(bed)
        rng = utils.stream(self.seed, "vrpo/data")
        counts = tabular.draw(bed, self.num, self.replicates, estimator.pairs, aux, rng)
        lam = 0.0 if estimator.preference == "none" else estimator.weight
        objective = tabular.Objective(bed, counts, self.guess(bed, estimator), lam, self.base)
        num_features = bed.features.shape[-1]
        if self.base == "dpo":
            theta, converged = tabular.newton(objective, num_features)
        else:
            theta = tabular.descend(objective, num_features, self.steps, self.lr)
            converged = tabular.gradient(objective, theta).norm(dim=1) < 1e-2
        return theta.numpy(), converged.to(torch.float64).numpy()

    def _exact_cells(self, report: Report, bed: tabular.Bed, estimator: Estimator, truth: np.ndarray) -> None:
        exact = self.exact(bed, estimator)
        if exact is not None:
            for source in ("label", "response", "prompt"):
                report.cell(estimator.label, f"exact_{source}", np.array([getattr(exact, source)]))
            report.cell(estimator.label, "exact_n_mse", np.array([exact.total]))
        if self.base == "dpo" and estimator.preference != "none":
            aux = bed.sampler if estimator.sampler == "right" else tabular.wrong_sampler(bed)
            limit = tabular.population(bed, self.guess(bed, estimator), aux, estimator.weight)
            for f, shift in enumerate(limit - truth):
                report.cell(estimator.label, f"exact_bias_{f}", np.array([shift]))

    def _families(self) -> dict[str, list[Estimator]]:
        """Estimators by auxiliary model, the plain loss apart."""
        kinds = dict.fromkeys(e.preference for e in self.estimators if e.preference != "none")
        return {kind: [e for e in self.estimators if e.preference == kind] for kind in kinds}

    def _intervals(self) -> str:
        """What points and whiskers are."""
        return f"mean and 95 % interval, n = {self.replicates} data sets"

    def _plain(self) -> Estimator | None:
        return next((e for e in self.estimators if e.preference == "none"), None)

    def _pairs(self, report: Report):
        """n MSE (points: simulated with interval, lines: exact) and greedy regret against M."""
        figure, axes = figures.panels(1, 2, 3.2, 2.5)
        pairs = sorted(
            {e.pairs or 0 for e in self.estimators if e.preference != "none"}, key=lambda m: m or 10**9
        )
        at = {m: i for i, m in enumerate(pairs)}
        for i, (kind, members) in enumerate(self._families().items()):
            line = figures.look(i)
            x = [at[e.pairs or 0] for e in members]
            for ax, metric in zip(axes[0], ("n_mse", "regret"), strict=True):
                values = np.stack([report.cells[e.label, metric] for e in members])
                half = figures.half_width(values)
                beside = np.array(x) + 0.07 * i  # else intervals hide each other
                ax.errorbar(beside, values.mean(1), half, fmt="o", color=line["color"], label=f"g: {kind}")
            exact = [self.exact(tabular.BEDS[self.bed](), e).total for e in members]
            axes[0, 0].plot(x, exact, color=line["color"], linewidth=0.9)
        plain = self._plain()
        if plain is not None:
            for ax, metric in zip(axes[0], ("n_mse", "regret"), strict=True):
                mean, half = (f(report.cells[plain.label, metric]) for f in (np.mean, figures.half_width))
                ax.axhspan(
                    mean - half, mean + half, color="#888888", alpha=0.35, linewidth=0, label="plain loss"
                )
            axes[0, 0].axhline(
                self.exact(tabular.BEDS[self.bed](), plain).total, color="#888888", linewidth=0.9
            )
        for ax, name in zip(axes[0], ("n x MSE of theta (lines: exact)", "greedy regret"), strict=True):
            ax.set_xticks(range(len(pairs)), [str(m) if m else "inf" for m in pairs])
            ax.set(xlabel="auxiliary pairs per labelled pair, M", ylabel=name)
        axes[0, 0].set_yscale("log")
        axes[0, 1].set_ylim(bottom=0)
        figures.legend_above(figure, axes, self._intervals())
        return figure

    def _sources(self, report: Report):
        """Exact n MSE stacked by source, with the simulated total and its interval."""
        members = [e for e in self.estimators if (e.label, "exact_n_mse") in report.cells]
        figure, axes = figures.panels(1, 1, max(3.4, 0.55 * len(members)), 2.8)
        ax, bottom, x = axes[0, 0], np.zeros(len(members)), np.arange(len(members))
        for i, source in enumerate(("label", "prompt", "response")):
            height = np.array([report.cells[e.label, f"exact_{source}"][0] for e in members])
            ax.bar(x, height, 0.7, bottom, label=source, color=figures.COLOURS[i])
            bottom += height
        values = np.stack([report.cells[e.label, "n_mse"] for e in members])
        mean, half = values.mean(1), figures.half_width(values)
        ax.errorbar(x, mean, half, fmt="o", color="#333333", label="simulated")
        ax.set_xticks(x, [e.label for e in members], rotation=60, ha="right", rotation_mode="anchor")
        ax.set(ylabel="n x MSE of theta", ylim=(0, 1.05 * max(bottom.max(), (mean + half).max())))
        figures.legend_above(figure, axes, self._intervals())
        return figure

    def _lam(self, report: Report):
        """n MSE against lambda, one colour per M; lines are exact."""
        figure, axes = figures.panels(1, 1, 3.4, 2.5)
        ax, bed, grid = axes[0, 0], tabular.BEDS[self.bed](), np.linspace(0, 1, 41)
        for i, m in enumerate(dict.fromkeys(e.pairs for e in self.estimators if e.preference != "none")):
            members = [e for e in self.estimators if e.pairs == m and e.preference != "none"]
            values = np.stack([report.cells[e.label, "n_mse"] for e in members])
            line, g = figures.look(i), self.guess(bed, members[0])
            name = "M = inf" if m is None else f"M = {m}"
            ax.errorbar(
                [e.weight for e in members],
                values.mean(1),
                figures.half_width(values),
                fmt="o",
                color=line["color"],
                label=name,
            )
            exact = [tabular.exact_variance(bed, g, np.inf if m is None else m, lam).total for lam in grid]
            ax.plot(grid, exact, color=line["color"], linewidth=0.9)
        ax.set(
            xlabel="control-variate weight lambda", ylabel="n x MSE of theta (lines: exact)", ylim=(0, None)
        )
        figures.legend_above(figure, axes, self._intervals())
        return figure

    def ratios(self, report: Report) -> list[dict]:
        """Mean of a metric over the plain loss's, with a bootstrap interval over the replicates, which share their labelled
        data; below 1 is better."""
        plain, rows = self._plain(), []
        for estimator in self.estimators:
            for metric in ("n_margin_variance", "n_excess_risk", "regret"):
                if estimator is plain or (estimator.label, metric) not in report.cells:
                    continue
                both = np.stack([report.cells[e.label, metric] for e in (estimator, plain)], axis=1)
                found = cluster_bootstrap(both, None, lambda totals, size: totals[..., 0] / totals[..., 1])
                row = {
                    "estimator": estimator.label,
                    "M": estimator.pairs or "inf",
                    "lam": estimator.lam,
                    "metric": metric,
                }
                rows.append(
                    row | {"ratio": found.estimate, "low": found.low, "high": found.high, "n": found.n}
                )
        return rows

    def _ratios(self, report: Report):
        """Ratios to the plain loss against M, one line per lambda; also to ratios.csv."""
        rows = self.ratios(report)
        report.table("ratios", rows)
        figure, axes = figures.panels(1, 2, 3.2, 2.5)
        pairs = list(dict.fromkeys(row["M"] for row in rows))
        for ax, (metric, name) in zip(
            axes[0],
            (("n_margin_variance", "variance of the margins"), ("regret", "greedy regret")),
            strict=True,
        ):
            for i, lam in enumerate(dict.fromkeys(row["lam"] for row in rows)):
                mine = [row for row in rows if row["lam"] == lam and row["metric"] == metric]
                x = np.array([pairs.index(row["M"]) for row in mine]) + 0.08 * (2 * i - 1)
                y, low, high = (np.array([row[k] for row in mine]) for k in ("ratio", "low", "high"))
                label = f"lambda {lam if lam == 'auto' else f'{lam:g}'}"
                ax.errorbar(x, y, [y - low, high - y], fmt="o-", color=figures.look(i)["color"], label=label)
            ax.axhline(1, color="#888888", linewidth=0.9)
            ax.set_xticks(range(len(pairs)), [str(m) for m in pairs])
            ax.set(
                xlabel="auxiliary pairs per labelled pair, M",
                ylabel=f"{name}\nover the plain loss's",
                ylim=(0, None),
            )
        figures.legend_above(figure, axes, f"95 % bootstrap intervals, n = {self.replicates} data sets")
        return figure

    def _bias(self, report: Report):
        """Mean error of each parameter with its interval; crosses: the exact limit."""
        num = tabular.BEDS[self.bed]().features.shape[-1]
        figure, axes = figures.panels(1, num, 2.8, 2.6)
        labels, x = [e.label for e in self.estimators], np.arange(len(self.estimators))
        for f, ax in enumerate(axes[0]):
            values = np.stack([report.cells[label, f"bias_{f}"] for label in labels])
            ax.errorbar(
                x,
                values.mean(1),
                figures.half_width(values),
                fmt="o",
                color=figures.COLOURS[0],
                label="simulated",
            )
            limits = [report.cells.get((label, f"exact_bias_{f}"), np.zeros(1))[0] for label in labels]
            ax.plot(x, limits, "x", markersize=7, color=figures.COLOURS[1], label="exact limit")
            ax.axhline(0, color="#888888", linewidth=0.6)
            ax.set_xticks(x, labels, rotation=50, ha="right", rotation_mode="anchor")
            ax.margins(x=0.12)
            ax.set(ylabel=f"bias of theta_{f}")
        figures.legend_above(figure, axes, self._intervals())
        return figure

    def _bars(self, report: Report):
        """n variance around the mean estimate, and regret."""
        figure, axes = figures.panels(1, 2, 2.8, 2.6)
        labels = [e.label for e in self.estimators]
        for ax, (metric, name) in zip(
            axes[0], (("n_mse", "n x variance of theta"), ("regret", "greedy regret")), strict=True
        ):
            figures.bars(ax, labels, {"": np.stack([report.cells[label, metric] for label in labels])})
            ax.set(ylabel=name)
            ax.tick_params(axis="x", rotation=50)
        figure.suptitle(self._intervals(), fontsize=7)
        return figure
