"""The tables of a run: results.csv, results.json and what is printed at the end."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.evaluation import Evaluation, accuracy_interval
from engine.metric_names import parts

ARTIFACTS = (
    "config.yaml",
    "passport.json",
    "metrics.jsonl",
    "results.json",
    "results.csv",
    "records",
    "samples",
    "figures",
    "LATEST",
    "merged",
    "model-step-*",
)


def final_table(done: Evaluation, groups: Sequence[str]) -> dict[str, Any]:
    """One split's last evaluation: a row for all and one per group, and every metric."""
    table = []
    for group in ["all", *(groups if len(groups) > 1 else ())]:
        records = [r for r in done.records if group in ("all", r["group"])]
        if records:
            name = f"{done.prefix}/loss" + (f"/group_{group}" if group != "all" else "")
            table.append({"group": group, **group_row(records, done.metrics[name])})
    return {"prefix": done.prefix, "table": table, "metrics": done.metrics}


def group_row(records: Sequence[Mapping[str, Any]], loss: float) -> dict[str, float | int]:
    """Mean ``loss``, reward accuracy with its 95 % interval (NaN where one prompt gives none), numbers of examples and of prompts."""
    row: dict[str, float | int] = {"n": len(records), "prompts": len({r["prompt_key"] for r in records})}
    row["loss"] = loss
    if "rewards/accuracies" in records[0]:
        interval = accuracy_interval(records)
        row |= {"accuracy": interval.estimate, "ci_low": interval.low, "ci_high": interval.high}
    return row


def render(results: Mapping[str, Any], run_dir: Path) -> str:
    """The tables, and the paths of everything that was written."""
    lines = [f"{results['exp_name']}: {results['status']} after {results['examples']} examples"]
    for split, found in results["splits"].items():
        cells = {id(row): accuracy_cell(row) for row in found["table"]}
        head = "reward accuracy [95% interval]" if any(cells.values()) else ""
        width = 33 if head else 0  # losses without rewards have no such column
        lines += ["", f"{split} ({found['prefix']}/ in metrics.jsonl)"]
        lines.append(f"  {'group':<24} {'loss':>10}  {head:<{width}}{'n':>6}")
        for row in found["table"]:
            lines.append(f"  {row['group']:<24} {row['loss']:>10.4f}  {cells[id(row)]:<{width}}{row['n']:>6}")
    lines += ["", f"run directory: {run_dir}"]
    lines += [f"  {path}" for pattern in ARTIFACTS for path in sorted(run_dir.glob(pattern))]
    return "\n".join(lines) + "\n"


def accuracy_cell(row: Mapping[str, Any]) -> str:
    """``0.812 [0.790, 0.834]`` of one of ``group_row``; empty without an accuracy, the value alone without an interval."""
    if "accuracy" not in row:
        return ""
    low, high = row["ci_low"], row["ci_high"]
    interval = "" if low is None or math.isnan(low) else f" [{low:.3f}, {high:.3f}]"
    return f"{row['accuracy']:.3f}{interval}"


COLUMNS = ("step", "examples", "split", "group", "metric", "value", "ci_low", "ci_high", "n", "restored_from")
COUNTS = ("num_examples", "group_counts")  # of metrics.jsonl: the column n here


def evaluation_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations of metrics.jsonl (rows with kind "eval") -> one row per step, split, group and metric (``COLUMNS``).

    group  "all", a group's name, "mean_group" or "worst_group"
    n      examples behind the value: of "mean_group" all groups', of "worst_group" that group's; bounds are "" where there is
           no interval
    restored_from   for the evaluation of restored best weights: their count of examples; the last weights' own stands beside it
    """
    return [line for row in rows if row["kind"] == "eval" for line in _evaluation_rows(row)]


def _evaluation_rows(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    made: dict[tuple[str, str], dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for name, value in row.items():
        split, metric, group, bound = parts(name)
        group = group.removeprefix("group_") or "all"
        if not split or not isinstance(value, int | float):
            continue
        if metric in COUNTS:
            counts[group] = int(value)
            continue
        line = made.setdefault((metric, group), dict.fromkeys(COLUMNS, ""))
        line[bound or "value"] = value
    place = {k: row.get(k, "") for k in ("step", "examples", "split", "restored_from")}

    def behind(metric: str, group: str, value: float) -> int | str:
        if group not in ("mean_group", "worst_group"):
            return counts.get(group, "")
        groups = {g: n for g, n in counts.items() if g != "all" and (metric, g) in made}
        if group == "mean_group":
            return sum(groups.values())
        return next((n for g, n in groups.items() if made[metric, g]["value"] == value), "")

    return [
        line | place | {"group": group, "metric": metric, "n": behind(metric, group, line["value"])}
        for (metric, group), line in made.items()
    ]


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as CSV; numbers are written so that they are read back bit-equal."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
