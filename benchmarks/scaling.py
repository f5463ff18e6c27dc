"""How the time and memory of a step grow: a table and a figure.

    python -m benchmarks.scaling FOLDER                          # everything
    python -m benchmarks.scaling FOLDER --curves tokens prompt   # these again, the other rows of the table stay

tokens      seconds against the positions of a step: 1 to 8 pairs of 128 + 128 tokens in one forward pass
vocabulary  peak memory against the vocabulary, 2 HH-like pairs
prompt      seconds against the length of the prompt, 2 pairs with responses of 128 tokens
responses   seconds against the responses of a prompt, 2 prompts of 128 tokens with responses of 64

Every point is a process of its own. Both sides (a padded trainer with all logits, and ours) have the same optimizer and
live or cached reference as in `benchmarks.throughput`. FOLDER gets curves.csv and, once all curves are in it,
the figure.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.worker import Process
from benchmarks.workloads import MODELS
from plot_scripts.draw import draw_figure, read_figure

SIDES = ("padded", "ours")
VOCABULARIES = (1_024, 8_192, 32_768, 131_072)
CURVES: dict[str, list[dict[str, Any]]] = {
    "tokens": [{"workload": "128x128x2", "rows": n, "grows": n} for n in (1, 2, 4, 8)],
    "vocabulary": [{"workload": "hh", "rows": 2, "vocab": v, "grows": v} for v in VOCABULARIES],
    "prompt": [{"workload": f"{p}x128x2", "rows": 2, "grows": p} for p in (32, 256, 512, 1024)],
    "responses": [{"workload": f"128x64x{k}", "rows": 2, "grows": k} for k in (2, 4, 8, 12)],
}


def measure(curve: str, side: str, options: argparse.Namespace, point: dict[str, Any]) -> dict[str, Any]:
    """Least seconds (other work on the machine only adds) and peak MiB of a step in one forward pass."""
    spec = {
        "contestant": side,
        "workload": point["workload"],
        "model": options.model,
        "vocab": point.get("vocab"),
        "rows": point["rows"],
        "micro": point["rows"],
        "steps": options.repeats + 1,
        "threads": options.threads,
        "allocator": "keep",
        "device": options.device,
    }
    worker = Process(spec)
    steps = [worker.ask("step", index=i) for i in range(spec["steps"])][1:]  # the first one warms up
    worker.close()
    return {
        "curve": curve,
        "side": side,
        "model": options.model,
        "grows": point["grows"],
        "positions": round(median(s["positions"] for s in steps)),
        "seconds": min(s["seconds"] for s in steps),
        "peak_mib": steps[-1]["peak_mib"],
    }


def update(path: Path, points: Iterator[dict[str, Any]], curves: Sequence[str]) -> list[dict[str, Any]]:
    """Replace ``curves`` in the table, a point at a time as they come; the rows of the whole table."""
    rows: list[dict[str, Any]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as handle:
            rows = [row for row in csv.DictReader(handle) if row["curve"] not in curves]
    for point in points:
        print(point, flush=True)
        rows.append(point)
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, list(point))
            writer.writeheader()
            writer.writerows(rows)
    return rows


def linear_fit(table: pd.DataFrame) -> str:
    """How well seconds are a line in positions, for each side."""
    lines = []
    for side, part in table[table["curve"] == "tokens"].groupby("side"):
        x, y = part["positions"].to_numpy(), part["seconds"].to_numpy()
        slope, start = np.polyfit(x, y, 1)
        r2 = 1 - ((y - start - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
        lines.append(f"{side}: {start:.2f} s + {1000 * slope:.2f} s per 1,000 positions, R2 {r2:.4f}")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Measure the curves, then draw them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--curves", nargs="+", default=list(CURVES), choices=list(CURVES))
    parser.add_argument("--model", default="bench", choices=list(MODELS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "curves.csv"  # scaling.csv is what the figure shows of it
    points = (
        measure(curve, side, options, point)
        for curve in options.curves
        for point in CURVES[curve]
        for side in SIDES
    )
    update(path, points, options.curves)
    table = pd.read_csv(path)
    if "tokens" in set(table["curve"]):
        print(linear_fit(table))
    if set(table["curve"]) == set(CURVES):
        for made in draw_figure(*read_figure("scaling")[::-1], options.folder, None, table, str(path)):
            print(made)


if __name__ == "__main__":
    main(sys.argv[1:])
