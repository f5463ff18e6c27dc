"""Exact evaluation: every row once, per-example records, then means, groups, worst group and intervals from them.

The records are the truth; metrics are sums over the records in row order (``math.fsum``), so they depend neither on
``eval_batch_size`` nor on ranks beyond the rounding of the forward pass itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.schema import Batch, Row
from engine import stats
from engine.parallel import World
from losses.types import Loss, derived
from utils import log, stream

PREFIX = {"validation": "eval", "test": "test", "train": "train_eval"}
ACCURACIES = ("rewards/accuracies", "policy_accuracies", "reference_accuracies")


@dataclass(frozen=True)
class Evaluation:
    """One pass over one split. ``metrics`` are named as in metrics.jsonl; ``records`` in row order."""

    split: str
    prefix: str
    metrics: dict[str, float]
    records: list[dict[str, Any]]


class Evaluator:
    """Scores splits with the policy and writes records/<prefix>-<examples>.jsonl."""

    def __init__(
        self,
        *,
        splits: Mapping[str, Sequence[Row]],
        groups: Sequence[str],
        loss: Loss,
        reference: Callable | None,
        world: World,
        run_dir: Path,
        batch_size: int,
        per_group: int | None,
        sampler: Callable[[Any, int], None] | None = None,
    ) -> None:
        self.groups, self.loss, self.reference, self.world = tuple(groups), loss, reference, world
        self.run_dir, self.batch_size, self.sampler = run_dir, batch_size, sampler
        self.splits = {name: subset(rows, per_group, name) for name, rows in splits.items() if rows}

    def run(self, split: str, policy: torch.nn.Module, examples: int) -> Evaluation:
        """Every row of ``split`` once, without gradient. ``examples``: training rows so far, for the file name."""
        rows = self.splits[split]
        prefix = PREFIX[split]
        starts = range(0, len(rows), self.batch_size)
        found: list[tuple[int, dict[str, Any]]] = []
        for start, live in self.world.share(list(starts)):
            records = self._score(rows[start : start + self.batch_size], policy)
            if live:
                found += [(start + i, record) for i, record in enumerate(records)]
        ordered = [record for _, record in sorted(self.world.gather(found), key=lambda pair: pair[0])]
        if self.world.is_main:
            folder = self.run_dir / "records"
            folder.mkdir(exist_ok=True)
            with (folder / f"{prefix}-{examples}.jsonl").open("w", encoding="utf-8") as handle:
                handle.writelines(json.dumps(record) + "\n" for record in ordered)
        metrics = summarize(ordered, self.groups, prefix, self.loss.needs.unit)
        means = {name.removeprefix(f"{prefix}/"): value for name, value in metrics.items()}
        metrics |= {f"{prefix}/{name}": value for name, value in derived(self.loss, means).items()}
        return Evaluation(split, prefix, metrics, ordered)

    @torch.no_grad()
    def _score(self, rows: Sequence[Row], policy: torch.nn.Module) -> list[dict[str, Any]]:
        needs, batch = self.loss.needs, Batch.collate(rows)
        reference = self.reference(batch, needs.reference) if needs.reference else None
        out = self.loss(policy(batch, needs.policy, needs.tokens), reference, batch)
        columns = {"loss": out.losses, **out.metrics}
        values = torch.stack([v.double() for v in columns.values()]).cpu().numpy()
        records = []
        for i, row in enumerate(rows):
            record: dict[str, Any] = {
                "uid": row.uid,
                "group": self.groups[row.group],
                "prompt_key": row.prompt_key,
                "weight": row.weight,
                "num_tokens": sum(
                    len(ids)
                    for ids, role in zip(row.responses, row.roles, strict=True)
                    if role in needs.policy
                ),
            }
            for name, value in zip(columns, values[:, i], strict=True):
                if not math.isnan(value) or name == "loss":
                    record[name] = float(value)
            records.append(record)
        return records

    def sample(self, policy: torch.nn.Module, examples: int) -> None:
        """Write samples of the policy (and the reference) if sampling is on."""
        if self.sampler is not None:
            self.sampler(policy, examples)


def subset(rows: Sequence[Row], per_group: int | None, split: str) -> list[Row]:
    """At most ``per_group`` rows of each group, the same for every run and seed, in data order."""
    if per_group is None:
        return list(rows)
    kept: list[int] = []
    for group in sorted({row.group for row in rows}):
        members = [i for i, row in enumerate(rows) if row.group == group]
        if len(members) > per_group:
            order = stream(0, "evaluation subset", split, group).permutation(len(members))
            members = [members[j] for j in order[:per_group]]
        kept += members
    if len(kept) < len(rows):
        log.info(
            "%s: evaluating %d of %d rows (n_eval_examples=%d per group)",
            split,
            len(kept),
            len(rows),
            per_group,
        )
    return [rows[i] for i in sorted(kept)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def summarize(
    records: Sequence[Mapping[str, Any]], groups: Sequence[str], prefix: str, unit: str = "example"
) -> dict[str, float]:
    """Records -> metrics: means overall and per group, worst and mean over groups, 95 % intervals of every accuracy.

    Losses count an example's weight (divided by the number of examples, or of response tokens for unit="token").
    The interval is Wilson's where every prompt occurs once, and a cluster bootstrap by prompt where prompts repeat (Wilson's
    over the effective number of prompts where all examples agree; the worst group's interval rests on that number, too).
    """
    out: dict[str, float] = {}
    present = [g for g in groups if any(r["group"] == g for r in records)]
    members = {g: [r for r in records if r["group"] == g] for g in present}
    reserved = ("uid", "group", "prompt_key", "weight", "num_tokens")
    names = list(dict.fromkeys(k for r in records for k in r if k not in reserved))
    for name in names:
        value = _metric(records, name, unit)
        if value is not None:
            out[f"{prefix}/{name}"] = value
        if len(groups) < 2:
            continue
        per_group = {g: v for g in present if (v := _metric(members[g], name, unit)) is not None}
        out |= {f"{prefix}/{name}/group_{g}": v for g, v in per_group.items()}
        if per_group:
            out[f"{prefix}/{name}/mean_group"] = _mean(list(per_group.values()))
        if per_group and (name == "loss" or name in ACCURACIES):
            worst = np.max if name == "loss" else np.min  # a NaN is the worst, wherever it stands
            out[f"{prefix}/{name}/worst_group"] = float(worst(list(per_group.values())))
    out[f"{prefix}/num_examples"] = float(len(records))
    if len(groups) > 1:
        out |= {f"{prefix}/group_counts/group_{g}": float(len(members[g])) for g in present}
    for name in ACCURACIES:
        if any(name in r for r in records):
            out |= _accuracy_intervals(records, members, name, f"{prefix}/{name}", len(groups) > 1)
    return out


def _metric(records: Sequence[Mapping[str, Any]], name: str, unit: str) -> float | None:
    if name == "loss":
        count = sum(r["num_tokens"] for r in records) if unit == "token" else len(records)
        return math.fsum(r["weight"] * r["loss"] for r in records) / count
    values = [r[name] for r in records if name in r]
    return _mean(values) if values else None


def _accuracy_intervals(
    records: Sequence[Mapping[str, Any]],
    members: Mapping[str, Sequence],
    metric: str,
    name: str,
    grouped: bool,
) -> dict[str, float]:
    overall = accuracy_interval(records, metric)
    out = {f"{name}/ci_low": overall.low, f"{name}/ci_high": overall.high}
    if grouped:
        wins, counts = [], []
        for g, rows in members.items():
            interval = accuracy_interval(rows, metric)
            out[f"{name}/group_{g}/ci_low"], out[f"{name}/group_{g}/ci_high"] = interval.low, interval.high
            # prompts, not rows, are independent, and those with many rows decide more
            n = stats.effective_clusters([r["prompt_key"] for r in rows])
            wins.append(interval.estimate * n)
            counts.append(n)
        worst = stats.worst_group_interval(wins, counts)
        out[f"{name}/worst_group/ci_low"], out[f"{name}/worst_group/ci_high"] = worst.low, worst.high
    return {k: v for k, v in out.items() if not math.isnan(v)}


def accuracy_interval(
    records: Sequence[Mapping[str, Any]], metric: str = "rewards/accuracies"
) -> stats.Interval:
    """95 % interval of an accuracy of ``records`` (ties count 1/2)."""
    return stats.share_interval([r[metric] for r in records], [r["prompt_key"] for r in records])
