"""What ``commands.score`` prints: accuracies and win rates of every group, the rest overall."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

POLICY, AGAINST = "policy", "against"
BY_GROUP = ("rewards/accuracies", "win_rate")  # for every group
SHOWN = (
    "rewards/accuracies",
    "rewards/margins",
    "policy_accuracies",
    "reference_accuracies",
    "logps/chosen",
    "logps/rejected",
)


def shown(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows that are printed, in ``SHOWN``'s order and then their own; the files have all."""
    order = {metric: i for i, metric in enumerate(SHOWN)}
    kept = [
        r
        for r in rows
        if (r["metric"] in order or r["metric"].startswith("samples/") or "/vs_" in r["metric"])
        and (r["group"] == "all" or r["metric"].endswith(BY_GROUP))
    ]
    return sorted(kept, key=lambda r: order.get(r["metric"], len(order)))


def table(rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> str:
    """One line per metric and group: value, 95 % interval, n."""
    out = []
    for model, split in dict.fromkeys((r["model"], r["split"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["split"]) == (model, split)]
        out += [
            "",
            f"{model}, {split}",
            f"  {'metric':<38} {'group':<14} {'value [95% interval]':<34} {'n':>6}",
        ]
        out += [
            f"  {row['metric']:<38} {row['group']:<14} {cell(row, 'value'):<34} {row['n']:>6}"
            for row in shown(mine)
        ]
    if differences:
        out += ["", f"{POLICY} - {AGAINST}, paired; * where the interval excludes 0"]
        for row in shown(differences):
            star = " *" if row["ci_low"] != "" and (row["ci_low"] > 0 or row["ci_high"] < 0) else ""
            out.append(
                f"  {row['metric']:<38} {row['group']:<14} {cell(row, 'difference') + star:<34} {row['n']:>6}"
            )
    out += [
        "",
        "Log-probs and margins of each group: scores.csv"
        + (", differences.csv" if differences else "")
        + ".",
    ]
    return "\n".join(out[1:]) + "\n"


def cell(row: Mapping[str, Any], key: str) -> str:
    interval = "" if row["ci_low"] == "" else f" [{row['ci_low']:.3f}, {row['ci_high']:.3f}]"
    return f"{row[key]:.3f}{interval}"
