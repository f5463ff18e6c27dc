"""Intervals against independent computations and against their own promise (coverage by simulation)."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from engine.stats import (
    Interval,
    cluster_bootstrap,
    cluster_mean,
    effective_clusters,
    mean_interval,
    needed_n,
    paired_difference,
    paired_over_seeds,
    wilson,
    wilson_bounds,
    worst_group_bounds,
    worst_group_interval,
)
from plot_scripts.worst_group_simulation import DESIGNS, simulate
from plot_scripts.worst_group_simulation import main as simulation
from utils import stream


@pytest.mark.parametrize(
    ("k", "n", "level"), [(7, 10, 0.95), (0, 12, 0.95), (12, 12, 0.9), (133, 200, 0.99), (1, 3, 0.5)]
)
def test_wilson_equals_scipys(k, n, level):
    ours = wilson(k, n, level)
    theirs = scipy_stats.binomtest(k, n).proportion_ci(level, method="wilson")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.estimate == k / n
    assert ours.n == n


def test_wilson_takes_half_successes_and_solves_the_score_equation():
    low, high = wilson_bounds(6.5, 11, 0.95)
    z = scipy_stats.norm.ppf(0.975)
    for p in (low, high):
        assert abs(6.5 / 11 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 11), abs=1e-12)
    assert low < 6.5 / 11 < high


def test_wilson_of_nothing_is_nan_and_impossible_counts_are_refused():
    assert math.isnan(wilson(0, 0).low)
    assert math.isnan(wilson(0, 0).high)
    with pytest.raises(ValueError, match="successes"):
        wilson(4, 3)
    with pytest.raises(ValueError, match="level"):
        wilson(1, 3, level=95)


def test_mean_interval_equals_scipys_t_interval():
    values = [1.0, 2.5, 2.0, 4.0]
    ours = mean_interval(values, 0.9)
    low, high = scipy_stats.t.interval(0.9, 3, loc=np.mean(values), scale=scipy_stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=1e-12)
    assert ours.stderr == pytest.approx(scipy_stats.sem(values))


def test_one_value_has_no_interval_and_nan_is_refused():
    assert mean_interval([3.0]).estimate == 3.0
    assert math.isnan(mean_interval([3.0]).low)
    assert not mean_interval([3.0]).excludes(0.0)
    with pytest.raises(ValueError, match="not finite"):
        mean_interval([1.0, math.nan])


def test_cluster_mean_equals_the_cluster_robust_regression_by_hand():
    values = np.array([1.0, 2.0, 6.0, 3.0, 3.5, 9.0])
    clusters = ["a", "a", "b", "c", "c", "c"]
    mean = values.mean()
    residual = {"a": (values[:2] - mean).sum(), "b": values[2] - mean, "c": (values[3:] - mean).sum()}
    variance = 3 / 2 * sum(r * r for r in residual.values()) / 36
    got = cluster_mean(values, clusters)
    assert got.estimate == pytest.approx(mean)
    assert got.stderr == pytest.approx(math.sqrt(variance))
    assert got.n == 3
    assert got.high - got.estimate == pytest.approx(scipy_stats.t.ppf(0.975, 2) * math.sqrt(variance))


def test_duplicating_every_row_inside_its_cluster_does_not_narrow_the_interval():
    values = stream(0, "test/rows").normal(size=40)
    keys = np.arange(40)
    once, twice = cluster_mean(values, keys), cluster_mean(np.repeat(values, 2), np.repeat(keys, 2))
    assert twice.stderr == pytest.approx(once.stderr)
    boot_once = cluster_bootstrap(values, keys)
    boot_twice = cluster_bootstrap(np.repeat(values, 2), np.repeat(keys, 2))
    assert (boot_twice.low, boot_twice.high) == pytest.approx((boot_once.low, boot_once.high))


def test_bootstrap_agrees_with_t_and_takes_a_statistic_of_sums():
    rng = stream(1, "test/boot")
    table = rng.normal(loc=[2.0, 5.0], size=(300, 2))
    mean = cluster_bootstrap(table[:, 0], None, draws=4000)
    exact = mean_interval(table[:, 0])
    assert (mean.low, mean.high) == pytest.approx((exact.low, exact.high), abs=0.02)
    ratio = cluster_bootstrap(table, None, statistic=lambda totals, _: totals[..., 0] / totals[..., 1])
    assert ratio.estimate == pytest.approx(table[:, 0].sum() / table[:, 1].sum())
    assert ratio.low < ratio.estimate < ratio.high
    assert cluster_bootstrap(table[:, 0], None, draws=4000) == mean
    assert cluster_bootstrap(table[:, 0], None, draws=4000, seed=1) != mean


def test_the_bootstrap_divides_by_the_rows_that_it_drew():
    """Clusters of unequal size and equal mean: every resample has that mean, only the number of its rows changes."""
    sizes = [2, 4, 8, 2, 20]
    clusters = np.repeat(np.arange(5), sizes)
    found = cluster_bootstrap(np.tile([0.0, 1.0], sum(sizes) // 2), clusters)
    assert (found.estimate, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))


def test_the_bootstrap_of_few_clusters_is_as_wide_as_students_t():
    """Eight normal scores: without the factor for C clusters in the tail it is 6 % narrower."""
    scores = scipy_stats.norm.isf((np.arange(8) + 0.5) / 8)
    found, exact = cluster_bootstrap(scores, None, draws=20000), mean_interval(scores)
    assert (found.high - found.low) / (exact.high - exact.low) == pytest.approx(1.0, abs=0.03)


def test_cluster_bootstrap_covers_with_few_clusters():
    """400 data sets of 12 prompts x 4 rows: 95 % should cover; the plain percentile interval gives about 90 %."""
    rng = stream(2, "test/coverage")
    keys = np.repeat(np.arange(12), 4)
    hits = 0
    for i in range(400):
        rows = np.repeat(rng.normal(size=12), 4) + 0.5 * rng.normal(size=48)
        interval = cluster_bootstrap(rows, keys, seed=i, draws=400)
        hits += interval.low <= 0.0 <= interval.high
    assert 0.92 <= hits / 400 <= 0.985


def test_pairing_resolves_what_two_separate_intervals_cannot():
    rng = stream(3, "test/paired")
    hard = rng.normal(size=200)
    a, b = hard + 0.1 + 0.05 * rng.normal(size=200), hard + 0.05 * rng.normal(size=200)
    paired = paired_difference(a, b, np.arange(200))
    assert paired.excludes(0.0)
    assert paired.low < 0.1 < paired.high
    assert mean_interval(a).low < mean_interval(b).high
    assert paired_difference(b, a, np.arange(200)).estimate == -paired.estimate
    with pytest.raises(ValueError, match="one length"):
        paired_difference(a, b[:3])


def test_equal_runs_do_not_differ():
    same = paired_difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (same.estimate, same.low, same.high) == (0.0, 0.0, 0.0) and not same.excludes(0.0)
    assert Interval(-0.5, -1.0, -0.1, 3).excludes(0.0) and not Interval(-0.5, -1.0, 0.0, 3).excludes(0.0)


def test_paired_over_seeds_uses_common_seeds_only():
    got = paired_over_seeds({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.0, 7: 3.0})
    assert got.n == 2
    assert got.estimate == 0.75


def test_needed_n_is_where_the_interval_starts_to_exclude_zero():
    rng = stream(4, "test/needed")
    interval = mean_interval(0.1 + rng.normal(size=50))
    fixed = Interval(0.3, -1.0, 1.6, 50, 0.95, 1.0 / math.sqrt(50))  # standard deviation 1, effect 0.3
    n = needed_n(fixed)
    assert 88 <= n <= 92  # ((1.96 + 0.84) / 0.3)^2 = 87.2, a little more for t
    draws = rng.normal(loc=0.3, size=(4000, int(n)))
    half = scipy_stats.t.ppf(0.975, n - 1) * draws.std(axis=1, ddof=1) / math.sqrt(n)
    assert np.mean(draws.mean(axis=1) - half > 0) == pytest.approx(0.8, abs=0.02)
    assert needed_n(interval) > 2
    assert needed_n(Interval(0.0, -1, 1, 9, 0.95, 0.5)) == math.inf
    assert math.isnan(needed_n(wilson(3, 5)))


# ---------------------------------------------------------------------------------------------- the worst group


def test_worst_group_corrects_the_end_towards_the_other_groups_only():
    interval = worst_group_interval([30, 45.5], [50, 50])
    assert (interval.estimate, interval.n) == (0.6, 50)
    assert interval.low == pytest.approx(wilson(30, 50).low)
    exact = scipy_stats.binomtest(30, 50).proportion_ci(
        1 - 0.05 / 2, method="exact"
    )  # two groups: half the error each
    assert interval.high == pytest.approx(exact.high)
    assert interval.high > wilson(30, 50).high


def test_worst_group_ignores_empty_groups_and_lets_a_small_group_widen_the_low_end():
    assert worst_group_interval([30, 0, 45], [50, 0, 50]) == worst_group_interval([30, 45], [50, 50])
    assert worst_group_interval([70, 7], [100, 10]).low < worst_group_interval([70, 70], [100, 100]).low
    assert math.isnan(worst_group_interval([0], [0]).estimate)
    low, high = worst_group_bounds([[30, 0, 45], [30, 30, 45]], [[50, 0, 50], [50, 50, 50]])
    assert low.shape == high.shape == (2,)
    assert high[0] == pytest.approx(worst_group_interval([30, 45], [50, 50]).high)
    exact = scipy_stats.binomtest(30, 50).proportion_ci(1 - 0.05 / 3, method="exact")
    assert high[1] == pytest.approx(exact.high)
    assert worst_group_interval([50, 40], [50, 40]).high == 1.0


def test_worst_group_interval_covers_in_every_design_and_the_naive_one_does_not():
    results = {row["design"]: row for row in simulate(draws=4000, seed=0)}
    assert set(results) == set(DESIGNS)
    for row in results.values():
        assert row["coverage"] >= 0.94
        assert row["width"] >= row["naive_width"] * 0.95
        assert row["bias"] <= 0.002  # the smallest observed share is never too high on average
    assert results["tied"]["naive_coverage"] < 0.90
    assert results["tied"]["bias"] < -0.05


def test_the_worst_groups_interval_covers_where_one_prompt_has_most_rows():
    """Rows of a prompt that agree are one observation, and one of 24 prompts holds half of each group's."""
    sizes = np.array([1] * 23 + [23])
    n = effective_clusters(np.repeat(np.arange(24), sizes))
    assert n == pytest.approx(46**2 / (23 + 23**2)) and effective_clusters(list("aabb")) == 2
    right = stream(6, "test/unequal prompts").random((4000, 3, 24)) < 0.7
    low, high = worst_group_bounds((right @ sizes) / 46 * n, n)
    assert ((low <= 0.7) & (high >= 0.7)).mean() >= 0.94
    low, high = worst_group_bounds((right @ sizes) / 46 * 24, 24)  # all prompts counted alike
    assert ((low <= 0.7) & (high >= 0.7)).mean() < 0.8


def test_the_simulation_prints_and_writes_its_numbers(tmp_path, capsys):
    written = simulation(["draws=500", f"out={tmp_path}"])
    assert {p.suffix for p in written} == {".pdf", ".png", ".csv", ".json"}
    rows = json.loads((tmp_path / "worst_group_simulation.json").read_text())["rows"]
    assert rows == simulate(draws=500, seed=0)
    assert all(row["design"] in capsys.readouterr().out for row in rows[:1])
    assert all(row["coverage"] + row["below"] + row["above"] == pytest.approx(1.0) for row in rows)


def test_worst_group_interval_covers_many_small_groups_with_shares_near_one():
    """Where Wilson's bound for the upper end would cover 92.7 % only."""
    n = np.full(14, 27)
    successes = stream(7, "test/near one").binomial(n, 0.956, size=(4000, 14))
    low, high = worst_group_bounds(successes, n)
    assert ((low <= 0.956) & (high >= 0.956)).mean() >= 0.95
