"""What group weights can win on the built-in data, exactly: `python -m commands.tradeoff loss=ipo loss.beta=0.5 data.opinions.group_in_prompt=false`

The best policy under each weighting, for the law itself instead of a sample of it: its groups' losses and accuracies.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from commands.cli import entry
from commands.world import objective_of
from config.compose import Run
from data import opinions, optima
from utils import UserError

WEIGHTINGS = ("uniform", "importance", "group_robust")


@dataclass(frozen=True)
class Settings:
    """No settings of its own: the data and the loss say everything."""


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


def report(run: Run, settings: Settings) -> None:
    """Print the groups' exact losses and accuracies at the optimum of each weighting."""
    if len(run.datasets) != 1 or not isinstance(run.datasets[0].settings, opinions.Settings):
        raise UserError(
            f"datasets={run.config.datasets}: the law of datasets=[opinions] is known, no other's"
        )
    data = run.datasets[0].settings
    shares = np.array(data.group_sizes)
    groups = opinions.GROUPS[: len(shares)]
    for title, pick, worst in (("loss", 0, np.max), ("accuracy", 1, np.min)):
        names = [*groups, "worst", "mean", "by share"]
        print(f"{title:>14}" + "".join(f"{name:>10}" for name in names))
        for name, found in best_policies(data, objective_of(run.loss)).items():
            values = found[pick]
            numbers = [*values, worst(values), values.mean(), shares @ values]
            print(f"{name:>14}" + "".join(f"{value:10.3f}" for value in numbers))


if __name__ == "__main__":
    entry("tradeoff", Settings, report, defaults=("assert_sft_step=false", "datasets=[opinions]"))
