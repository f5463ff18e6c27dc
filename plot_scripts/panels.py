"""The kinds of panels a figure is made of. Each draws on one axes and says what it drew."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from plot_scripts.aggregate import Bar, Curve, absent_warning, bar, collect, curve, ends_warning
from plot_scripts.canvas import INK, PALE, WARN, Look
from plot_scripts.load import Loaded

DOTTED = (0, (1, 1.5))  # reference lines
MOST_BANDS = 4  # curves of a panel that are drawn with bands; more get their last interval only
SHORT = {"": "all", "worst_group": "worst", "mean_group": "mean"}


@dataclass(frozen=True)
class Panel:
    """One panel as a figure's YAML describes it.

    kind      curves (metric against examples) | bars (first, last or mean value) | path (metric against x_metric as training goes)
              | xy (columns of a table) | binned (means of y in ``bins`` equally full bins of x) | reliability (predicted against
              observed probability); these three read a CSV, JSON or JSONL file
    split     comma-separated: the first in which the metric was logged
    group     "" (all examples) | worst_group | mean_group | group_<name> | * (each group: a colour each, or a panel each where
              there are several methods); bars take a comma-separated list
    bins      curves: average over so many equal stretches of examples (for what is logged every step)
    methods   only these; default: all
    lines     dotted reference lines, named in the legend: {label: value} or {label: {group name: value}}
    moving    curves: leave out methods for which the metric never changes (the weights of an unweighted run)
    optional  leave the panel out when no run logged the metric
    xscale    linear | log | category (xy: the values of x, equally spaced in their order)
    x, y, series, low, high   column names; low, high: xy; reliability: x is the prediction, y the outcome; series: the method
    count     xy: column of what a row rests on, for the legend's n
    where     {column: value}: only such rows of the file
    cluster   binned, reliability: column of what several rows may share (a prompt); intervals rest on it
    """

    kind: Literal["curves", "bars", "path", "xy", "binned", "reliability"]
    title: str = ""
    metric: str = ""
    x_metric: str = ""
    split: str = "eval,test"
    group: str = ""
    at: Literal["first", "last", "mean"] = "last"
    bins: int | None = None
    xlabel: str = ""
    ylabel: str = ""
    ylim: list[float | None] | None = None
    yscale: Literal["linear", "log"] = "linear"
    xscale: Literal["linear", "log", "category"] = "linear"
    methods: list[str] = field(default_factory=list)
    lines: dict[str, Any] = field(default_factory=dict)
    moving: bool = False
    optional: bool = False
    x: str = ""
    y: str = ""
    series: str = ""
    low: str = ""
    high: str = ""
    count: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    cluster: str = ""

    def shows(self, method: str) -> bool:
        return not self.methods or method in self.methods


@dataclass
class Drawn:
    """What a panel drew: rows for the CSV, who is in it, and what has to be said."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    methods: dict[str, int] = field(default_factory=dict)  # method -> n
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    intervals: set[str] = field(default_factory=set)
    bounds: list[float] = field(default_factory=list)  # ends of the intervals that were drawn

    def add(self, panel: str, kind: str, method: str, group: str, **values: Any) -> None:
        row = {"panel": panel, "kind": kind, "method": method, "group": group, **values}
        self.rows.append({k: v for k, v in row.items() if v is not None})

    def saw(self, method: str, n: int) -> None:
        self.methods[method] = max(n, self.methods.get(method, 0))


def group_label(group: str) -> str:
    return SHORT.get(group, group.removeprefix("group_"))


def thousands(value: float, _: object = None) -> str:
    """12000 -> 12k."""
    for size, mark in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{mark}"
    return f"{value:g}"


# ---------------------------------------------------------------------------------------------- metric against examples


def draw_curves(
    ax: Axes,
    panel: Panel,
    loaded: Loaded,
    methods: Mapping[str, Look],
    groups: Mapping[str, Look],
    carry: bool,
) -> Drawn:
    drawn = Drawn()
    split = loaded.first_split(panel.split, panel.metric, panel.group)
    names = loaded.groups(split, panel.metric) if panel.group == "*" else [panel.group]
    chosen = [m for m in methods if draws(panel, loaded, m, split, names)]
    ends = {
        m: {
            info.run: float(x[-1])
            for g in names
            for info, x, _ in collect(loaded, m, split, panel.metric, g, panel.bins)
        }
        for m in chosen
    }
    until = max((x for runs in ends.values() for x in runs.values()), default=None)
    curves = [
        c
        for m in chosen
        for g in names
        if (c := curve(loaded, m, split, panel.metric, g, panel.bins, carry, until)) is not None
    ]
    for number, c in enumerate(curves):
        colour = groups[c.group].colour if panel.group == "*" else methods[c.method].colour
        _draw_curve(ax, c, colour, methods[c.method].dash)
        at = np.flatnonzero(np.isfinite(c.low) & np.isfinite(c.high))
        if len(curves) <= MOST_BANDS:
            _draw_band(ax, c, colour)
        else:
            at = at[-1:]
            _draw_last_interval(ax, c, colour, number + 1)
        drawn.bounds += [*c.low[at], *c.high[at]]
        drawn.saw(c.method, len(c.seeds))
        drawn.intervals.add(c.interval)
        for i, x in enumerate(c.x):
            band = {"low": c.low[i], "high": c.high[i]}
            drawn.add(panel.title, "mean", c.method, c.group, x=x, y=c.mean[i], n=int(c.n[i]), **band)
        for run, seed, xs, ys in c.seeds:
            for x, y in zip(xs, ys, strict=True):
                drawn.add(panel.title, "run", c.method, c.group, run=run, seed=seed, x=x, y=y)
    how = "carried on at their last value (marked x)" if carry else "their lines end there (marked |)"
    drawn.warnings += ends_warning(ends, how)
    drawn.warnings += absent_warning(loaded, drawn.methods, f"{split}/{panel.metric}")
    drawn.facts = {
        "split": split,
        "curves": [
            {"method": c.method, "group": c.group, "n": len(c.seeds), "interval": c.interval}
            | {"ends_early": dict(c.ends), "carried": c.carried, "runs": [r for r, *_ in c.seeds]}
            for c in curves
        ],
    }
    draw_lines(ax, panel, groups)
    finish_axes(
        ax, panel, [y for c in curves for *_, y in c.seeds], [b for c in curves for b in (c.low, c.high)]
    )
    ax.xaxis.set_major_formatter(FuncFormatter(thousands))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.set_xlabel(panel.xlabel or "examples")
    return drawn


def draws(panel: Panel, loaded: Loaded, method: str, split: str, groups: Sequence[str]) -> bool:
    """Whether a panel of curves shows the method."""
    if not panel.shows(method):
        return False
    if panel.moving:
        return moves(loaded, method, split, panel.metric, groups)
    return any(collect(loaded, method, split, panel.metric, g) for g in groups)


def moves(loaded: Loaded, method: str, split: str, metric: str, groups: Sequence[str]) -> bool:
    """Whether any run of the method logged two different values."""
    runs = [y for g in groups for _, _, y in collect(loaded, method, split, metric, g)]
    return any(np.ptp(y) > 0 for y in runs)


def _draw_curve(ax: Axes, c: Curve, colour: str, dash: Any) -> None:
    few = len(c.x) <= 12
    ax.plot(c.x, c.mean, color=colour, linestyle=dash, marker="o" if few else None, markersize=2.2)
    for _, x in c.ends:
        ax.plot(
            [x],
            [np.interp(x, c.x, c.mean)],
            color=colour,
            marker="x" if c.carried else "|",
            markersize=6,
            mew=1.2,
        )


def _draw_band(ax: Axes, c: Curve, colour: str) -> None:
    band = np.isfinite(c.low) & np.isfinite(c.high)
    if band.any():
        ax.fill_between(c.x, c.low, c.high, where=band, color=colour, alpha=0.16, linewidth=0)


def _draw_last_interval(ax: Axes, c: Curve, colour: str, shift: int) -> None:
    """The last interval as a bar beside the curve's end: many bands over each other cannot be read."""
    at = np.flatnonzero(np.isfinite(c.low) & np.isfinite(c.high))
    if len(at):
        x = c.x[at[-1]] + shift * 0.01 * (c.x[-1] - c.x[0])
        ax.plot([x, x], [c.low[at[-1]], c.high[at[-1]]], color=colour, linewidth=1.0, alpha=0.9)


def draw_path(
    ax: Axes,
    panel: Panel,
    loaded: Loaded,
    methods: Mapping[str, Look],
    groups: Mapping[str, Look],
    carry: bool,
) -> Drawn:
    """Mean of one metric against the mean of another; hollow mark: first evaluation, full mark: last."""
    drawn = Drawn()
    split = loaded.first_split(panel.split, panel.metric, panel.group)
    for method, look in methods.items():
        if not panel.shows(method):
            continue
        xs, ys = (
            curve(loaded, method, split, m, panel.group, panel.bins, carry)
            for m in (panel.x_metric, panel.metric)
        )
        if xs is None or ys is None:
            continue
        at = np.intersect1d(xs.x, ys.x)
        x, y = (c.mean[np.isin(c.x, at)] for c in (xs, ys))
        ax.plot(x, y, color=look.colour, linestyle=look.dash)
        ax.plot(
            x[:1], y[:1], color=look.colour, marker=look.marker, mfc="white", markersize=5, linestyle="none"
        )
        ax.plot(x[-1:], y[-1:], color=look.colour, marker=look.marker, markersize=5, linestyle="none")
        drawn.saw(method, len(ys.seeds))
        for a, b, n in zip(x, y, ys.n[np.isin(ys.x, at)], strict=True):
            drawn.add(panel.title, "mean", method, panel.group, x=a, y=b, n=int(n))
    drawn.facts = {"split": split}
    drawn.intervals.add("path")
    ax.margins(0.06)
    ax.set_xlabel(panel.xlabel or panel.x_metric)
    draw_lines(ax, panel, groups)
    finish_axes(ax, panel)
    return drawn


# ---------------------------------------------------------------------------------------------- bars


def draw_bars(
    ax: Axes,
    panel: Panel,
    loaded: Loaded,
    methods: Mapping[str, Look],
    groups: Mapping[str, Look],
    carry: bool,
) -> Drawn:
    drawn = Drawn()
    wanted = [g.strip() for g in panel.group.split(",")]
    split = loaded.first_split(panel.split, panel.metric, "*" if "*" in wanted else wanted[0])
    slots = [g for w in wanted for g in (loaded.groups(split, panel.metric) if w == "*" else [w])]
    shown = [m for m in methods if panel.shows(m)]
    bars = {(m, g): bar(loaded, m, split, panel.metric, g, panel.at) for m in shown for g in slots}
    slots = [g for g in slots if any(bars[m, g] for m in shown)]
    present = [m for m in shown if any(bars[m, g] for g in slots)]
    width = 0.8 / max(len(present), 1)
    for i, method in enumerate(present):
        for j, group in enumerate(slots):
            b = bars[method, group]
            if b is not None:
                _draw_bar(ax, b, j - 0.4 + (i + 0.5) * width, width, methods[method])
                drawn.saw(method, b.n)
                drawn.intervals.add(b.interval)
                drawn.bounds += [b.low, b.high]
                drawn.add(panel.title, "bar", method, group, x=j, y=b.mean, low=b.low, high=b.high, n=b.n)
                for run, seed, x, y in b.seeds:
                    drawn.add(panel.title, "run", method, group, run=run, seed=seed, x=x, y=y)
    drawn.warnings += absent_warning(loaded, drawn.methods, f"{split}/{panel.metric}")
    _label_bars(ax, [group_label(g) for g in slots])
    ax.grid(visible=False, axis="x")
    ax.set_xlim(-0.55, len(slots) - 0.45)
    if panel.at == "last":
        ends = {
            m: {run: x for (n, _), b in bars.items() if b and n == m for run, _, x, _ in b.seeds}
            for m in present
        }
        drawn.warnings += ends_warning(ends, "the bars show their last evaluations")
    drawn.facts = {"split": split, "at": panel.at, "groups": slots}
    for value in panel.lines.values():
        _bar_reference(ax, value, slots)
    drawn_bars = [b for b in bars.values() if b is not None]
    finish_axes(ax, panel, [[b.mean] for b in drawn_bars] + [[0.0]], [[b.low, b.high] for b in drawn_bars])
    return drawn


def _label_bars(ax: Axes, labels: Sequence[str]) -> None:
    """Names under the bars: in one line where they fit, else slanted, or upright where they are long."""
    slot = (room(ax) - 0.8) / max(len(labels), 1)  # inches
    longest = max(map(len, labels), default=0)
    slant = 0 if 0.07 * longest + 0.05 <= slot else 30 if longest <= 8 else 90
    wrapped = [textwrap.fill(label, 18) for label in labels] if slant == 90 else labels
    ax.set_xticks(range(len(labels)), wrapped, rotation=slant, ha="right" if slant == 30 else "center")


def room(ax: Axes) -> float:
    """Inches of the figure's width that are the panel's."""
    return ax.get_figure().get_size_inches()[0] / ax.get_subplotspec().get_gridspec().ncols


def _draw_bar(ax: Axes, b: Bar, x: float, width: float, look: Look) -> None:
    ax.bar(
        x,
        b.mean,
        width * 0.9,
        color=look.colour,
        alpha=0.75,
        linewidth=0,
        hatch=look.hatch,
        edgecolor="white",
    )
    if np.isfinite(b.low):
        ax.plot([x, x], [b.low, b.high], color=INK, linewidth=1.0)
    if len(b.seeds) > 1:
        spread = np.linspace(-0.25, 0.25, len(b.seeds)) * width
        ax.plot(x + spread, [y for *_, y in b.seeds], "o", color="white", mec=INK, mew=0.5, markersize=2.4)


def _bar_reference(ax: Axes, value: Any, slots: Sequence[str]) -> None:
    values = value if isinstance(value, Mapping) else {group_label(g): value for g in slots}
    for j, group in enumerate(slots):
        if (y := values.get(group_label(group))) is not None:
            ax.plot([j - 0.46, j + 0.46], [y, y], color="black", linewidth=1.1, linestyle=DOTTED)


# ---------------------------------------------------------------------------------------------- axes


def draw_lines(ax: Axes, panel: Panel, groups: Mapping[str, Look]) -> None:
    for value in panel.lines.values():
        each = value if isinstance(value, Mapping) else {"": value}
        for name, y in each.items():
            look = groups.get(f"group_{name}")
            ax.axhline(y, color=look.colour if look else PALE, linewidth=0.9, linestyle=DOTTED, zorder=1)


def finish_axes(ax: Axes, panel: Panel, values: Sequence = (), bands: Sequence = ()) -> None:
    """Title, labels, scales, and limits from the data. A band may widen them by the data's own range at most: two seeds have bands 12.7 stderr wide."""
    for axis, scale in (("x", panel.xscale), ("y", panel.yscale)):
        if scale == "log":
            ax.set(**{f"{axis}scale": scale})
    ax.set_ylabel(panel.ylabel)
    ax.set_title(textwrap.fill(panel.title, int((room(ax) - 0.5) / 0.075)))
    flat = np.concatenate([np.asarray(v, np.float64).ravel() for v in values]) if values else np.empty(0)
    flat = flat[np.isfinite(flat)]
    if len(flat) and panel.yscale == "linear":
        references = [
            y for v in panel.lines.values() for y in (v.values() if isinstance(v, Mapping) else [v])
        ]
        low, high = min([flat.min(), *references]), max([flat.max(), *references])
        spread = (high - low) or max(abs(high), 1e-12)
        edges = np.concatenate([np.asarray(b, np.float64).ravel() for b in bands]) if bands else np.empty(0)
        edges = edges[np.isfinite(edges)]
        if len(edges):
            low, high = max(min(low, edges.min()), low - spread), min(max(high, edges.max()), high + spread)
        pad = 0.05 * (high - low or spread)
        is_bars = panel.kind == "bars"
        ax.set_ylim(0.0 if is_bars and low >= 0 else low - pad, 0.0 if is_bars and high <= 0 else high + pad)
    if panel.ylim is not None:
        ax.set_ylim(*panel.ylim)
        bottom = ax.get_ylim()[0]
        if panel.kind == "bars" and bottom > 0:
            ax.text(0.01, 0.01, f"axis starts at {bottom:g}", transform=ax.transAxes, fontsize=6, color=WARN)


RUN_KINDS: dict[str, Callable[..., Drawn]] = {"curves": draw_curves, "bars": draw_bars, "path": draw_path}
