"""Figures from runs.

    python -m plot_scripts.make_figures figure=worst_group runs=runs out=figures

figure=NAME|FILE   plot_scripts/figures/<name>.yaml, or a YAML of your own
runs=A,B           run directories, folders of them, or patterns
entity= project=   instead of runs: Weights & Biases, with filters={config.loss.name: ipo}; cache=DIR keeps the answer as CSV
                   and is read without network the next time (refresh=true asks again)
data=FILE          CSV, JSON or JSONL for figures that are drawn from a file (vrpo_variance, calibration, log_ratio_vs_reward)
out=DIR            where <figure>.pdf, .png, .csv and .json go (default: figures)
by=loss.name,lr    config keys that name a method (default: the loss, and the weighting where there is one)
labels={ripo: GR-IPO}   display names, and the order of the methods
carry=true         draw stopped runs on at their last value, marked; the default ends their lines
split= title= columns=  override the figure's own
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # python plot_scripts/make_figures.py
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pandas as pd

from config.build import build
from plot_scripts.draw import draw_figure, read_figure
from plot_scripts.sources import load, parse_words, run
from utils import UserError


@dataclass(frozen=True)
class Request:
    """The words of the command line."""

    figure: str
    runs: list[str] = field(default_factory=list)
    entity: str | None = None
    project: str | None = None
    filters: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None
    refresh: bool = False
    data: str | None = None
    out: str = "figures"
    by: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    carry: bool | None = None
    split: str | None = None
    title: str | None = None
    columns: int | None = None


def read_data(path: str) -> pd.DataFrame:
    """A CSV, a JSON list of objects, or JSONL, as a table."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"data={path}: no such file")
    try:
        if file.suffix in (".json", ".jsonl"):
            return pd.read_json(file, lines=file.suffix == ".jsonl", dtype=False)
        return pd.read_csv(file)
    except ValueError as error:
        raise UserError(f"data={path}: not a table: {error}") from error


def make(request: Request) -> list[Path]:
    """The files of the figure that was asked for."""
    name, figure = read_figure(request.figure)
    given = {k: getattr(request, k) for k in ("carry", "title", "columns") if getattr(request, k) is not None}
    figure = replace(figure, **given)
    if request.split is not None:
        figure = replace(figure, panels=[replace(p, split=request.split) for p in figure.panels])
    loaded = load(request) if request.runs or request.project else None
    data = read_data(request.data) if request.data else None
    return draw_figure(figure, name, Path(request.out), loaded, data, request.data or "")


def main(words: Sequence[str]) -> list[Path]:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return []
    return make(build(Request, parse_words(words, lists=("runs", "by")), ""))


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
