"""Every metric that was logged: curves with bands, and bars of where the runs ended; overall, per group, mean and worst.

    python -m plot_scripts.plot_from_wandb_full_metrics --runs runs --out figures/full
    python -m plot_scripts.plot_from_wandb_full_metrics --entity E --project P --filters '{state: finished}' --cache .cache/wandb

Writes <split>.<metric>.curves and <split>.<metric>.final, each as PDF, PNG, CSV and JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # python plot_scripts/plot_from_wandb_full_metrics.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plot_scripts.draw import Figure, draw_figure
from plot_scripts.load import Loaded
from plot_scripts.panels import Panel, group_label
from plot_scripts.sources import load, parse, parser, run
from utils import UserError, did_you_mean

AGGREGATES = ("", "mean_group", "worst_group")
COUNTS = ("group_counts", "num_examples")


def tracked(loaded: Loaded) -> list[tuple[str, str]]:
    """(split, metric) of everything that was logged, bounds and counts aside."""
    pairs = {(split, metric) for _, split, metric, _ in loaded.series}
    return sorted((s, m) for s, m in pairs if "/ci_" not in m and m not in COUNTS)


def figures(loaded: Loaded, split: str, metric: str) -> dict[str, Figure]:
    """The two figures of one metric. Bars of what is logged every step would show its last step's noise: only curves."""
    names = [g for g in AGGREGATES if loaded.has(split, metric, g)] + loaded.groups(split, metric)
    bins = 200 if split == "train" else None
    common = {"metric": metric, "split": split}
    curves = [
        Panel(kind="curves", group=g, bins=bins, title=group_label(g), ylabel=metric, **common) for g in names
    ]
    drawn = {"curves": Figure(curves, title=f"{split}/{metric}", columns=min(3, len(curves)))}
    if split != "train":
        bars = Panel(kind="bars", group=",".join(names), ylabel=metric, **common)
        drawn["final"] = Figure(
            [bars], title=f"{split}/{metric}, last evaluation", columns=1, width=max(3.4, 0.9 * len(names))
        )
    return drawn


def main(words: Sequence[str]) -> list[Path]:
    options = parser(__doc__)
    options.add_argument("--metrics", nargs="+", help="only these, e.g. loss rewards/accuracies")
    options.add_argument("--splits", nargs="+", help="only these, e.g. eval test")
    request = parse(options, words)
    loaded = load(request)
    everything = tracked(loaded)
    for given, known in (
        (request.splits, {s for s, _ in everything}),
        (request.metrics, {m for _, m in everything}),
    ):
        for name in given or ():
            if name not in known:
                raise UserError(
                    f"{name}: not logged by these runs{did_you_mean(name, known)}; logged: {', '.join(sorted(known))}"
                )
    written = []
    for split, metric in everything:
        if split in (request.splits or [split]) and metric in (request.metrics or [metric]):
            for kind, figure in figures(loaded, split, metric).items():
                name = f"{split}.{metric.replace('/', '.')}.{kind}"
                figure = Figure(figure.panels, figure.title, figure.columns, figure.width, request.carry)
                written += draw_figure(figure, name, Path(request.out), loaded)
    return written


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
