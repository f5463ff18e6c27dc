"""The quickstart's figure: what was trained, how it does on held-out data for each group, and against what is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from plot_scripts.draw import Figure, draw_figure, drawable
from plot_scripts.load import Loaded, load_directories
from plot_scripts.panels import Panel

ACCURACY = {"metric": "rewards/accuracies", "split": "test,eval", "ylabel": "share of pairs"}


def quickstart_figure(
    runs: Sequence[Path],
    out: Path,
    reference_lines: Mapping[str, float | Mapping[str, float]] | None = None,
    name: str = "quickstart",
) -> list[Path]:
    """Write <out>/<name>.{pdf,png,csv,json}: losses, held-out accuracy by group while training and at the end, group weights.

    reference_lines  {label: accuracy} or {label: {group name: accuracy}}, e.g. {"Bayes rate": {"north": 0.83}}
    """
    loaded = load_directories(runs)
    lines = {k: dict(v) if isinstance(v, Mapping) else float(v) for k, v in (reference_lines or {}).items()}
    grouped = bool(
        loaded.groups(loaded.first_split("test,eval", "rewards/accuracies", "*"), "rewards/accuracies")
    )
    group = "*" if grouped else ""
    weights = Panel(
        kind="curves",
        title="Group weights",
        metric="weights",
        split="train",
        group="*",
        bins=200,
        ylabel="weight",
        moving=True,
    )
    margins = Panel(
        kind="curves",
        title="Reward margin",
        metric="rewards/margins",
        split="test,eval",
        ylabel="nats",
        optional=True,
    )
    panels = [
        Panel(
            kind="curves",
            title="Held-out loss",
            metric="loss",
            split="test,eval",
            ylabel="nats",
            yscale=_scale(loaded),
        ),
        Panel(kind="curves", title="Held-out accuracy", group=group, lines=lines, optional=True, **ACCURACY),
        Panel(kind="bars", title="Accuracy at the end", group=group, lines=lines, optional=True, **ACCURACY),
        weights if drawable(Figure([replace(weights, optional=True)]), loaded) else margins,
    ]
    return draw_figure(Figure(panels, columns=2), name, Path(out), loaded)


def _scale(loaded: Loaded) -> str:
    """Logarithmic where the losses of the runs are far apart (an SFT loss counts nats of text, DPO's starts at log 2)."""
    values = [
        y
        for (_, split, metric, group), (_, y) in loaded.series.items()
        if metric == "loss" and not group and split != "train"
    ]
    together = np.concatenate(values) if values else np.ones(1)
    return "log" if together.min() > 0 and together.max() > 5 * together.min() else "linear"
