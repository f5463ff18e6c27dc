"""What every figure shares: the style, colours that colour-blind readers tell apart, and byte-identical files."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context

from utils import make_folder

STYLE = Path(__file__).resolve().parent / "style" / "paper.mplstyle"
# Okabe and Ito (2008) without yellow, which is too pale for lines on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.3)), (0, (5, 1.4, 1.2, 1.4)), (0, (8, 2)))
HATCHES = ("", "////", "....", "xxxx")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, PALE, WARN = "#333333", "#888888", "#9a3b00"
WIDTHS = {1: 3.4, 2: 6.75}  # inches: one column, and two or more columns of panels
PANEL_HEIGHT = 1.75
LEAST = 0.95  # inches of a panel inside its axes
HEADING = 0.5  # inches left of a legend for its heading
DRAWN = ["figure", "panel", "kind", "method", "group", "run", "seed", "x", "y", "low", "high", "n"]


@dataclass(frozen=True)
class Look:
    colour: str
    dash: Any
    marker: str
    hatch: str = ""  # of bars


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A colour, dash, marker and hatch per name, by position: the first 7 differ in colour, the first 35 lines and the first 28
    bars differ in something."""
    n = len(COLOURS)
    return {
        name: Look(
            COLOURS[i % n], DASHES[(i + i // n) % len(DASHES)], MARKERS[i % n], HATCHES[i // n % len(HATCHES)]
        )
        for i, name in enumerate(names)
    }


def styled():
    """Context in which figures have to be made and saved (matplotlib reads its style at both moments)."""
    return context(["default", STYLE])


def new_figure(num_panels: int, columns: int, width: float | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with ``num_panels`` axes in rows of at most ``columns``, laid out by ``finish``. ``width`` in inches."""
    columns = max(1, min(columns, num_panels))
    rows = math.ceil(num_panels / columns)
    if width is None:
        width = WIDTHS[min(columns, 2)] if columns < 4 else 2.3 * columns
    figure = Figure(figsize=(width, PANEL_HEIGHT * rows))
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for spare in grid[num_panels:]:
        spare.set_axis_off()
    return figure, list(grid[:num_panels])


def finish(
    figure: Figure,
    legends: Sequence[tuple[str, Sequence[Artist]]],
    title: str,
    warnings: Sequence[str],
    caption: str = "",
) -> None:
    """Legends above the panels, caption and warnings below; the figure grows by what they take.

    legends  (heading, handles) each; labels come from the handles
    """
    width, height = figure.get_size_inches()
    height += _missing_height(figure)
    shapes = [_legend_shape(handles, width - HEADING) for _, handles in legends]
    wrapped = [textwrap.wrap(f"! {w}", int(width * 19), subsequent_indent="  ") for w in warnings]
    text = "\n".join(line for lines in wrapped for line in lines)
    above = 0.22 * bool(title) + sum(0.15 * lines + 0.06 for _, lines in shapes)
    below_caption = 0.12 * sum(map(len, wrapped)) + 0.16 * bool(warnings)
    said = [line for part in caption.splitlines() for line in textwrap.wrap(part, int(width * 19))]
    below = below_caption + 0.12 * len(said) + 0.02 * bool(said)
    total = height + above + below
    figure.set_size_inches(width, total)

    y = total  # inches from the bottom, going down
    if title:
        figure.text(
            0.07 / width, (y - 0.03) / total, title, va="top", fontsize=9.5, fontweight="bold", color=INK
        )
        y -= 0.22
    for (heading, handles), (columns, lines) in zip(legends, shapes, strict=True):
        place = (HEADING / width, y / total)
        box = figure.legend(
            handles=list(handles), loc="upper left", bbox_to_anchor=place, ncols=columns, columnspacing=1.4
        )
        box.set_in_layout(False)
        figure.text(0.07 / width, (y - 0.065) / total, heading, va="top", fontsize=7, color=PALE)
        y -= 0.15 * lines + 0.06
    if caption:
        figure.text(
            0.07 / width,
            (below_caption + 0.02) / total,
            "\n".join(said),
            va="bottom",
            fontsize=6.3,
            color=PALE,
        )
    if warnings:
        frame = {
            "boxstyle": "round,pad=0.35",
            "facecolor": "#fff4e8",
            "edgecolor": "#e0b080",
            "linewidth": 0.5,
        }
        y = (below_caption - 0.07) / total
        figure.text(0.09 / width, y, text, va="top", fontsize=6.3, color=WARN, linespacing=1.25, bbox=frame)
    for _ in range(2):  # the first changes the axes' sizes, which may change their ticks
        figure.tight_layout(pad=0.5, h_pad=1.0, w_pad=1.0, rect=(0, below / total, 1, 1 - above / total))


def _missing_height(figure: Figure) -> float:
    """Inches by which the figure has to grow for its lowest panel (long names under bars, say) to be ``LEAST`` high."""
    figure.tight_layout(pad=0.5, h_pad=1.0, w_pad=1.0)
    lowest = min(ax.get_position().height for ax in figure.axes) * figure.get_size_inches()[1]
    rows = max(ax.get_subplotspec().get_gridspec().nrows for ax in figure.axes)
    return rows * max(0.0, LEAST - lowest)


def _legend_shape(handles: Sequence[Artist], room: float) -> tuple[int, int]:
    """(columns, lines) of a legend in ``room`` inches, from the length of its labels at 7 pt."""
    longest = max((len(str(h.get_label())) for h in handles), default=1)
    columns = max(1, min(len(handles), int(room / (0.057 * longest + 0.46))))
    return columns, math.ceil(len(handles) / columns)


def save(
    figure: Figure,
    out: Path,
    name: str,
    drawn: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    extra_columns: Sequence[str] = (),
) -> list[Path]:
    """Write <name>.pdf, .png, .csv (everything that was drawn) and .json (where it came from); equal input, equal bytes."""
    make_folder(out)
    paths = [out / f"{name}.{ending}" for ending in ("pdf", "png", "csv", "json")]
    # dates and program versions in the files would make every redraw a new file
    figure.savefig(
        paths[0], metadata={"CreationDate": None, "ModDate": None, "Producer": None, "Creator": None}
    )
    figure.savefig(paths[1], metadata={"Software": None})
    pd.DataFrame(list(drawn), columns=[*DRAWN, *extra_columns]).to_csv(
        paths[2], index=False, lineterminator="\n"
    )
    text = json.dumps(
        {"figure": name, **provenance, "matplotlib": mpl.__version__}, indent=1, sort_keys=True, default=str
    )
    paths[3].write_text(text + "\n", encoding="utf-8")
    return paths
