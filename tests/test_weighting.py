"""Group weights: the estimator, the ascent, the saddle point it finds, and the reference code's rule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import weighting
from config.build import build as build_config
from tests.oracles import group_robust as oracle
from utils import UserError, stream
from weighting import GroupRobust, ImportanceWeighted, Uniform

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("north", "south", "east")
COUNTS = (50, 30, 20)
PROBS = (0.5, 0.3, 0.2)


def totals(losses: list[float], groups: list[int], num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(loss sums, counts) per group."""
    sums = np.bincount(groups, weights=losses, minlength=num_groups)
    return sums, np.bincount(groups, minlength=num_groups).astype(float)


def alpha_of(state) -> list[float]:
    return [v for k, v in state.metrics().items() if k.startswith("weights/")]


def step(state, losses: list[float], groups: list[int], num_groups: int = 3) -> list[float]:
    sums, counts = totals(losses, groups, num_groups)
    state.update(sums, counts, float(len(losses)))
    return alpha_of(state)


def batches(seed: int, num: int, size: int = 8, probs=PROBS) -> list[tuple[list[float], list[int]]]:
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(1.0, 2.0, size).tolist(), rng.choice(len(probs), size, p=probs).tolist())
        for _ in range(num)
    ]  # losses of either sign


# ------------------------------------------------------------------------------------------------- example weights


def test_uniform_counts_every_example_once():
    state = Uniform().build(NAMES, COUNTS, PROBS)
    group = torch.tensor([0, 2, 1, 1])
    assert torch.equal(state.weights(group, (1, 2, 1), 4), torch.ones(4, dtype=torch.float64))
    assert state.update(np.ones(3), np.ones(3), 3.0) == {
        "weights/north": 0.5,
        "weights/south": 0.3,
        "weights/east": 0.2,
    }
    assert (
        Uniform().build(("a", "b"), (5, 0), (1.0, 0.0)).weights(torch.tensor([0]), (1, 0), 1) == 1
    )  # unused groups do no harm


def test_equal_groups_and_uniform_alpha_are_the_plain_mean():
    for name in ("total_count", "in_batch_mean"):
        state = GroupRobust(normalizer=name).build(("a", "b"), (10, 10), (0.5, 0.5))
        weights = state.weights(torch.tensor([0, 1, 1, 0]), (2, 2), 4)
        assert weights.tolist() == pytest.approx([1.0] * 4, rel=1e-15)
    assert ImportanceWeighted().build(("a", "b"), (7, 7), (0.5, 0.5)).weights(
        torch.tensor([0, 1]), (1, 1), 2
    ).tolist() == [1, 1]


@pytest.mark.parametrize(
    "settings_",
    [GroupRobust(step_size=0.3), GroupRobust(step_size=0.3, chi=0.4), ImportanceWeighted([3, 1, 1])],
)
def test_an_epoch_of_weighted_losses_is_the_weighted_sum_of_group_means(settings_):
    """(1/N) sum_i w_i loss_i = sum_g a_g mean_g, whatever the group sizes: nothing is counted twice."""
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], COUNTS)
    losses = rng.normal(size=100)
    state = settings_.build(NAMES, COUNTS, PROBS)
    for batch in batches(1, 5):
        step(state, *batch)
    weights = state.weights(torch.from_numpy(group), COUNTS, 100).numpy()
    means = [losses[group == g].mean() for g in range(3)]
    assert (weights * losses).mean() == pytest.approx(np.dot(alpha_of(state), means), rel=1e-12)
    assert sum(alpha_of(state)) == pytest.approx(1, rel=1e-12)


def test_in_batch_mean_weights_average_within_the_batch():
    """sum_i w_i loss_i / B = sum_g alpha_g mean_g over the groups present."""
    state = GroupRobust(normalizer="in_batch_mean").build(NAMES, COUNTS, PROBS)
    losses, groups = [1.0, 5.0, 3.0, 2.0], [0, 1, 1, 1]
    weights = state.weights(torch.tensor(groups), totals(losses, groups, 3)[1], 4).numpy()
    assert (weights * losses).sum() / 4 == pytest.approx((1.0 + 10 / 3) / 3, rel=1e-12)


def test_importance_weights_default_to_group_balance_and_are_normalised():
    balanced = ImportanceWeighted().build(NAMES, COUNTS, PROBS)
    assert alpha_of(balanced) == pytest.approx([1 / 3] * 3)
    per_example = balanced.weights(torch.tensor([0, 1, 2]), (1, 1, 1), 3)
    assert (per_example * torch.tensor(COUNTS)).tolist() == pytest.approx(
        [100 / 3] * 3
    )  # proportional to 1/N_g, once
    listed = ImportanceWeighted([2, 1, 1]).build(NAMES, COUNTS, PROBS)
    named = ImportanceWeighted({"east": 1, "north": 2, "south": 1}).build(NAMES, COUNTS, PROBS)
    for state in (listed, named):
        assert alpha_of(state) == [0.5, 0.25, 0.25]
        assert state.weights(torch.tensor([2]), (0, 0, 1), 1).item() == pytest.approx(0.25 / 0.2)
    robust = GroupRobust(step_size=0).build(NAMES, COUNTS, PROBS)
    step(robust, *batches(2, 1)[0])
    group = torch.tensor([0, 1, 2])
    torch.testing.assert_close(robust.weights(group, COUNTS, 3), balanced.weights(group, COUNTS, 3))


# -------------------------------------------------------------------------------------------------------- the ascent


@pytest.mark.parametrize("chi", [1.0, 0.4])
def test_ascent_equals_the_products_of_the_paper(chi):
    state = GroupRobust(step_size=0.05, chi=chi, max_exponent=50.0).build(NAMES, COUNTS, PROBS)
    alpha = [1 / 3] * 3
    for losses, groups in batches(3, 30):
        got = step(state, losses, groups)
        alpha = oracle.ascend(alpha, oracle.unbiased_group_losses(losses, groups, list(PROBS)), 0.05 * chi)
        assert got == pytest.approx([(1 - chi) / 3 + chi * a for a in alpha], rel=1e-11)
    assert max(alpha) / min(alpha) > 1.2  # it has moved
    assert state.metrics()["exponent_bound_hits"] == 0


def test_adjustment_per_group_is_divided_by_the_root_of_the_count():
    """Equal losses: only the adjustments move the weights. One value, a list, and a group with none."""
    state = GroupRobust(step_size=0.5, adj=[2.0, 0.0, -1.0]).build(NAMES, COUNTS, PROBS)
    got = step(state, [0.0] * 4, [0, 1, 2, 2])
    raised = [math.exp(0.5 * c / math.sqrt(n)) for c, n in zip((2.0, 0.0, -1.0), COUNTS, strict=True)]
    assert got == pytest.approx([r / sum(raised) for r in raised], rel=1e-12)
    state = GroupRobust(step_size=0.5, adj=2.0).build(NAMES, COUNTS, PROBS)
    raised = [math.exp(1 / math.sqrt(n)) for n in COUNTS]
    assert step(state, [0.0], [0]) == pytest.approx([r / sum(raised) for r in raised], rel=1e-12)


def test_in_batch_mean_leaves_absent_groups_exactly_alone():
    state = GroupRobust(step_size=0.2, normalizer="in_batch_mean").build(NAMES, COUNTS, PROBS)
    before = step(state, [1.0, 2.0, 4.0], [0, 1, 2])
    after = step(state, [3.0, 1.0, 2.0], [0, 2, 2])
    assert after[1] == before[1]
    shared = before[0] + before[2]
    raised = [before[0] * math.exp(0.2 * 3.0), before[2] * math.exp(0.2 * 1.5)]
    assert [after[0], after[2]] == pytest.approx([shared * r / sum(raised) for r in raised], rel=1e-12)
    assert step(state, [9.0], [1]) == pytest.approx(after, rel=1e-12)  # a lone group has nobody to gain from


def test_total_count_is_unbiased_when_groups_are_absent():
    """The mean of the update's estimates over all batches of two is the group means, by enumeration."""
    pool_losses, pool_groups = [1.0, 2.0, 6.0, 0.5], [0, 0, 1, 2]
    counts, estimates = (2, 1, 1), np.zeros(3)
    for i in range(4):
        for j in range(4):
            state = GroupRobust(step_size=1e-3).build(NAMES, counts, (0.5, 0.25, 0.25))
            log_alpha = np.log(
                step(state, [pool_losses[i], pool_losses[j]], [pool_groups[i], pool_groups[j]])
            )
            estimates += log_alpha / 16 / 1e-3
    # log alpha is known up to a common shift (and second order in the step size)
    assert estimates - estimates.mean() == pytest.approx(np.array([1.5, 6.0, 0.5]) - 8 / 3, abs=0.02)


def test_zero_step_size_and_zero_chi_keep_equal_weights():
    for settings_ in (GroupRobust(step_size=0), GroupRobust(step_size=1.0, chi=0)):
        state = settings_.build(NAMES, COUNTS, PROBS)
        for batch in batches(4, 3):
            assert step(state, *batch) == pytest.approx([1 / 3] * 3, rel=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.permutations([0, 1, 2]), st.integers(0, 999), st.sampled_from(["total_count", "in_batch_mean"]))
def test_permuting_groups_permutes_weights(order, seed, normalizer):
    settings_ = GroupRobust(step_size=0.3, chi=0.8, normalizer=normalizer)
    state = settings_.build(NAMES, COUNTS, PROBS)
    other = settings_.build(*(tuple(values[g] for g in order) for values in (NAMES, COUNTS, PROBS)))
    for losses, groups in batches(seed, 3):
        a = step(state, losses, groups)
        b = step(other, losses, [order.index(g) for g in groups])
    assert b == pytest.approx([a[g] for g in order], rel=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e8, 1e8), min_size=3, max_size=3),
    st.floats(0, 10),
    st.floats(0, 1),
    st.sampled_from(["total_count", "in_batch_mean"]),
)
def test_weights_stay_on_the_simplex_and_finite(losses, eta, chi, normalizer):
    state = GroupRobust(step_size=eta, chi=chi, normalizer=normalizer).build(NAMES, COUNTS, PROBS)
    for _ in range(5):
        got = step(state, losses, [0, 1, 2])
    assert all(math.isfinite(a) and a >= 0 for a in got) and sum(got) == pytest.approx(1, rel=1e-9)


def test_splitting_the_step_changes_nothing():
    """Sums over micro-batches are all that update sees; weights depend on the step, not on the cut."""
    losses, groups = batches(5, 1, size=8)[0]
    whole = GroupRobust(step_size=0.2).build(NAMES, COUNTS, PROBS)
    parts = GroupRobust(step_size=0.2).build(NAMES, COUNTS, PROBS)
    step(whole, losses, groups)
    sums = [totals(losses[a:b], groups[a:b], 3) for a, b in ((0, 3), (3, 8))]
    parts.update(sums[0][0] + sums[1][0], sums[0][1] + sums[1][1], 8.0)
    assert alpha_of(parts) == pytest.approx(alpha_of(whole), rel=1e-14)
    tensors = GroupRobust(step_size=0.2).build(NAMES, COUNTS, PROBS)
    tensors.update(
        torch.from_numpy(totals(losses, groups, 3)[0]), torch.from_numpy(totals(losses, groups, 3)[1]), 8.0
    )
    assert alpha_of(tensors) == alpha_of(whole)
    group = torch.tensor(groups)
    together = whole.weights(group, totals(losses, groups, 3)[1], 8)
    for size in (3, 8):  # total_count ignores the micro-batch size
        torch.testing.assert_close(
            whole.weights(group[:3], totals(losses, groups, 3)[1], size), together[:3], rtol=0, atol=0
        )


# --------------------------------------------------------------------------------------------------------- the bound


def test_bound_acts_on_differences_and_is_counted():
    state = GroupRobust(step_size=1.0, max_exponent=0.5).build(("a", "b"), (10, 10), (0.5, 0.5))
    got = step(state, [2500.0, 2500.4], [0, 1], 2)  # large but close: no bound, and shifts cancel
    assert got[1] / got[0] == pytest.approx(math.exp(0.4), rel=1e-9)
    assert state.metrics()["exponent_bound_hits"] == 0
    before = got
    after = step(state, [-1e6, 3.0], [0, 1], 2)  # negative and huge
    assert (after[1] / after[0]) / (before[1] / before[0]) == pytest.approx(math.exp(1.0), rel=1e-9)
    assert state.metrics()["exponent_bound_hits"] == 1


def test_adding_a_constant_to_every_loss_changes_nothing_when_all_groups_are_evenly_present():
    a, b = (GroupRobust(step_size=0.1).build(("a", "b"), (5, 5), (0.5, 0.5)) for _ in range(2))
    assert step(a, [1.0, 2.0], [0, 1], 2) == pytest.approx(step(b, [101.0, 102.0], [0, 1], 2), rel=1e-12)


def test_a_sum_that_is_not_finite_is_refused():
    state = GroupRobust().build(NAMES, COUNTS, PROBS)
    with pytest.raises(ValueError, match="not finite"):
        state.update([1.0, float("nan"), 0.0], [1, 1, 0], 2.0)
    assert alpha_of(state) == pytest.approx([1 / 3] * 3)


# ------------------------------------------------------------------------------------------------ the reference rule


def test_reference_rule_worked_by_hand():
    """Two optimizer steps of two micro-batches of two: the code's alpha after each step, and its gradient scale.

    Step 1, N/N_g = 2, 10/3, 5 and eta = 0.01. Micro-batch 1 has losses 3 (north) and 1 (south), micro-batch 2 has 2 (east)
    and 4 (north): log alpha moves by .01 * (2*3 + 2*4, 10/3*1, 5*2) = (.14, .0333, .10).
    """
    micro = [([3.0, 1.0], [0, 1]), ([2.0, 4.0], [2, 0])]
    state = GroupRobust(step_size=0.01, reference=True).build(NAMES, COUNTS, PROBS)
    raised = [math.exp(0.14), math.exp(0.1 / 3), math.exp(0.10)]
    after_one = [r / sum(raised) for r in raised]
    assert step(state, [3.0, 1.0, 2.0, 4.0], [0, 1, 2, 0]) == pytest.approx(after_one, rel=1e-12)
    assert oracle.reference_step([1 / 3] * 3, micro, list(COUNTS), 0.01) == pytest.approx(
        after_one, rel=1e-12
    )
    second = [([0.5, 2.5], [1, 1]), ([1.0, 1.5], [0, 2])]
    want = oracle.reference_step(after_one, second, list(COUNTS), 0.01)

    # the code backpropagates sum_g alpha_g (N/N_g) sum_{i in micro} loss_i / accumulation; ours divides by B = 4
    weights = state.weights(torch.tensor([1, 1]), (1, 2, 1), 2)
    assert (weights / 4).tolist() == pytest.approx([after_one[1] * (100 / 30) / 2] * 2, rel=1e-12)
    assert step(state, [0.5, 2.5, 1.0, 1.5], [1, 1, 0, 2]) == pytest.approx(want, rel=1e-12)


def test_reference_step_size_times_batch_size_is_ours():
    """5e-7 at batch 16 is 8e-6, with IPO's losses of 2500 at the start."""
    rng = np.random.default_rng(6)
    theirs = GroupRobust(step_size=5e-7, reference=True).build(NAMES, COUNTS, PROBS)
    ours = GroupRobust(step_size=8e-6).build(NAMES, COUNTS, PROBS)
    for _ in range(50):
        losses, groups = (2500 + 300 * rng.normal(size=16)).tolist(), rng.choice(3, 16, p=PROBS).tolist()
        assert step(theirs, losses, groups) == pytest.approx(step(ours, losses, groups), rel=1e-10)
    assert theirs.metrics()["exponent_bound_hits"] == 0
    ratio = theirs.weights(torch.tensor([0]), COUNTS, 8) / ours.weights(torch.tensor([0]), COUNTS, 8)
    assert ratio.item() == pytest.approx(8)


def test_adaptive_step_size_follows_the_learning_rate():
    state = GroupRobust(step_size=0.4, adaptive_step_size=True, step_factor=0.5).build(NAMES, COUNTS, PROBS)
    fixed = GroupRobust(step_size=0.4, step_factor=0.5).build(NAMES, COUNTS, PROBS)
    for s in (state, fixed):
        s.on_lr_cut()
        s.on_lr_cut()
    assert state.metrics()["step_size"] == 0.1 and fixed.metrics()["step_size"] == 0.4
    got = step(state, [1.0, 0.0], [0, 1])
    assert got[0] / got[1] == pytest.approx(math.exp(0.1 * 1.0 / (2 * 0.5)), rel=1e-12)


# ---------------------------------------------------------------------------------------------------- a known saddle


def play(weights_settings, probs: np.ndarray, sample: str, steps: int = 6000) -> tuple[float, list[float]]:
    """Descent-ascent on (theta - 1)^2 against (theta + 1)^2 + 1, averages of the last half.

    sample: how a step's 10 examples are drawn, always with group law ``probs``. "plain" and "mixture" draw each example;
    "uniform" deals 5 + 5.
    """
    rng = stream(0, "saddle", sample)
    state = weights_settings.build(("a", "b"), (160, 40), tuple(probs))
    theta, kept, size = 0.0, [], 10
    for t in range(steps):
        groups = np.repeat([0, 1], 5) if sample == "uniform" else (rng.random(size) >= probs[0]).astype(int)
        offset = groups.astype(float)
        centre = 1.0 - 2.0 * groups
        losses, slopes = (theta - centre) ** 2 + offset, 2 * (theta - centre)
        counts = np.bincount(groups, minlength=2).astype(float)
        w = state.weights(torch.from_numpy(groups), counts, size).numpy()
        rate = 0.3 / math.sqrt(t + 10)
        theta -= rate * float((w * slopes).sum()) / size
        state.update(np.bincount(groups, weights=losses, minlength=2), counts, float(size))
        if t >= steps // 2:
            kept.append((theta, alpha_of(state)[0]))
    theta, first = np.mean(kept, axis=0)
    return theta, [first, 1 - first]


@pytest.mark.parametrize(
    ("sample", "probs"), [("plain", (0.8, 0.2)), ("mixture", (0.35, 0.65)), ("uniform", (0.5, 0.5))]
)
def test_every_way_of_sampling_converges_to_the_closed_form_saddle(sample, probs):
    """Saddle at theta = -1/4, alpha = (3/8, 5/8); the worst group's loss there is 25/16.

    Tolerance 0.03: over 10 seeds the largest deviation was 0.0111 in theta and 0.0022 in alpha.
    """
    want_theta, want_alpha = oracle.quadratic_saddle(1.0, 1.0)
    assert (want_theta, want_alpha) == (-0.25, [0.375, 0.625])
    theta, alpha = play(GroupRobust(step_size=0.02), np.array(probs), sample)
    assert theta == pytest.approx(want_theta, abs=0.03)
    assert alpha == pytest.approx(want_alpha, abs=0.03)


def test_fixed_weights_find_the_weighted_mean_not_the_saddle():
    """Uniform on 0.8/0.2 data goes to 0.8 - 0.2 = 0.6; importance weights to the middle, 0."""
    assert play(Uniform(), np.array([0.8, 0.2]), "plain", 2000)[0] == pytest.approx(0.6, abs=0.05)
    assert play(ImportanceWeighted(), np.array([0.8, 0.2]), "plain", 2000)[0] == pytest.approx(0.0, abs=0.05)


# ------------------------------------------------------------------------------------------------ state and mistakes


def test_state_survives_json_bit_for_bit():
    settings_ = GroupRobust(step_size=0.07, adaptive_step_size=True, max_exponent=0.05)
    state, copy = (settings_.build(NAMES, COUNTS, PROBS) for _ in range(2))
    for batch in batches(7, 20):
        step(state, *batch)
    state.on_lr_cut()
    assert state.metrics()["exponent_bound_hits"] > 0
    copy.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert copy.state_dict() == state.state_dict()
    assert copy.metrics() == state.metrics()
    for batch in batches(8, 5):
        assert step(copy, *batch) == step(state, *batch)  # exact, not approximate
    for fixed in (Uniform(), ImportanceWeighted([1, 2, 3])):
        one = fixed.build(NAMES, COUNTS, PROBS)
        one.on_lr_cut()
        one.load_state_dict(json.loads(json.dumps(one.state_dict())))


def test_a_step_size_changed_at_a_restart_counts_from_there_on():
    state = GroupRobust(step_size=0.4, adaptive_step_size=True).build(NAMES, COUNTS, PROBS)
    state.on_lr_cut()
    changed = GroupRobust(step_size=0.1, adaptive_step_size=True).build(NAMES, COUNTS, PROBS)
    changed.load_state_dict(json.loads(json.dumps(state.state_dict())))
    assert changed.metrics()["step_size"] == 0.05


def test_a_checkpoint_of_other_groups_is_refused():
    for settings_ in (GroupRobust(), Uniform(), ImportanceWeighted()):
        state = settings_.build(NAMES, COUNTS, PROBS)
        saved = {**state.state_dict(), "groups": ["north", "east", "south"]}
        with pytest.raises(UserError, match="checkpoint has group weights"):
            state.load_state_dict(saved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupRobust(step_size=-1), r"weighting\.step_size=-1"),
        (lambda: GroupRobust(chi=1.5), r"weighting\.chi=1\.5"),
        (lambda: GroupRobust(step_factor=0), r"weighting\.step_factor=0"),
        (lambda: GroupRobust(max_exponent=0), r"weighting\.max_exponent=0"),
        (lambda: GroupRobust(adj=[1.0, float("inf")]), r"weighting\.adj"),
        (lambda: GroupRobust(normalizer="mean"), r"weighting\.normalizer=mean"),
        (lambda: GroupRobust(reference=True, normalizer="in_batch_mean"), r"weighting\.reference=True"),
        (lambda: GroupRobust(adj=[1.0, 2.0]).build(NAMES, COUNTS, PROBS), r"weighting\.adj=.*2 values for 3 groups"),
        (lambda: GroupRobust().build(NAMES, (5, 0, 5), (0.5, 0.0, 0.5)), r"group 'south' has 0 training examples"),
        (lambda: ImportanceWeighted([1, 2]).build(NAMES, COUNTS, PROBS), r"weighting\.imp_weights=.*2 weights for 3 groups"),
        (lambda: ImportanceWeighted({"nroth": 1}).build(NAMES, COUNTS, PROBS), r"imp_weights\.nroth=1.*did you mean 'north'"),
        (lambda: ImportanceWeighted({"north": 1}).build(NAMES, COUNTS, PROBS), r"no weight for group south, east"),
        (lambda: ImportanceWeighted([0, 0, 0]).build(NAMES, COUNTS, PROBS), r"not all 0"),
        (lambda: ImportanceWeighted([1, -1, 3]).build(NAMES, COUNTS, PROBS), r">= 0"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --------------------------------------------------------------------------------------------------------- the YAMLs

FILES = sorted((ROOT / "config" / "weighting").rglob("*.yaml"))
MOVED = {
    "step_size": {"step_size": 0.02}, "adj": {"adj": [3.0, 0.0, 1.0]}, "chi": {"chi": 0.5},
    "adaptive_step_size": {"adaptive_step_size": True}, "step_factor": {"adaptive_step_size": True, "step_factor": 0.25},
    "normalizer": {"normalizer": "in_batch_mean"}, "reference": {"reference": True}, "max_exponent": {"max_exponent": 0.001},
    "imp_weights": {"imp_weights": {"north": 1.0, "south": 2.0, "east": 3.0}},
}  # fmt: skip


def load(path: Path, **changes):
    values = yaml.safe_load(path.read_text())
    assert values.pop("name") == path.stem
    module, _, name = values.pop("class").rpartition(".")
    assert module == "weighting"
    return build_config(getattr(weighting, name), values | changes, "weighting.")


def trace(settings_) -> list[float]:
    state = settings_.build(NAMES, COUNTS, PROBS)
    out = []
    for losses, groups in batches(9, 3):
        sums, counts = totals(losses, groups, 3)
        out += state.weights(torch.tensor(groups), counts, len(groups)).tolist()
        state.update(sums, counts, float(len(groups)))
        state.on_lr_cut()
    return out


def test_there_are_three_weightings():
    assert [f.stem for f in FILES] == ["group_robust", "importance", "uniform"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_key_is_a_field_has_a_comment_and_changes_something(path):
    keys = set(yaml.safe_load(path.read_text())) - {"name", "class"}
    settings_ = load(path)
    assert keys == set(settings_.__dataclass_fields__)
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        if ":" in line and not line.startswith(("#", "class:")):
            assert lines[i - 1].startswith("#"), f"{path.name}:{i + 1} has no comment"
    for key in keys:
        before = {k: v for k, v in MOVED[key].items() if k != key}
        assert trace(load(path, **MOVED[key])) != trace(load(path, **before)), (
            f"{path.stem}: {key} has no effect"
        )
