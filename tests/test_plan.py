"""The batch plan: every row once an epoch, nothing dropped, a pure function of (seed, rows, step)."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.plan import Plan, fingerprint, micro_batches
from data.schema import Row
from utils import UserError


def make_row(uid=0, prompt="p", group=0, prompt_tokens=3, response_tokens=2, weight=1.0, **scalars) -> Row:
    return Row(
        uid=f"d/train:{uid}",
        prompt=np.arange(prompt_tokens, dtype=np.int32),
        responses=(np.arange(response_tokens, dtype=np.int32), np.arange(1, dtype=np.int32)),
        roles=("chosen", "rejected"),
        group=group,
        prompt_key=prompt,
        weight=weight,
        scalars=scalars,
    )


def rows_of_prompts(sizes, groups=None) -> list[Row]:
    """Prompt k has sizes[k] rows and group groups[k]."""
    return [
        make_row(f"{k}-{j}", f"p{k}", group=0 if groups is None else groups[k])
        for k, n in enumerate(sizes)
        for j in range(n)
    ]


def epoch_rows(plan: Plan, epoch: int) -> np.ndarray:
    return np.concatenate([plan.step_rows(s) for s in range(plan.num_steps) if plan.epoch_of(s) == epoch])


sizes_strategy = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@given(sizes=sizes_strategy, batch_size=st.integers(1, 9), seed=st.integers(0, 3), sep=st.booleans())
@settings(max_examples=80, deadline=None)
def test_every_epoch_has_each_row_once_and_every_batch_but_the_last_is_full(sizes, batch_size, seed, sep):
    rows = rows_of_prompts(sizes)
    plan = Plan(rows, seed=seed, batch_size=batch_size, n_epochs=3, sep_pairs=sep)
    steps = [plan.step_rows(s) for s in range(plan.num_steps)]
    assert plan.num_examples == 3 * len(rows) == sum(map(len, steps))
    for epoch in range(3):
        assert sorted(epoch_rows(plan, epoch)) == list(range(len(rows)))
        lengths = [len(s) for i, s in enumerate(steps) if plan.epoch_of(i) == epoch]
        assert all(n == batch_size for n in lengths[:-1])
        assert 1 <= lengths[-1] <= batch_size
    before = np.cumsum([0, *map(len, steps)])
    assert [plan.examples_before(s) for s in range(plan.num_steps + 1)] == before.tolist()


@given(sizes=sizes_strategy, stratified=st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_pairs_of_a_prompt_are_adjacent_and_in_data_order(sizes, stratified):
    rows = rows_of_prompts(sizes)
    shuffled = list(
        np.random.default_rng(0).permutation(len(rows))
    )  # the pairs of a prompt far apart in the data
    rows = [rows[i] for i in shuffled]
    strata = {"strata": [0] * len(rows), "strata_probs": [1.0]} if stratified else {}
    order = epoch_rows(Plan(rows, seed=1, batch_size=4, n_epochs=1, **strata), 0)
    keys = [rows[i].prompt_key for i in order]
    runs = [i for i, key in enumerate(keys) if i == 0 or keys[i - 1] != key]
    assert len(runs) == len(set(keys))
    for start, stop in zip(runs, [*runs[1:], len(keys)], strict=True):
        assert list(order[start:stop]) == sorted(order[start:stop])


@given(
    sizes=sizes_strategy,
    batch_size=st.integers(1, 7),
    n_examples=st.integers(1, 60),
    probs=st.sampled_from([None, (0.3, 0.7)]),
    sep=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_longer_run_has_the_shorter_one_as_its_prefix_and_stops_exactly(
    sizes, batch_size, n_examples, probs, sep
):
    rows = rows_of_prompts([*sizes, 2], groups=[*[0] * len(sizes), 1])
    strata = {} if probs is None else {"strata": [row.group for row in rows], "strata_probs": probs}
    short = Plan(rows, seed=5, batch_size=batch_size, n_examples=n_examples, sep_pairs=sep, **strata)
    long = Plan(rows, seed=5, batch_size=batch_size, n_epochs=99, sep_pairs=sep, **strata)
    got = np.concatenate([short.step_rows(s) for s in range(short.num_steps)])
    assert len(got) == n_examples == short.num_examples
    for step in range(short.num_steps - 1):
        assert np.array_equal(short.step_rows(step), long.step_rows(step))
    last = short.step_rows(short.num_steps - 1)
    assert np.array_equal(last, long.step_rows(short.num_steps - 1)[: len(last)])


@pytest.mark.parametrize("stratified", [False, True])
def test_a_step_does_not_depend_on_the_steps_asked_for_before(stratified):
    rows = rows_of_prompts([3, 1, 2, 2, 1, 4], groups=[0, 0, 1, 1, 1, 0])
    strata = {"strata": [row.group for row in rows], "strata_probs": [0.5, 0.5]} if stratified else {}

    def plan():
        return Plan(rows, seed=2, batch_size=4, n_epochs=5, **strata)

    forward = plan()
    expected = [forward.step_rows(s) for s in range(forward.num_steps)]
    jumping = plan()
    for step in [17, 3, 19, 0, 8, 8, 4, 12]:
        assert np.array_equal(jumping.step_rows(step), expected[step])
    assert np.array_equal(plan().step_rows(13), expected[13])
    with pytest.raises(IndexError):
        forward.step_rows(forward.num_steps)


def test_seeds_and_epochs_give_different_orders():
    rows = rows_of_prompts([1] * 50)
    a = Plan(rows, seed=0, batch_size=50, n_epochs=2)
    b = Plan(rows, seed=1, batch_size=50, n_epochs=2)
    assert not np.array_equal(a.step_rows(0), a.step_rows(1))
    assert not np.array_equal(a.step_rows(0), b.step_rows(0))


def test_strata_are_drawn_per_pair_even_when_prompts_have_several_pairs():
    # group 0: 40 prompts of 5 pairs, group 1: 300 prompts of 1 pair; asked for half and half
    rows = rows_of_prompts([5] * 40 + [1] * 300, groups=[0] * 40 + [1] * 300)
    group = np.array([row.group for row in rows])
    plan = Plan(rows, seed=0, batch_size=100, n_epochs=40, strata=group, strata_probs=[3.0, 3.0])
    drawn = np.concatenate([plan.step_rows(s) for s in range(plan.num_steps)])
    share = (group[drawn] == 0).mean()
    # 20,000 rows; a run of five equal rows multiplies the variance by about 5: 4 standard errors are 0.026
    assert abs(share - 0.5) < 0.026
    assert np.allclose(plan.group_probs, [0.5, 0.5])
    # within a group every row comes equally often, up to the permutation it is in
    for g in (0, 1):
        times = np.bincount(drawn, minlength=len(rows))[group == g]
        assert times.max() - times.min() <= 1


def test_a_stratum_repeats_a_row_only_after_all_its_rows():
    rows = rows_of_prompts([1] * 13, groups=[0] * 10 + [1] * 3)
    group = np.array([row.group for row in rows])
    plan = Plan(rows, seed=3, batch_size=13, n_epochs=30, strata=group, strata_probs=[0.2, 0.8])
    drawn = np.concatenate([plan.step_rows(s) for s in range(plan.num_steps)])
    small = drawn[group[drawn] == 1]
    for start in range(0, len(small) - 3, 3):
        assert sorted(small[start : start + 3]) == [10, 11, 12]
    cycles = {tuple(small[start : start + 3]) for start in range(0, 90, 3)}
    assert len(cycles) > 3, "every cycle has its own permutation"


def test_group_probs_mix_groups_within_strata():
    rows = rows_of_prompts([1] * 10, groups=[0] * 6 + [1] * 2 + [2] * 2)
    assert np.allclose(Plan(rows, seed=0, batch_size=2, n_epochs=1).group_probs, [0.6, 0.2, 0.2])
    plan = Plan(
        rows, seed=0, batch_size=2, n_epochs=1, strata=[0] * 8 + [1] * 2, strata_probs=[1, 3], num_groups=4
    )
    assert np.allclose(plan.group_probs, [0.25 * 6 / 8, 0.25 * 2 / 8, 0.75, 0.0])
    assert plan.group_counts.tolist() == [6, 2, 2, 0]
    assert plan.group_probs.dtype == np.float64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_epochs": None}, "n_epochs=null and n_examples=null"),
        ({"n_epochs": 0}, "n_epochs=0"),
        ({"n_examples": -3}, "n_examples=-3"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"strata": [0, 0, 0], "strata_probs": [0.5, 0.5]}, "no training rows"),
        ({"strata": [0, 1, 1], "strata_probs": [0.5, -0.5]}, "non-negative"),
        ({"strata": [0, 1, 1], "strata_probs": [0.0, 0.0]}, "not all zero"),
    ],
)
def test_impossible_settings_are_named(change, says):
    with pytest.raises(UserError, match=says):
        Plan(rows_of_prompts([1, 1, 1]), **{"seed": 0, "batch_size": 2, "n_epochs": 1, **change})


def test_no_rows_is_an_error():
    with pytest.raises(UserError, match="no rows"):
        Plan([], seed=0, batch_size=2, n_epochs=1)


def test_the_fingerprint_sees_every_field_and_the_order():
    rows = [make_row(i, f"p{i}", p_chosen=0.7) for i in range(3)]
    base = fingerprint(rows)
    assert base == fingerprint(list(rows)) == Plan(rows, seed=9, batch_size=1, n_epochs=1).fingerprint
    other = make_row(2, "p2", p_chosen=0.7)
    changed = {
        "prompt": np.arange(4, dtype=np.int32),
        "responses": (other.responses[1], other.responses[0]),
        "roles": ("rejected", "chosen"),
        "uid": "x",
        "group": 1,
        "weight": 0.5,
        "scalars": {"p_chosen": 0.6},
        "response_scalars": {"finished": (1.0, 0.0)},
    }
    for field, value in changed.items():
        variant = Row(**{**{f: getattr(other, f) for f in Row.__dataclass_fields__}, field: value})
        assert fingerprint([*rows[:2], variant]) != base, field
    assert fingerprint(rows[::-1]) != base
    # a token moved over a boundary is another data set
    left = Row("u", np.array([1, 2]), (np.array([3]),), ("target",), 0, "k")
    right = Row("u", np.array([1]), (np.array([2, 3]),), ("target",), 0, "k")
    assert fingerprint([left]) != fingerprint([right])


# ---------------------------------------------------------------------------------------------- micro-batches


def tree_tokens(rows, part) -> int:
    """Independent count: a prompt once per run of consecutive rows that share it."""
    total = 0
    for i, index in enumerate(part):
        row = rows[index]
        new = i == 0 or rows[part[i - 1]].prompt_key != row.prompt_key
        total += sum(map(len, row.responses)) + (len(row.prompt) if new else 0)
    return total


@given(
    shape=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)), max_size=20),
    num_micro=st.integers(1, 8),
    budget=st.integers(1, 60),
)
@settings(max_examples=120, deadline=None)
def test_micro_batches_cover_the_step_in_order(shape, num_micro, budget):
    rows = [make_row(i, f"p{p}", prompt_tokens=n, response_tokens=r) for i, (p, n, r) in enumerate(shape)]
    indices = np.arange(len(rows))[::-1].copy()
    for parts in (
        micro_batches(rows, indices, num_micro=num_micro),
        micro_batches(rows, indices, tokens=budget),
    ):
        assert all(len(part) for part in parts)
        assert [i for part in parts for i in part] == indices.tolist()
    sizes = [len(p) for p in micro_batches(rows, indices, num_micro=num_micro)]
    assert len(sizes) == min(num_micro, len(rows))
    assert not sizes or max(sizes) - min(sizes) <= 1
    parts = micro_batches(rows, indices, tokens=budget)
    for this, following in itertools.pairwise(parts):
        assert tree_tokens(rows, [*this, following[0]]) > budget, "a row that still fits goes in"
    assert all(tree_tokens(rows, part) <= budget or len(part) == 1 for part in parts)


def test_a_shared_prompt_counts_once():
    rows = [make_row(i, "same", prompt_tokens=10, response_tokens=1) for i in range(4)]  # 10 + 2 tokens each
    assert [len(p) for p in micro_batches(rows, np.arange(4), tokens=16)] == [3, 1]
    rows = [make_row(i, f"p{i}", prompt_tokens=10, response_tokens=1) for i in range(4)]
    assert [len(p) for p in micro_batches(rows, np.arange(4), tokens=16)] == [1, 1, 1, 1]


def test_exactly_one_of_the_two_ways_is_chosen():
    for both in ({}, {"num_micro": 1, "tokens": 5}):
        with pytest.raises(ValueError, match="exactly one"):
            micro_batches([make_row()], np.arange(1), **both)


@pytest.mark.slow
@pytest.mark.parametrize("stratified", [False, True])
def test_two_hundred_thousand_rows_plan_within_a_second(stratified):
    row = make_row()
    rows = [Row(str(i), row.prompt, row.responses, row.roles, i % 5, f"p{i // 2}") for i in range(200_000)]
    strata = {"strata": [r.group for r in rows], "strata_probs": [0.2] * 5} if stratified else {}
    start = time.perf_counter()
    Plan(rows, seed=0, batch_size=64, n_epochs=1, **strata).step_rows(7)
    assert time.perf_counter() - start < 2.0, "1 s on an idle core, twice that on a busy one"
