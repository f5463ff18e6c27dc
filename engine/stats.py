"""Intervals that are honest about n: proportions, means, clustered data, paired runs, and the worst of several groups.

NumPy and SciPy only. Every interval is two-sided at ``level`` and every estimate carries the n behind it. Examples that share
a prompt are not independent: where a ``clusters`` argument exists, n counts clusters (prompts), not rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta, norm
from scipy.stats import t as student_t

from utils import stream

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate, its two-sided interval and what it rests on.

    n       independent units: examples, clusters or seeds; ``low`` and ``high`` are NaN where n cannot give them
    stderr  standard error of the estimate; NaN where the interval does not come from one
    """

    estimate: float
    low: float
    high: float
    n: int
    level: float = 0.95
    stderr: float = math.nan

    def excludes(self, value: float = 0.0) -> bool:
        """Whether the interval leaves out ``value`` (False where there is no interval)."""
        return bool(self.low > value or self.high < value)


def _check_level(level: float) -> float:
    """The error probability 1 - level."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level={level}: must be between 0 and 1; the usual choice is 0.95")
    return 1.0 - level


def _finite(values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(
            f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite; drop them first"
        )
    return array


# ---------------------------------------------------------------------------------------------- proportions


def wilson_bounds(successes: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
    """Wilson (1927) score bounds for proportions, element by element.

    successes  may be half-integers: a tie counts 1/2. A tie varies less than a coin, so the bounds stay valid.
    Returns (low, high) in [0, 1]; NaN where n is 0.
    """
    z = norm.isf(_check_level(level) / 2.0)
    k, m = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    if (m < 0).any() or (k < 0).any() or (k > m).any():
        raise ValueError("a proportion needs 0 <= successes <= n")
    m = np.where(m > 0, m, np.nan)
    p = k / m
    scale = 1.0 + z * z / m
    centre = (p + z * z / (2.0 * m)) / scale
    half = z * np.sqrt(p * (1.0 - p) / m + z * z / (4.0 * m * m)) / scale
    # at k = 0 and k = n the bounds are exactly 0 and 1; rounding must not move them
    low = np.where(k == 0, np.where(np.isnan(m), np.nan, 0.0), centre - half)
    high = np.where(k == m, 1.0, centre + half)
    return low, high


def wilson(successes: float, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of one proportion (see ``wilson_bounds``)."""
    low, high = wilson_bounds(successes, n, level)
    estimate = successes / n if n else math.nan
    return Interval(estimate, float(low), float(high), int(n), level)


# ---------------------------------------------------------------------------------------------- means


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """Student-t interval of a mean of independent values, e.g. one number per seed. One value: no interval."""
    return cluster_mean(values, None, level)


def cluster_mean(values: ArrayLike, clusters: Sequence | NDArray | None, level: float = 0.95) -> Interval:
    """Mean of all values with a t interval that lets values of one cluster depend on each other in any way.

    The mean is the ratio (sum of cluster sums) / (sum of cluster sizes); its variance is the linearised one,
    C/(C-1) * sum_c (S_c - mean * n_c)^2 / N^2, with C - 1 degrees of freedom (Cochran 1977, section 6.3; with one value per
    cluster it is the ordinary s^2/n). ``clusters=None``: every value is its own cluster.
    """
    alpha = _check_level(level)
    sums, counts = _cluster_sums(_finite(values), clusters)
    num = len(counts)
    if num == 0:
        return Interval(math.nan, math.nan, math.nan, 0, level)
    total = counts.sum()
    mean = float(sums.sum() / total)
    if num == 1:
        return Interval(mean, math.nan, math.nan, 1, level)
    variance = num / (num - 1) * float(((sums[:, 0] - mean * counts) ** 2).sum()) / float(total) ** 2
    stderr = math.sqrt(variance)
    half = float(student_t.isf(alpha / 2.0, num - 1)) * stderr
    return Interval(mean, mean - half, mean + half, num, level, stderr)


def _cluster_sums(values: Array, clusters: Sequence | NDArray | None) -> tuple[Array, Array]:
    """(C, K) sums and (C,) counts per cluster of values (N,) or (N, K)."""
    table = values.reshape(len(values), -1)
    if clusters is None:
        return table, np.ones(len(table))
    if len(clusters) != len(table):
        raise ValueError(f"{len(table)} values but {len(clusters)} cluster labels")
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(index).astype(np.float64)
    sums = np.stack([np.bincount(index, weights=column) for column in table.T], axis=1)
    return sums, counts


def effective_clusters(clusters: Sequence | NDArray) -> float:
    """(sum of cluster sizes)^2 / (sum of their squares): as many independent values vary as much as the mean over clusters whose
    values are all alike. The number of clusters where they are of one size, fewer where a few hold most values."""
    _, sizes = np.unique(np.asarray(clusters), return_counts=True)
    return float(sizes.sum()) ** 2 / float((sizes.astype(np.float64) ** 2).sum())


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence | NDArray | None,
    statistic: Callable[[Array, Array], Array] | None = None,
    level: float = 0.95,
    seed: int = 0,
    draws: int = 2000,
) -> Interval:
    """Percentile bootstrap interval that resamples whole clusters (prompts).

    values     (N,) or (N, K); only their sums and counts per cluster are kept
    statistic  maps resampled totals (..., K) and counts (...) to the statistic (...); default: the first column's mean
    seed       of the named stream "stats/bootstrap": the same data and seed give the same interval everywhere

    The tails are widened for C clusters as in Hesterberg (2015, "expanded percentile"), without which the percentile interval
    is too narrow by about sqrt(1 - 1/C) and by t against z.
    """
    alpha = _check_level(level)
    sums, counts = _cluster_sums(_finite(values), clusters)
    num = len(counts)
    function = statistic or (lambda totals, size: totals[..., 0] / size)
    if num == 0:
        return Interval(math.nan, math.nan, math.nan, 0, level)
    estimate = float(function(sums.sum(axis=0), counts.sum()))
    if num == 1:
        return Interval(estimate, math.nan, math.nan, 1, level)
    rng = stream(seed, "stats/bootstrap", num, draws)
    block = max(1, 4_000_000 // num)  # at most 32 MB of multinomial counts at a time
    results = []
    for start in range(0, draws, block):
        times = rng.multinomial(num, np.full(num, 1.0 / num), size=min(block, draws - start)).astype(
            np.float64
        )
        results.append(function(times @ sums, times @ counts))
    resampled = np.concatenate(results)
    tail = float(norm.sf(math.sqrt(num / (num - 1)) * student_t.isf(alpha / 2.0, num - 1)))
    low, high = np.quantile(resampled, [tail, 1.0 - tail])
    return Interval(estimate, float(low), float(high), num, level, float(resampled.std(ddof=1)))


def counted(record: Mapping[str, Any], metric: str) -> float:
    """What a record of an evaluated example adds to the metric's mean: losses count with the example's weight."""
    return record[metric] * (record["weight"] if metric == "loss" else 1.0)


def share_interval(wins: Sequence[float], prompts: Sequence[str]) -> Interval:
    """95 % interval of the mean of ``wins`` in [0, 1], one prompt's taken together."""
    values = np.asarray(wins, np.float64)
    num_prompts = len(set(prompts))
    if num_prompts == len(prompts):
        return wilson(float(values.sum()), len(values))
    if (
        values == values[0]
    ).all():  # all right, all wrong or all tied: every resample says the same, with no width
        n = effective_clusters(prompts)
        return replace(wilson(float(values[0]) * n, n), estimate=float(values[0]), n=num_prompts)
    return cluster_bootstrap(values, prompts, seed=0)


# ---------------------------------------------------------------------------------------------- two runs


def paired_difference(
    a: ArrayLike, b: ArrayLike, clusters: Sequence | NDArray | None = None, level: float = 0.95
) -> Interval:
    """Mean of a - b where a[i] and b[i] are two runs on the same example i, clustered by prompt.

    What both runs find hard cancels, so this resolves differences that two separate intervals cannot.
    """
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired values must be two vectors of one length, got {a.shape} and {b.shape}")
    return cluster_mean(a - b, clusters, level)


def paired_over_seeds(a: Mapping[int, float], b: Mapping[int, float], level: float = 0.95) -> Interval:
    """Mean of a[seed] - b[seed] over the seeds both have, with a t interval."""
    seeds = sorted(set(a) & set(b))
    return mean_interval([a[seed] - b[seed] for seed in seeds], level)


def needed_n(interval: Interval, power: float = 0.8) -> float:
    """The n at which an interval like this one would exclude 0 with probability ``power``, were its estimate the truth.

    Smallest n >= 2 with (t_{1-alpha/2, n-1} + t_{power, n-1}) * s / sqrt(n) <= |estimate|, s the standard deviation of one unit.
    Infinite for an estimate of 0, NaN without a standard error.
    """
    alpha = _check_level(interval.level)
    if math.isnan(interval.stderr):
        return math.nan
    if interval.estimate == 0.0:
        return math.inf
    ratio = (
        abs(interval.estimate) / (interval.stderr * math.sqrt(interval.n))
        if interval.stderr > 0
        else math.inf
    )

    def enough(n: int) -> bool:
        return (student_t.isf(alpha / 2.0, n - 1) + student_t.isf(1.0 - power, n - 1)) / math.sqrt(n) <= ratio

    high = 2
    while not enough(high):
        high *= 2
        if high > 1 << 60:
            return math.inf
    low = max(2, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return float(low)


# ---------------------------------------------------------------------------------------------- the worst group


def worst_group_bounds(successes: ArrayLike, n: ArrayLike, level: float = 0.95) -> tuple[Array, Array]:
    """Bounds for min_g p_g from successes (..., G) of n (..., G); groups without examples are left out.

    Write g* for the truly worst group, L_g and U_g for one-sided bounds.
    low   min_g L_g with Wilson's L_g at level 1 - alpha/2. It is at most L_{g*}, which is at most p_{g*}: no correction
          needed.
    high  min_g U_g at level 1 - alpha/(2G). It is above min_g p_g only when EVERY U_g is, and when groups tie each of them
          can fail, so this end needs the simultaneous level. Bonferroni, because groups may share prompts; Clopper and
          Pearson's exact U_g, because at such levels Wilson's fails up to three times too often for shares near 1.
    The interval of the group that happens to look worst ignores that it was selected: its estimate is too low and its
    coverage falls with G (`python -m plot_scripts.worst_group_simulation`).
    """
    alpha = _check_level(level)
    k, m = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(n, np.float64))
    some = m > 0
    groups = np.maximum(some.sum(axis=-1, keepdims=True), 1)
    low, _ = wilson_bounds(k, m, level)
    high = np.where(k < m, beta.isf(alpha / (2.0 * groups), k + 1.0, np.maximum(m - k, 1e-9)), 1.0)
    ends = (np.min(bound, axis=-1, where=some, initial=np.inf) for bound in (low, high))
    low, high = (np.where(some.any(axis=-1), end, np.nan) for end in ends)
    return low, high


def worst_group_interval(successes: Sequence[float], n: Sequence[int], level: float = 0.95) -> Interval:
    """Interval for the accuracy of the worst group, which knows that it is a minimum (see ``worst_group_bounds``).

    ``estimate`` is the smallest observed proportion (biased downwards: read the interval), ``n`` the size of that group.
    """
    k, m = np.asarray(successes, np.float64), np.asarray(n, np.float64)
    if k.shape != m.shape or k.ndim != 1:
        raise ValueError(f"one count of successes per group size: got {k.shape} and {m.shape}")
    if not (m > 0).any():
        return Interval(math.nan, math.nan, math.nan, 0, level)
    low, high = worst_group_bounds(k, m, level)
    shares = np.divide(k, m, out=np.full(k.shape, np.inf), where=m > 0)
    worst = int(shares.argmin())
    return Interval(float(shares[worst]), float(low), float(high), int(m[worst]), level)
