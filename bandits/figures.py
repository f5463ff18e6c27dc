"""The few matplotlib calls that the bandit figures share: panels, lines with 95 % bands, bars with whiskers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context
from scipy.stats import t as student_t

STYLE = Path(__file__).resolve().parents[1] / "plot_scripts" / "style" / "paper.mplstyle"
# Okabe and Ito's palette, told apart by colour-blind readers; then the same colours dashed
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B5A2B")


@contextmanager
def style() -> Iterator[None]:
    """The project's figure style for everything drawn and saved inside."""
    with context(["default", STYLE]):
        yield


def panels(rows: int, columns: int, width: float = 2.4, height: float = 2.0) -> tuple[Figure, np.ndarray]:
    """A figure and its (rows, columns) axes."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def look(index: int) -> dict:
    """Colour and dash of the ``index``-th series."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": ("-", "--", ":")[index // len(COLOURS) % 3]}


def half_width(values: np.ndarray) -> np.ndarray:
    """(..., R) -> (...) half of the 95 % t interval of the mean over R."""
    n = values.shape[-1]
    if n < 2:
        return np.zeros(values.shape[:-1])
    return student_t.ppf(0.975, n - 1) * values.std(-1, ddof=1) / np.sqrt(n)


def band(ax: Axes, x: Sequence[float], values: np.ndarray, label: str, **line) -> None:
    """Mean over the last axis of ``values`` (len(x), R), with its 95 % interval shaded."""
    mean, half = values.mean(-1), half_width(values)
    ax.plot(x, mean, label=label, **line)
    ax.fill_between(x, mean - half, mean + half, color=line["color"], alpha=0.2, linewidth=0)


def bars(
    ax: Axes,
    groups: Sequence[str],
    series: dict[str, np.ndarray],
    rotation: float = 0,
    colours: Sequence[str] | None = None,
) -> None:
    """Grouped bars: ``series`` maps a label to (len(groups), R) values; whiskers are 95 % intervals.

    ``rotation``: of the groups' names, in degrees; ``colours``: one a group, for a single series.
    """
    width = 0.8 / len(series)
    at = np.arange(len(groups))
    for i, (label, values) in enumerate(series.items()):
        ax.bar(
            at + (i - (len(series) - 1) / 2) * width,
            values.mean(-1),
            width,
            yerr=half_width(values),
            label=label,
            color=colours or COLOURS[i % len(COLOURS)],
            error_kw={"linewidth": 0.8},
        )
    anchor = {"rotation": rotation, "ha": "right", "rotation_mode": "anchor"} if rotation else {}
    ax.set_xticks(at, groups, **anchor)
    ax.grid(axis="x", visible=False)


def over_seeds(num: int) -> str:
    """What bands and whiskers are, for a legend's title."""
    return f"mean and 95 % interval, n = {num} seeds"


def legend_above(figure: Figure, axes: np.ndarray, title: str | None = None) -> None:
    """One legend for all panels, with every label once, in as many columns as fit."""
    found: dict[str, object] = {}
    for ax in axes.flat:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    handles, labels = list(found.values()), list(found)
    longest = 0.45 + 0.06 * max(len(label) for label in labels)  # inches
    columns = max(1, min(len(labels), int(figure.get_figwidth() / longest)))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, title=title, title_fontsize=7)
