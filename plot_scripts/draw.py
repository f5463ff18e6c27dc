"""A figure's description -> the files: panels on a sheet, legends, what a reader must be warned about, and provenance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import figure as mpl_figure
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from config.build import build
from plot_scripts import canvas
from plot_scripts.aggregate import LEVEL, differences_between, listing, warnings_about
from plot_scripts.file_panels import FILE_KINDS, series_names
from plot_scripts.load import Loaded, RunInfo, read_yaml
from plot_scripts.panels import DOTTED, RUN_KINDS, Drawn, Panel, draws, group_label, moves
from utils import UserError, did_you_mean

FIGURES = Path(__file__).resolve().parent / "figures"
# Tol's muted palette: told apart from the methods' colours, and from each other by colour-blind readers
GROUP_COLOURS = (
    "#332288",
    "#CC6677",
    "#117733",
    "#DDCC77",
    "#88CCEE",
    "#882255",
    "#44AA99",
    "#999933",
    "#AA4499",
)
CAPTIONS = {
    "path": "hollow mark: first evaluation, full mark: last",
    "seeds": "n: seeds; mean and 95 % t interval over seeds",
    "run": "n = 1: 95 % interval over the examples of the one run",
    "bin": "n: rows; bars: 95 % intervals of ten bins",
    "file": "bars and bands: 95 % intervals as recorded",
    "binned": "n: rows, in equally full bins; bars: 95 % t intervals",
}
SPLITS = {"eval": "validation split", "test": "test split"}


@dataclass(frozen=True)
class Figure:
    """A figure as its YAML describes it."""

    panels: list[Panel]
    title: str = ""
    columns: int = 3
    width: float | None = None  # inches; null: one or two columns of a paper
    carry: bool = False  # draw stopped runs on at their last value, marked


@dataclass(frozen=True)
class Sheet:
    """A drawn figure, not yet on disk."""

    figure: mpl_figure.Figure
    rows: list[dict[str, Any]]
    provenance: dict[str, Any]


def read_figure(name: str) -> tuple[str, Figure]:
    """(name, Figure) of plot_scripts/figures/<name>.yaml or of a YAML file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FIGURES / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in FIGURES.glob("*.yaml"))
        raise UserError(
            f"figure={name}: there is no {path}{did_you_mean(name, known)}; known: {', '.join(known)}"
        )
    return path.stem, build(Figure, read_yaml(path), "")


def draw_figure(
    figure: Figure,
    name: str,
    out: Path,
    loaded: Loaded | None,
    data: pd.DataFrame | None = None,
    data_file: str = "",
) -> list[Path]:
    """Draw and write <out>/<name>.{pdf,png,csv,json}; see ``compose``."""
    with canvas.styled():
        sheet = compose(figure, loaded, data)
        rows = [{"figure": name, **row} for row in sheet.rows]
        return canvas.save(sheet.figure, Path(out), name, rows, {**sheet.provenance, "data": data_file})


def compose(figure: Figure, loaded: Loaded | None, data: pd.DataFrame | None = None) -> Sheet:
    """Draw the figure from runs or from a table. Call it inside ``canvas.styled()``.

    Raises UserError where a panel that is not optional has nothing to draw.
    """
    facets = [facet for panel in drawable(figure, loaded) for facet in by_group(panel, loaded)]
    if not facets:
        raise UserError("none of the figure's panels has anything to draw in these runs")
    panels = [panel for panel, _ in facets]
    methods = canvas.looks(_methods(panels, loaded, data))
    groups = _group_looks(panels, loaded)
    sheet, axes = canvas.new_figure(len(panels), figure.columns, figure.width)
    drawn: list[Drawn] = []
    for ax, panel in zip(axes, panels, strict=True):
        if panel.kind in RUN_KINDS:
            drawn.append(RUN_KINDS[panel.kind](ax, panel, loaded, methods, groups, figure.carry))
        else:
            drawn.append(FILE_KINDS[panel.kind](ax, panel, data, methods))
    for source in {id(source) for _, source in facets}:
        _share_limits([ax for ax, (_, s) in zip(axes, facets, strict=True) if id(s) == source])
    for ax, panel, d in zip(axes, panels, drawn, strict=True):
        bottom, top = ax.get_ylim()
        if any(not bottom <= end <= top for end in d.bounds if math.isfinite(end)):
            d.warnings.append(f"{panel.title or panel.metric}: some intervals go on beyond the axis")
    counts = {
        m: max(d.methods[m] for d in drawn if m in d.methods)
        for m in methods
        if any(m in d.methods for d in drawn)
    }
    warnings = (warnings_about(loaded, list(counts)) if loaded else []) + [
        w for d in drawn for w in d.warnings
    ]
    warnings = list(dict.fromkeys(warnings))
    legends = [
        (_heading(panels), _method_handles(counts, methods, all(p.kind == "bars" for p in panels))),
        ("group", _group_handles(groups)),
        ("dotted", _line_handles(panels)),
    ]
    caption = "; ".join(CAPTIONS[k] for k in CAPTIONS if any(k in d.intervals for d in drawn))
    differing = differences_between(loaded, list(counts)) if loaded else []
    if differing:
        caption = f"{caption}\nthe methods also differ in {listing(differing)}".lstrip()
    splits = dict.fromkeys(SPLITS[d.facts["split"]] for d in drawn if d.facts.get("split") in SPLITS)
    if splits:
        caption = "; ".join([f"held-out: {', '.join(splits)}"] + [caption] * bool(caption))
    canvas.finish(sheet, [(h, handles) for h, handles in legends if handles], figure.title, warnings, caption)
    described = [
        {"title": p.title, "kind": p.kind, "metric": p.metric, "group": p.group, **d.facts}
        for p, d in zip(panels, drawn, strict=True)
    ]
    provenance = {
        "title": figure.title,
        "n": counts,
        "level": LEVEL,
        "carry": figure.carry,
        "panels": described,
        "methods_also_differ_in": differing,
        "runs": [_run_facts(i) for i in (loaded.runs if loaded else ()) if i.method in counts],
        "warnings": warnings,
    }
    return Sheet(sheet, [row for d in drawn for row in d.rows], provenance)


def drawable(figure: Figure, loaded: Loaded | None) -> list[Panel]:
    """The panels that have something to draw. Raises UserError for one that has not and is not optional."""
    kept = []
    for panel in figure.panels:
        if panel.kind in FILE_KINDS:
            kept.append(panel)
            continue
        if loaded is None:
            raise UserError("this figure is drawn from runs: give runs=DIR, or entity= and project=")
        if _logged(panel, loaded):
            kept.append(panel)
        elif not panel.optional:
            known = sorted({f"{s}/{m}" for _, s, m, _ in loaded.series if "/ci_" not in m})
            wanted = f"{panel.split.split(',')[0]}/{panel.metric}"
            raise UserError(
                f"no run logged {panel.metric} of {panel.split} for {group_label(panel.group)!r}"
                f"{did_you_mean(wanted, known)}; logged: {', '.join(known)}"
            )
    return kept


def by_group(panel: Panel, loaded: Loaded | None) -> list[tuple[Panel, Panel]]:
    """(panel to draw, the figure's panel that it is of): one for each group where several methods would cross in one panel."""
    if loaded is None or panel.kind != "curves" or panel.group != "*":
        return [(panel, panel)]
    split = loaded.first_split(panel.split, panel.metric, "*")
    groups = loaded.groups(split, panel.metric)
    if sum(draws(panel, loaded, method, split, groups) for method in loaded.methods) < 2:
        return [(panel, panel)]
    title = panel.title.removesuffix(" by group")
    found = []
    for group in groups:
        name = group_label(group)
        lines = {
            label: value[name] if isinstance(value, Mapping) else value
            for label, value in panel.lines.items()
            if not isinstance(value, Mapping) or name in value
        }
        heading = f"{title}: {name}" if title else name
        found.append((replace(panel, group=group, title=heading, lines=lines), panel))
    return found


def _share_limits(axes: Sequence[Axes]) -> None:
    ends = [ax.get_ylim() for ax in axes]
    for ax in axes:
        ax.set_ylim(min(low for low, _ in ends), max(high for _, high in ends))


def _logged(panel: Panel, loaded: Loaded) -> bool:
    """Whether some run logged each of the panel's metrics for one of its groups in one of its splits (and it moves)."""

    def found(metric: str, split: str, group: str) -> bool:
        names = loaded.groups(split, metric) if group == "*" else [group]
        if panel.moving:
            return any(moves(loaded, method, split, metric, names) for method in loaded.methods)
        return any(loaded.has(split, metric, name) for name in names)

    groups, splits = ([part.strip() for part in text.split(",")] for text in (panel.group, panel.split))
    metrics = [m for m in (panel.metric, panel.x_metric) if m]
    return all(any(found(m, s, g) for g in groups for s in splits) for m in metrics)


def _methods(panels: Sequence[Panel], loaded: Loaded | None, data: pd.DataFrame | None) -> list[str]:
    names = list(loaded.methods) if loaded else []
    for panel in panels:
        if panel.kind in FILE_KINDS:
            if data is None:
                raise UserError("this figure is drawn from a file: give data=FILE.csv")
            names += series_names(panel, data)
    return list(dict.fromkeys(names))


def _group_looks(panels: Sequence[Panel], loaded: Loaded | None) -> dict[str, canvas.Look]:
    """Colours of the groups that some panel draws as one curve each."""
    names: dict[str, None] = {}
    for panel in panels:
        if loaded is not None and panel.kind == "curves" and panel.group == "*":
            split = loaded.first_split(panel.split, panel.metric, "*")
            names.update(dict.fromkeys(loaded.groups(split, panel.metric)))
    n = len(GROUP_COLOURS)
    return {g: canvas.Look(GROUP_COLOURS[i % n], "-", canvas.MARKERS[i % 7]) for i, g in enumerate(names)}


def _heading(panels: Sequence[Panel]) -> str:
    """What the legend's names are: methods, or the values of the column that a file's panels are split by."""
    columns = {panel.series if panel.kind in FILE_KINDS else "" for panel in panels}
    column = (columns.pop() or "method") if len(columns) == 1 else "method"
    return {"by": "referee"}.get(column, column)


def _method_handles(
    counts: Mapping[str, int], methods: Mapping[str, canvas.Look], bars: bool
) -> list[Artist]:
    handles: list[Artist] = []
    for method, n in counts.items():
        look, label = methods[method], f"{method} (n = {n:,})" if n else method
        if label and bars:
            style = {
                "facecolor": look.colour,
                "edgecolor": "white",
                "alpha": 0.75,
                "linewidth": 0,
                "hatch": look.hatch,
            }
            handles.append(Patch(label=label, **style))
        elif label:
            handles.append(Line2D([], [], color=look.colour, linestyle=look.dash, label=label))
    return handles


def _group_handles(groups: Mapping[str, canvas.Look]) -> list[Artist]:
    return [
        Line2D([], [], color=look.colour, linewidth=3, label=group_label(g)) for g, look in groups.items()
    ]


def _line_handles(panels: Sequence[Panel]) -> list[Artist]:
    labels = dict.fromkeys(label for panel in panels for label in panel.lines)
    return [Line2D([], [], color=canvas.INK, linewidth=1.1, linestyle=DOTTED, label=x) for x in labels]


def _run_facts(info: RunInfo) -> dict[str, Any]:
    names = (
        "run",
        "source",
        "method",
        "seed",
        "config_hash",
        "config_hash_no_seed",
        "commits",
        "dirty",
        "finished",
    )
    return {name: getattr(info, name) for name in names}
