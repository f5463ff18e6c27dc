"""The quickstart's figure: what was trained, how it does on held-out data for each group, and against what is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from plot_scripts.draw import Figure, draw_figure, drawable
from plot_scripts.load import load_directories
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
    names = loaded.groups(loaded.first_split("test,eval", ACCURACY["metric"], "*"), ACCURACY["metric"])
    accuracy = {**ACCURACY, "group": "*" if names else "", "lines": lines, "optional": True}
    place = {str(run): i for i, run in enumerate(runs)}
    methods = sorted(loaded.methods, key=lambda m: min(place[info.source] for info in loaded.of(m)))
    # a panel per method: losses of different methods are different functions
    panels = [
        Panel(
            kind="curves",
            title=f"{method}: held-out loss",
            metric="loss",
            split="test,eval",
            ylabel="loss",
            methods=[method],
        )
        for method in methods
    ]
    panels += [
        Panel(kind="curves", title="Held-out accuracy", **accuracy),
        Panel(kind="bars", title="Accuracy at the end", **accuracy),
    ]
    weights = Panel(kind="curves", title="Group weights", metric="weights", split="train", group="*", bins=200,
                    ylabel="weight", moving=True, optional=True)  # fmt: skip
    if drawable(Figure([weights]), loaded):
        panels.append(weights)
    return draw_figure(Figure(panels, columns=2), name, Path(out), loaded)
