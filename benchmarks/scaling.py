"""How time and memory grow: data for two plots, as CSV.

    python -m benchmarks.scaling FOLDER

time_by_tokens.csv     one forward and backward pass against the rows in it: positions, seconds, peak memory
memory_by_vocabulary.csv   peak memory of a training step against the vocabulary

Every point is a process of its own. Both files hold a padded trainer with all logits and ours, under equal settings.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.worker import Process

SIDES = ("padded", "ours")
ROWS = (1, 2, 4, 8)
VOCABULARIES = (1_024, 4_096, 16_384, 32_768, 65_536, 131_072)


def measure(side: str, options: argparse.Namespace, rows: int, vocab: int | None) -> dict[str, Any]:
    """Median seconds and peak MiB of a step whose ``rows`` go through in one forward pass."""
    spec = {
        "contestant": side,
        "workload": "hh",
        "model": options.model,
        "vocab": vocab,
        "rows": rows,
        "micro": rows,
        "steps": options.repeats + 1,
        "threads": options.threads,
        "allocator": "keep",
        "device": options.device,
    }
    worker = Process(spec)
    steps = [worker.ask("step", index=i) for i in range(spec["steps"])][1:]  # the first one warms up
    worker.close()
    return {
        "side": side,
        "model": options.model,
        "vocabulary": vocab or worker.loaded["vocabulary"],
        "rows": rows,
        "positions": round(median(s["positions"] for s in steps)),
        "seconds": median(s["seconds"] for s in steps),
        "seconds_per_thousand_positions": median(1000 * s["seconds"] / s["positions"] for s in steps),
        "peak_mib": steps[-1]["peak_mib"],
    }


def write(path: Path, points: Iterator[dict[str, Any]]) -> None:
    """Points as CSV, written as they come."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer: csv.DictWriter | None = None
        for point in points:
            writer = writer or csv.DictWriter(handle, list(point))
            if handle.tell() == 0:
                writer.writeheader()
            writer.writerow(point)
            handle.flush()
            print(point)


def main(argv: list[str]) -> None:
    """Measure both curves."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="bench", choices=["bench", "small_vocab", "gemma_2b"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    write(
        options.folder / "time_by_tokens.csv",
        (measure(side, options, rows, None) for rows in ROWS for side in SIDES),
    )
    write(
        options.folder / "memory_by_vocabulary.csv",
        (measure(side, options, 2, vocab) for vocab in VOCABULARIES for side in SIDES),
    )


if __name__ == "__main__":
    main(sys.argv[1:])
