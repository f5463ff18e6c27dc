"""What group weights can win on the built-in data, exactly: `python -m commands.tradeoff loss=ipo loss.beta=0.5 data.opinions.group_in_prompt=false`

The best policy under each weighting, for the law itself instead of a sample of it: its groups' losses and accuracies. With
``tradeoff.runs=DIR`` also what the finished runs in DIR reached on the test split: means over seeds and paired differences.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from commands.cli import entry
from commands.world import objective_of
from config.compose import Run
from data import opinions, optima
from engine.stats import mean_interval
from utils import UserError

WEIGHTINGS = ("uniform", "importance", "group_robust")


@dataclass(frozen=True)
class Settings:
    """runs: folder with finished runs of the same data and loss, one a weighting and seed; null: the optima alone."""

    runs: str | None = None


def best_policies(
    settings: opinions.Settings, objective: optima.Objective
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{weighting: ((G,) losses, (G,) accuracies)} of the policy with the smallest weighted sum of the groups' losses.

    Where the prompt tells the group, each group gets its own best policy, whatever the weights.
    """
    groups = opinions.GROUPS[: len(settings.group_sizes)]
    if settings.group_in_prompt:
        own = [opinions.law_table([group], settings) for group in groups]
        best = [optima.optimum(table, objective) for table in own]
        losses = np.concatenate([found.losses for found in best])
        right = np.concatenate(
            [accuracies(table, found.scores) for table, found in zip(own, best, strict=True)]
        )
        return dict.fromkeys(WEIGHTINGS, (losses, right))
    table = opinions.law_table(groups, settings)
    found = {
        "uniform": optima.optimum(table, objective),
        "importance": optima.optimum(table, objective, np.ones(len(groups))),
        "group_robust": optima.minimax_optimum(table, objective),
    }
    return {name: (best.losses, accuracies(table, best.scores)) for name, best in found.items()}


def accuracies(table: opinions.LawTable, scores: np.ndarray) -> np.ndarray:
    """(G,) share of pairs whose chosen answer has the larger of the (X, N) scores; equal scores count 1/2."""
    margin = scores[:, :, None] - scores[:, None, :]
    right = np.where(margin > 0, table.preference, 1 - table.preference)
    return (table.pair_law * np.where(margin == 0, 0.5, right)).sum((1, 2, 3))


def trained(folder: Path, groups: Sequence[str], metric: str) -> dict[str, dict[int, np.ndarray]]:
    """{weighting: {seed: (G,) the last test evaluation of each group}} of the runs under ``folder``. Raises UserError."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for results in sorted(folder.rglob("results.json")):
        config = yaml.safe_load((results.parent / "config.yaml").read_text("utf-8"))
        metrics = json.loads(results.read_text("utf-8"))["splits"]["test"]["metrics"]
        keys = [f"test/{metric}/group_{group}" for group in groups]
        seeds = found.setdefault(config["weighting"]["name"], {})
        if missing := [key for key in keys if key not in metrics]:
            raise UserError(f"{results}: no {missing[0]}; tradeoff.runs= takes runs of the data described")
        if config["seed"] in seeds:
            raise UserError(f"{results}: a second run of its weighting and seed; name a folder with one each")
        seeds[config["seed"]] = np.array([metrics[key] for key in keys])
    if not found:
        raise UserError(f"tradeoff.runs={folder}: no finished run there")
    return found


def row(name: str, values: Iterable[object]) -> None:
    print(f"{name:>28}" + "".join(f"{value:>16}" for value in values))


def over_seeds(values: np.ndarray) -> list[str]:
    """Mean and half-width of the 95 % t interval of each column of (seeds, columns)."""
    intervals = [mean_interval(column) for column in values.T]
    return [f"{i.estimate:.3f} ± {(i.high - i.low) / 2:.3f}" for i in intervals]


def report(run: Run, settings: Settings) -> None:
    """Print the groups' exact losses and accuracies at the optimum of each weighting, and what runs reached."""
    if len(run.datasets) != 1 or not isinstance(run.datasets[0].settings, opinions.Settings):
        raise UserError(
            f"datasets={run.config.datasets}: the law of datasets=[opinions] is known, no other's"
        )
    data = run.datasets[0].settings
    shares = np.array(data.group_sizes)
    groups = opinions.GROUPS[: len(shares)]
    best = best_policies(data, objective_of(run.loss))
    for title, metric, pick, worst in (("loss", "loss", 0, max), ("accuracy", "rewards/accuracies", 1, min)):

        def with_summaries(values: np.ndarray, worst=worst) -> np.ndarray:
            return np.array([*values, worst(values), values.mean(), shares @ values])

        row(title, [*groups, "worst", "mean", "by share"])
        for name, found in best.items():
            row(f"{name}, exact", [f"{value:.3f}" for value in with_summaries(found[pick])])
        if settings.runs is None:
            continue
        runs = {
            name: {seed: with_summaries(values) for seed, values in seeds.items()}
            for name, seeds in trained(Path(settings.runs), groups, metric).items()
        }
        for name, seeds in runs.items():
            row(f"{name}, {len(seeds)} runs", over_seeds(np.array(list(seeds.values()))))
        for other in [name for name in ("uniform", "importance") if name in runs]:
            common = sorted(set(runs[other]) & set(runs.get("group_robust", ())))
            if common:
                differences = [runs["group_robust"][seed] - runs[other][seed] for seed in common]
                row(f"group_robust - {other}", over_seeds(np.array(differences)))


if __name__ == "__main__":
    entry("tradeoff", Settings, report, defaults=("assert_sft_step=false", "datasets=[opinions]"))
