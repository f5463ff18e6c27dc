"""The group-robust paper's figures (Ramesh et al. 2024, Figures 3 and 13) for any set of runs.

    python -m plot_scripts.plot_from_wandb_paper_plots --runs runs/ipo_* runs/gr_ipo_* --out figures/paper
    python -m plot_scripts.plot_from_wandb_paper_plots --entity E --project P --filters '{state: finished}' --cache .cache/wandb

Draws plot_scripts/figures/group_robust_{end,training,curves}.yaml: worst-group loss and accuracy, losses by group, group weights, and
log-prob accuracies at the start and at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # python plot_scripts/plot_from_wandb_paper_plots.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plot_scripts.draw import draw_figure, read_figure
from plot_scripts.sources import load, parse, parser, run

NAMES = ("group_robust_end", "group_robust_training", "group_robust_curves")


def main(words: Sequence[str]) -> list[Path]:
    request = parse(parser(__doc__), words)
    loaded = load(request)
    written = []
    for name in NAMES:
        _, figure = read_figure(name)
        written += draw_figure(replace(figure, carry=request.carry), name, Path(request.out), loaded)
    return written


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
