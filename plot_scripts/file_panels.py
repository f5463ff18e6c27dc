"""The kinds of panels that are drawn from a file: a CSV or JSON table that a command wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from engine.stats import cluster_mean, share_interval
from plot_scripts.aggregate import LEVEL
from plot_scripts.canvas import INK, PALE, Look
from plot_scripts.panels import Drawn, Panel, draw_lines, finish_axes
from utils import UserError, did_you_mean


def draw_xy(ax: Axes, panel: Panel, table: pd.DataFrame, methods: Mapping[str, Look]) -> Drawn:
    """Lines through the rows, one per value of ``series``; ``low`` and ``high``: a band, or bars on an axis of categories."""
    drawn = Drawn()
    table = _rows(panel, table, [panel.x, panel.y, panel.low, panel.high, panel.count])
    categories = sorted(table[panel.x].unique()) if panel.xscale == "category" else []
    for number, (name, part) in enumerate(_series(panel, table)):
        part, look = part.sort_values(panel.x, kind="stable"), methods[name]
        y, low, high = (
            part[c].to_numpy(np.float64) if c else np.full(len(part), np.nan)
            for c in (panel.y, panel.low, panel.high)
        )
        style = {"color": look.colour, "linestyle": look.dash, "marker": look.marker}
        if categories:
            x = np.array([categories.index(v) for v in part[panel.x]], np.float64)
            # beside each other, or the bars of two methods hide one another
            ax.errorbar(x + 0.06 * number, y, [y - low, high - y], **style)
        else:
            x = part[panel.x].to_numpy(np.float64)
            ax.plot(x, y, **style)
            ax.fill_between(x, low, high, color=look.colour, alpha=0.16, linewidth=0)
        drawn.saw(name, int(part[panel.count].max()) if panel.count else 0)
        drawn.intervals |= {"file"} if panel.low and panel.high else set()
        for row in zip(part[panel.x], y, low, high, strict=True):
            drawn.add(panel.title, "mean", name, "", **dict(zip(("x", "y", "low", "high"), row, strict=True)))
    if categories:
        ax.set_xticks(range(len(categories)), [_category(c) for c in categories])
    ax.set_xlabel(panel.xlabel or panel.x)
    draw_lines(ax, panel, {})
    finish_axes(ax, panel)
    return drawn


def _category(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "\N{INFINITY}" if np.isinf(value) else f"{value:g}"


def draw_binned(ax: Axes, panel: Panel, table: pd.DataFrame, methods: Mapping[str, Look]) -> Drawn:
    """Mean of y against mean of x in equally full bins of x, with t intervals over the values of ``cluster``."""
    drawn = Drawn()
    table = _rows(panel, table, [panel.x, panel.y, panel.cluster]).dropna(subset=[panel.x, panel.y])
    if table.empty:
        raise UserError(f"data: no row has both {panel.x} and {panel.y}")
    for name, part in _series(panel, table):
        part, look = part.sort_values(panel.x, kind="stable"), methods[name]
        bins = np.array_split(np.arange(len(part)), min(panel.bins or 8, len(part)))
        found = [
            cluster_mean(b[panel.y].to_numpy(), b[panel.cluster].to_numpy() if panel.cluster else None, LEVEL)
            for b in (part.iloc[index] for index in bins)
        ]
        x = [float(part[panel.x].iloc[index].mean()) for index in bins]
        y, low, high = (np.array([getattr(f, k) for f in found]) for k in ("estimate", "low", "high"))
        ax.errorbar(
            x,
            y,
            [y - low, high - y],
            color=look.colour,
            linestyle=look.dash,
            marker=look.marker,
            linewidth=0.9,
        )
        drawn.saw(name, len(part))
        drawn.intervals.add("binned")
        for a, f, index in zip(x, found, bins, strict=True):
            band = {"low": f.low, "high": f.high}
            drawn.add(panel.title, "bin", name, "", x=a, y=f.estimate, n=len(index), **band)
    ax.set_xlabel(panel.xlabel or panel.x)
    draw_lines(ax, panel, {})
    finish_axes(ax, panel)
    return drawn


def draw_reliability(ax: Axes, panel: Panel, table: pd.DataFrame, methods: Mapping[str, Look]) -> Drawn:
    """Observed frequency against mean predicted probability in ten equally wide bins, with 95 % intervals, one
    ``cluster``'s rows together where the file has that column.

    The expected calibration error (mean of |observed - predicted| weighted by the bins' sizes) goes into the panel's corner.
    """
    drawn = Drawn()
    table = _rows(panel, table, [panel.x, panel.y])
    ax.plot([0, 1], [0, 1], color=PALE, linewidth=0.8, linestyle=(0, (2, 2)))
    notes = []
    for name, part in _series(panel, table):
        p, outcome = part[panel.x].to_numpy(np.float64), part[panel.y].to_numpy(np.float64)
        if not ((p >= 0) & (p <= 1) & (outcome >= 0) & (outcome <= 1)).all():
            raise UserError(
                f"{panel.x}, {panel.y}: predictions and outcomes must be probabilities between 0 and 1"
            )
        index = np.minimum((p * 10).astype(int), 9)
        n = np.bincount(index, minlength=10).astype(np.float64)
        some = n > 0
        predicted, observed = (
            np.bincount(index, weights=v, minlength=10)[some] / n[some] for v in (p, outcome)
        )
        clusters = part[panel.cluster].to_numpy() if panel.cluster in part else np.arange(len(part))
        found = [share_interval(outcome[index == b], clusters[index == b]) for b in np.flatnonzero(some)]
        low, high = (np.array([getattr(f, end) for f in found]) for end in ("low", "high"))
        look = methods[name]
        ax.errorbar(
            predicted,
            observed,
            [observed - low, high - observed],
            color=look.colour,
            marker=look.marker,
            linewidth=0.9,
        )
        error = float((np.abs(observed - predicted) * n[some]).sum() / n.sum())
        notes.append(f"{name}: ECE {error:.3f}" if name else f"ECE {error:.3f}")
        drawn.facts[name or "all"] = {"ece": error, "n": int(n.sum())}
        drawn.saw(name, int(n.sum()))
        drawn.intervals.add("bin")
        for row in zip(predicted, observed, low, high, n[some], strict=True):
            drawn.add(
                panel.title, "bin", name, "", **dict(zip(("x", "y", "low", "high", "n"), row, strict=True))
            )
    ax.text(
        0.97, 0.04, "\n".join(notes), ha="right", va="bottom", fontsize=6.5, color=INK, transform=ax.transAxes
    )
    ax.set(
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        xlabel=panel.xlabel or "predicted",
        ylabel=panel.ylabel or "observed",
    )
    return drawn


def series_names(panel: Panel, table: pd.DataFrame) -> list[str]:
    return [name for name, _ in _series(panel, _rows(panel, table, []))]


def _series(panel: Panel, table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    if not panel.series:
        return [("", table)]
    return [(str(name), part) for name, part in table.groupby(panel.series, sort=False)]


def _rows(panel: Panel, table: pd.DataFrame, needed: Sequence[str]) -> pd.DataFrame:
    """The rows that ``where`` asks for. Raises UserError for a column or a value that the file lacks."""
    known = list(table.columns)
    for name in [*needed, panel.series, *panel.where]:
        if name and name not in known:
            raise UserError(
                f"data: no column {name!r}{did_you_mean(name, known)}; columns: {', '.join(known)}"
            )
    for name, value in panel.where.items():
        if not (table[name] == value).any():
            values = ", ".join(map(str, table[name].unique()))
            raise UserError(f"data: no row with {name}={value}; there are {values}")
        table = table[table[name] == value]
    return table


FILE_KINDS: dict[str, Callable[..., Drawn]] = {
    "xy": draw_xy,
    "binned": draw_binned,
    "reliability": draw_reliability,
}
