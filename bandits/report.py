"""What an experiment leaves behind: metrics.jsonl (the record of truth), curves.csv, summary.csv, claims.csv, figures."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from engine.stats import Interval, mean_interval, paired_difference
from utils import UserError, did_you_mean, log, make_folder


@dataclass(frozen=True)
class Claim:
    """A statement about final values, decided by a 95 % interval over seeds.

    text      what is claimed
    left      cell (named in summary.csv) whose ``metric`` is looked at
    right     cell subtracted from it seed by seed; null: the value of ``left`` itself
    at_least, at_most   bounds of the claim; the verdict is "agrees" when the whole interval keeps them, "disagrees"
              when all of it breaks one, else "undecided"
    """

    text: str
    left: str
    metric: str
    right: str | None = None
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise UserError(
                f"claim {self.text!r}: give at_least or at_most; without a bound nothing is claimed"
            )

    @property
    def bound(self) -> str:
        """The bounds as text."""
        if self.at_least is not None and self.at_most is not None:
            return f"in [{self.at_least:g}, {self.at_most:g}]"
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def verdict(self, interval: Interval) -> str:
        """agrees | undecided | disagrees"""
        low = -np.inf if self.at_least is None else self.at_least
        high = np.inf if self.at_most is None else self.at_most
        if interval.high < low or interval.low > high:
            return "disagrees"
        return "agrees" if low <= interval.low and interval.high <= high else "undecided"


@dataclass
class Report:
    """Collects values per (cell, metric), one number per seed, and writes everything below ``folder``."""

    folder: Path
    started: float = field(default_factory=time.monotonic)
    cells: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    curve_rows: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        make_folder(self.folder / "figures")
        (self.folder / "metrics.jsonl").write_text("")

    def curve(
        self,
        cell: str,
        steps: Sequence[int],
        examples: Sequence[int],
        metrics: Mapping[str, np.ndarray],
        seeds: Sequence[int],
        shown: Sequence[str] = (),
    ) -> None:
        """Metrics (len(steps), R) over training: all to metrics.jsonl, ``shown`` to curves.csv, the last to the summary."""
        now = round(time.monotonic() - self.started, 3)
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            for i, (step, count) in enumerate(zip(steps, examples, strict=True)):
                head = {
                    "kind": "eval",
                    "split": "eval",
                    "step": step,
                    "examples": count,
                    "time": now,
                    "cell": cell,
                }
                for r, seed in enumerate(seeds):
                    row = head | {"seed": seed}
                    row |= {f"eval/{n}": float(v[i, r]) for n, v in metrics.items() if np.isfinite(v[i, r])}
                    handle.write(json.dumps(row) + "\n")
        for name in shown:
            for i, step in enumerate(steps):
                self.curve_rows.append(
                    {
                        "cell": cell,
                        "metric": name,
                        "step": step,
                        "examples": examples[i],
                        **_row(metrics[name][i]),
                    }
                )
        for name, values in metrics.items():
            self.cells[cell, name] = np.asarray(values[-1])

    def cell(self, cell: str, metric: str, values: np.ndarray) -> None:
        """One final number per seed (or per replicate)."""
        self.cells[cell, metric] = np.asarray(values, dtype=np.float64)
        head = {"kind": "result", "cell": cell, "time": round(time.monotonic() - self.started, 3)}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(head | {f"eval/{metric}": self.cells[cell, metric].tolist()}) + "\n")

    def table(self, name: str, rows: Sequence[dict]) -> None:
        """<name>.csv."""
        _write_csv(self.folder / f"{name}.csv", rows)

    def figure(self, name: str, figure: Figure) -> None:
        """figures/<name>.pdf and .png."""
        for kind in ("pdf", "png"):
            figure.savefig(self.folder / "figures" / f"{name}.{kind}")

    def value(self, cell: str, metric: str) -> np.ndarray:
        """Stored values; raises UserError with a suggestion when there are none."""
        if (cell, metric) not in self.cells:
            known = sorted({c for c, m in self.cells if m == metric}) or sorted({c for c, _ in self.cells})
            raise UserError(
                f"claims: no {metric} of {cell!r}{did_you_mean(cell, known)}; cells: {'; '.join(known)}"
            )
        return self.cells[cell, metric]

    def decide(self, claims: Sequence[Claim]) -> list[dict]:
        """One row per claim with its interval and verdict; also to claims.csv."""
        rows = []
        for claim in claims:
            left = self.value(claim.left, claim.metric)
            if claim.right is None:
                interval = mean_interval(left)
            else:
                interval = paired_difference(left, self.value(claim.right, claim.metric))
            rows.append(
                {
                    "claim": claim.text,
                    "left": claim.left,
                    "right": claim.right or "",
                    "metric": claim.metric,
                    "bound": claim.bound,
                    "value": interval.estimate,
                    "low": interval.low,
                    "high": interval.high,
                    "n": interval.n,
                    "verdict": claim.verdict(interval),
                }
            )
        _write_csv(self.folder / "claims.csv", rows)
        return rows

    def finish(self, claims: Sequence[Claim]) -> None:
        """Write the CSV files and log the claims."""
        summary = [{"cell": c, "metric": m, **_row(values)} for (c, m), values in self.cells.items()]
        _write_csv(self.folder / "summary.csv", summary)
        _write_csv(self.folder / "curves.csv", self.curve_rows)
        for row in self.decide(claims):
            log.info(
                "%-9s %s: %.4g [%.4g, %.4g] (%s, n=%d)",
                *(row[k] for k in ("verdict", "claim", "value", "low", "high", "bound", "n")),
            )
        wall, cpu = time.monotonic() - self.started, time.process_time()
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(
                json.dumps({"kind": "end", "time": round(wall, 3), "cpu_time": round(cpu, 3)}) + "\n"
            )
        log.info("%s: %.0f s, %.0f s of CPU", self.folder, wall, cpu)


def _row(values: np.ndarray) -> dict[str, float]:
    finite = values[np.isfinite(values)]
    interval = mean_interval(finite) if finite.size else Interval(np.nan, np.nan, np.nan, 0)
    return {"mean": interval.estimate, "low": interval.low, "high": interval.high, "n": interval.n}


def _write_csv(path: Path, rows: Sequence[dict]) -> None:
    if not rows:
        return
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
