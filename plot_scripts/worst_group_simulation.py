"""How well intervals for the worst group's accuracy cover: ours, and the one that ignores that the group was selected.

    python -m plot_scripts.worst_group_simulation [draws=20000] [seed=0] [out=figures]

Prints the table, writes worst_group_simulation.csv (all numbers), .pdf, .png and .json.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from config.build import build
from engine.stats import wilson_bounds, worst_group_bounds
from plot_scripts import canvas
from plot_scripts.sources import parse_words, run
from utils import stream

# name: (accuracy of each group, examples of each group)
DESIGNS = {
    "tied": ((0.70,) * 5, (60,) * 5),
    "separated": ((0.55, 0.70, 0.75, 0.80, 0.85), (60,) * 5),
    "one small group": ((0.70, 0.70, 0.72, 0.75, 0.65), (200, 200, 200, 200, 25)),
}
KINDS = ("ours", "naive")
NUMBERS = ("coverage", "below", "above", "width", "bias")


@dataclass(frozen=True)
class Request:
    """The words of the command line."""

    draws: int = 20_000
    seed: int = 0
    out: str = "figures"


def simulate(draws: int = 4000, seed: int = 0, level: float = 0.95) -> list[dict]:
    """Per design: coverage of min_g p_g, how often the interval lies wholly below or above it, mean width, both kinds;
    and the mean error of the naive estimate, the smallest observed share."""
    rows = []
    for design, (shares, sizes) in DESIGNS.items():
        truth, n = np.asarray(shares), np.asarray(sizes)
        successes = stream(seed, "simulation/worst_group", design).binomial(n, truth, size=(draws, len(n)))
        observed, target = successes / n, truth.min()
        worst = observed.argmin(axis=1)[:, None]
        naive = [np.take_along_axis(b, worst, 1)[:, 0] for b in wilson_bounds(successes, n, level)]
        row = {"design": design, "groups": len(n), "draws": draws, "truth": target}
        row["bias"] = float(observed.min(axis=1).mean() - target)
        for mark, (low, high) in (("", worst_group_bounds(successes, n, level)), ("naive_", naive)):
            row[f"{mark}coverage"] = float(((low <= target) & (target <= high)).mean())
            row[f"{mark}below"] = float((high < target).mean())
            row[f"{mark}above"] = float((low > target).mean())
            row[f"{mark}width"] = float((high - low).mean())
        rows.append(row)
    return rows


def figure(rows: Sequence[dict], out: Path, facts: dict) -> list[Path]:
    """Coverage and width of both intervals and the bias of the smallest observed share, by design."""
    name = "worst_group_simulation"
    looks = canvas.looks(KINDS)
    drawn: list[dict] = []
    with canvas.styled():
        sheet, axes = canvas.new_figure(3, 3)
        for ax, (metric, title) in zip(
            axes,
            (("coverage", "Coverage"), ("width", "Mean width"), ("bias", "Bias of the minimum")),
            strict=True,
        ):
            for i, row in enumerate(rows):
                for kind, shift in zip(KINDS, (-0.12, 0.12), strict=True):
                    key = metric if kind == "ours" or metric == "bias" else f"naive_{metric}"
                    if metric == "bias" and kind == "ours":
                        continue
                    look = looks[kind]
                    ax.plot(
                        i + shift,
                        row[key],
                        color=look.colour,
                        marker=look.marker,
                        markersize=5,
                        linestyle="none",
                    )
                    place = {"panel": title, "kind": "point", "method": kind, "group": row["design"]}
                    drawn.append({"figure": name, **place, "x": i, "y": row[key], "n": row["draws"]})
            ax.set_xticks(range(len(rows)), [str(r["design"]).replace("one ", "one\n") for r in rows])
            ax.set_xlim(-0.5, len(rows) - 0.5)
            ax.set_title(title)
            ax.grid(visible=False, axis="x")
        axes[0].axhline(0.95, color=canvas.PALE, linewidth=0.9, linestyle=(0, (1, 1.5)))
        axes[2].axhline(0.0, color=canvas.PALE, linewidth=0.9, linestyle=(0, (1, 1.5)))
        for ax in axes:
            ax.margins(y=0.12)
        axes[1].set_ylim(0.0, 1.15 * max(r["width"] for r in rows))
        labels = {
            "ours": "knows that it is a minimum",
            "naive": "Wilson interval of the group that looks worst",
        }
        handles = [
            Line2D(
                [],
                [],
                color=looks[k].colour,
                marker=looks[k].marker,
                markersize=5,
                linestyle="none",
                label=labels[k],
            )
            for k in KINDS
        ]
        sizes = "\n".join(
            f"{d}: p = {', '.join(f'{x:g}' for x in p)}, n = {', '.join(map(str, n))}"
            for d, (p, n) in DESIGNS.items()
        )
        canvas.finish(sheet, [("interval", handles)], "", [], sizes)
        return canvas.save(sheet, out, name, drawn, {**facts, "rows": list(rows)})


def main(words: Sequence[str]) -> list[Path]:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return []
    request = build(Request, parse_words(words, lists=()), "")
    rows = simulate(request.draws, request.seed)
    print(f"{'design':<16} {'':<6} coverage   below   above   width    bias")
    for row in rows:
        for kind, mark in zip(KINDS, ("", "naive_"), strict=True):
            numbers = " ".join(f"{row[mark + k]:7.4f}" for k in NUMBERS[:-1])
            bias = f"{row['bias']:+.4f}" if kind == "naive" else ""
            print(f"{row['design'] if kind == 'ours' else '':<16} {kind:<6} {numbers} {bias:>8}")
    return figure(rows, Path(request.out), {"seed": request.seed, "level": 0.95})


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
