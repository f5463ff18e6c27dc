"""The final tables of a run: results.json and what is printed at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.evaluation import Evaluation, accuracy_interval

ARTIFACTS = (
    "config.yaml",
    "passport.json",
    "metrics.jsonl",
    "results.json",
    "records",
    "samples",
    "figures",
    "LATEST",
    "merged",
)


def final_table(done: Evaluation, groups: Sequence[str]) -> dict[str, Any]:
    """One split's last evaluation: a row for all and one per group, and every metric."""
    table = []
    for group in ["all", *groups]:
        records = [r for r in done.records if group in ("all", r["group"])]
        if records:
            table.append({"group": group, **group_row(records)})
    return {"prefix": done.prefix, "table": table, "metrics": done.metrics}


def group_row(records: Sequence[Mapping[str, Any]]) -> dict[str, float | int]:
    """Mean loss, reward accuracy with its 95 % interval, numbers of examples and of prompts."""
    row: dict[str, float | int] = {"n": len(records), "prompts": len({r["prompt_key"] for r in records})}
    row["loss"] = math.fsum(r["weight"] * r["loss"] for r in records) / len(records)
    if "rewards/accuracies" in records[0]:
        interval = accuracy_interval(records)
        row |= {"accuracy": interval.estimate, "ci_low": interval.low, "ci_high": interval.high}
    return row


def render(results: Mapping[str, Any], run_dir: Path) -> str:
    """The tables, and the paths of everything that was written."""
    lines = [f"{results['exp_name']}: {results['status']} after {results['examples']} examples"]
    for split, found in results["splits"].items():
        lines += ["", f"{split} ({found['prefix']}/ in metrics.jsonl)"]
        lines.append(f"  {'group':<24} {'loss':>10}  {'reward accuracy [95% interval]':<32} {'n':>6}")
        for row in found["table"]:
            accuracy = ""
            if "accuracy" in row:
                accuracy = f"{row['accuracy']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
            lines.append(f"  {row['group']:<24} {row['loss']:>10.4f}  {accuracy:<32} {row['n']:>6}")
    lines += ["", f"run directory: {run_dir}"]
    lines += [f"  {run_dir / name}" for name in ARTIFACTS if (run_dir / name).exists()]
    return "\n".join(lines) + "\n"
