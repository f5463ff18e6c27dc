"""What metrics make of per-example records: groups, the worst of them, and intervals that count prompts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.schema import Row
from engine import stats
from engine.evaluation import subset, summarize


def record(
    group: str, prompt: str, loss: float, accuracy: float, weight: float = 1.0, tokens: int = 2
) -> dict:
    shared = {"group": group, "prompt_key": prompt, "weight": weight, "num_tokens": tokens}
    return {
        "uid": f"{group}{prompt}",
        **shared,
        "loss": loss,
        "rewards/accuracies": accuracy,
        "rewards/margins": -loss,
    }


RECORDS = [
    record("a", "p", 1.0, 1.0, weight=2.0),
    record("a", "p", 2.0, 1.0),
    record("a", "q", 5.0, 0.0, tokens=8),
    record("b", "r", 4.0, 0.5),
    record("b", "s", 8.0, 0.0),
]


def test_groups_their_mean_and_the_worst_of_them():
    found = summarize(RECORDS, ["a", "b"], "eval")
    assert found["eval/loss"] == pytest.approx((2 + 2 + 5 + 4 + 8) / 5)
    assert (found["eval/loss/group_a"], found["eval/loss/group_b"]) == (3.0, 6.0)
    assert (found["eval/loss/mean_group"], found["eval/loss/worst_group"]) == (4.5, 6.0)
    accuracies = [
        found[f"eval/rewards/accuracies/{g}"] for g in ("group_a", "group_b", "mean_group", "worst_group")
    ]
    assert accuracies == pytest.approx([2 / 3, 0.25, (2 / 3 + 0.25) / 2, 0.25])
    assert (
        "eval/rewards/margins/worst_group" not in found
    )  # neither end of a margin is the worse one by itself
    assert (found["eval/num_examples"], found["eval/group_counts/group_a"]) == (5.0, 3.0)


def test_intervals_count_prompts_not_rows():
    once = summarize(RECORDS, ["a", "b"], "eval")
    assert once["eval/rewards/accuracies/group_b/ci_low"] == stats.wilson(0.5, 2).low
    found = summarize([*RECORDS, record("b", "s", 8.0, 0.0)], ["a", "b"], "eval")
    repeated = stats.cluster_bootstrap([0.5, 0.0, 0.0], ["r", "s", "s"])
    assert found["eval/rewards/accuracies/group_b/ci_high"] == repeated.high
    n = 9 / 5  # (1 + 2)^2 / (1 + 4): two prompts each, one of which decides two rows of three
    worst = stats.worst_group_interval([2 / 3 * n, 1 / 6 * n], [n, n])
    name = "eval/rewards/accuracies/worst_group"
    assert (found[f"{name}/ci_low"], found[f"{name}/ci_high"]) == pytest.approx((worst.low, worst.high))


def test_every_accuracy_has_its_interval():
    names = "policy_accuracies", "reference_accuracies"
    found = summarize(
        [r | dict.fromkeys(names, r["rewards/accuracies"]) for r in RECORDS], ["a", "b"], "eval"
    )
    intervals = {k: v for k, v in found.items() if k.startswith("eval/rewards/accuracies/") and "/ci_" in k}
    assert len(intervals) == 8  # overall, two groups and the worst: two ends each
    for name in names:
        assert {k: found[k.replace("rewards/accuracies", name)] for k in intervals} == intervals


def test_one_group_is_not_told_apart_and_a_group_without_rows_is_not_the_worst():
    assert not [name for name in summarize(RECORDS[:3], ["a"], "eval") if "group" in name]
    found = summarize(RECORDS[:3], ["a", "b"], "eval")
    assert found["eval/loss/worst_group"] == 3.0 and "eval/loss/group_b" not in found


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_group_whose_loss_is_not_a_number_is_the_worst(where):
    records = [record(g, g, math.nan if i == where else float(i), 1.0) for i, g in enumerate("abc")]
    assert math.isnan(summarize(records, ("a", "b", "c"), "eval")["eval/loss/worst_group"])


def test_a_loss_per_token_divides_by_the_tokens():
    found = summarize(RECORDS, ["a", "b"], "eval", unit="token")
    assert found["eval/loss/group_a"] == pytest.approx(9 / 12)


def test_n_eval_examples_keeps_the_same_rows_of_each_group_in_data_order():
    ids = np.array([1], dtype=np.int32)
    groups = [0, 1, 0, 0, 2, 0, 2, 0, 2, 2]
    rows = [Row(str(i), ids, (ids,), ("target",), g, str(i)) for i, g in enumerate(groups)]
    kept = subset(rows, 3, "test")
    assert [[row.group for row in kept].count(g) for g in (0, 1, 2)] == [3, 1, 3]
    assert [row.uid for row in kept] == sorted(row.uid for row in kept)
    assert subset(rows, 3, "test") == kept and subset(rows, None, "test") == rows
    chosen = {tuple(row.uid for row in subset(rows, 3, name)) for name in "abcdefgh"}
    assert len(chosen) > 1  # drawn, not the first three: files are often sorted
