"""Seeds -> mean and interval on a shared axis of examples, and what a reader must be told about the runs behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from config.compose import NOT_IDENTITY
from engine.stats import mean_interval, wilson_bounds
from plot_scripts.load import NOT_METHOD, Loaded, RunInfo

Array = NDArray[np.float64]
LEVEL = 0.95
MAKES_METHOD = ("loss", "weighting", "stopping", "data_selection")


@dataclass(frozen=True)
class Curve:
    """One method's metric against examples.

    x, mean, low, high, n   (P,); low and high are NaN where there is no interval; n counts seeds that are still running there
    seeds                   per run: (name, seed, its own x, its own values)
    ends                    runs that stop before the longest: (name, examples); ``carried`` says how they are drawn
    interval                "seeds" (t over seeds), "run" (one run, the bounds it recorded over its examples) or "none"
    """

    method: str
    group: str
    x: Array
    mean: Array
    low: Array
    high: Array
    n: NDArray[np.int64]
    seeds: tuple[tuple[str, int | None, Array, Array], ...]
    ends: tuple[tuple[str, float], ...]
    carried: bool
    interval: str


@dataclass(frozen=True)
class Bar:
    """One method's metric at the first or last evaluation of each of its runs."""

    method: str
    group: str
    mean: float
    low: float
    high: float
    n: int
    seeds: tuple[tuple[str, int | None, float, float], ...] = field(
        default=()
    )  # (name, seed, examples, value)
    interval: str = "none"


def _binned(x: Array, y: Array, width: float) -> tuple[Array, Array]:
    """Means of y in bins of ``width`` examples, at the bins' upper ends: what was known when the bin was full."""
    index = np.ceil(x / width - 1e-9).astype(np.int64)  # rounding must not put an end into the next bin
    bins, inverse = np.unique(index, return_inverse=True)
    return bins * width, np.bincount(inverse, weights=y) / np.bincount(inverse)


def collect(
    loaded: Loaded, method: str, split: str, metric: str, group: str, bins: int | None = None
) -> list[tuple[RunInfo, Array, Array]]:
    """The runs of a method that logged the metric: (run, examples, values). ``bins``: average over so many equal stretches."""
    found = []
    for info in loaded.of(method):
        xy = loaded.series.get((info.run, split, metric, group))
        if xy is not None:
            found.append((info, *xy))
    if bins is None or not found:
        return found
    everywhere = [x for key, (x, _) in loaded.series.items() if key[1:] == (split, metric, group)]
    longest = max(float(x[-1]) for x in everywhere)
    if max(len(x) for x in everywhere) <= bins or longest <= 0:
        return found
    return [(info, *_binned(x, y, longest / bins)) for info, x, y in found]


def curve(
    loaded: Loaded,
    method: str,
    split: str,
    metric: str,
    group: str = "",
    bins: int | None = None,
    carry: bool = False,
    until: float | None = None,
) -> Curve | None:
    """Mean over seeds at every x where one of them was measured; None if none logged the metric. ``until``: where the longest
    run of all methods ends.

    Between its own points a run is interpolated linearly; before its first it is absent; after its last it is absent or, with
    ``carry``, keeps its last value (drawn with a mark).
    """
    runs = collect(loaded, method, split, metric, group, bins)
    if not runs:
        return None
    last = max(until or 0.0, *(float(x[-1]) for _, x, _ in runs))
    grid = np.unique(np.concatenate([*(x for _, x, _ in runs), [last] * carry]))
    table = np.stack(
        [np.interp(grid, x, y, left=np.nan, right=y[-1] if carry else np.nan) for _, x, y in runs]
    )
    mean, low, high, n = t_band(table)
    interval = "seeds" if len(runs) > 1 else "none"
    if len(runs) == 1 and bins is None:
        bounds = recorded_bounds(loaded, runs[0][0].run, split, metric, group)
        if bounds is not None:
            (low, high), interval = bounds, "run"
    ends = tuple((info.run, float(x[-1])) for info, x, _ in runs if x[-1] < last)
    seeds = tuple((info.run, info.seed, x, y) for info, x, y in runs)
    return Curve(method, group, grid, mean, low, high, n, seeds, ends, carry, interval)


def t_band(table: Array, level: float = LEVEL) -> tuple[Array, Array, Array, NDArray[np.int64]]:
    """Column means of (seeds, P) with NaN for absent, and their t intervals (NaN where fewer than two seeds are present)."""
    present = np.isfinite(table)
    n = present.sum(axis=0)
    filled = np.where(present, table, 0.0)
    mean = np.where(n > 0, filled.sum(axis=0) / np.maximum(n, 1), np.nan)
    squares = (np.where(present, table - mean, 0.0) ** 2).sum(axis=0)
    df = np.maximum(n - 1, 1)
    half = np.where(
        n > 1, student_t.isf((1.0 - level) / 2.0, df) * np.sqrt(squares / df / np.maximum(n, 1)), np.nan
    )
    return mean, mean - half, mean + half, n


def recorded_bounds(
    loaded: Loaded, run: str, split: str, metric: str, group: str
) -> tuple[Array, Array] | None:
    """The 95 % bounds over examples of one run: those it logged, or, of a run that logged none at all (an older program's),
    Wilson's from its accuracies and group counts. Those would be too narrow where prompts repeat."""
    x, y = loaded.series[run, split, metric, group]
    low, high = (loaded.series.get((run, split, metric + end, group)) for end in ("/ci_low", "/ci_high"))
    if low is not None and high is not None:
        return tuple(np.where(np.isin(x, bx), np.interp(x, bx, by), np.nan) for bx, by in (low, high))
    counts = loaded.series.get((run, split, "group_counts", group))
    logs_bounds = any(key[0] == run and key[2].endswith("/ci_low") for key in loaded.series)
    if logs_bounds or not metric.endswith("accuracies") or counts is None:
        return None
    n = np.where(np.isin(x, counts[0]), np.interp(x, *counts), 0.0)
    return wilson_bounds(np.clip(y, 0.0, 1.0) * n, n, LEVEL)


def bar(
    loaded: Loaded, method: str, split: str, metric: str, group: str = "", at: str = "last"
) -> Bar | None:
    """Mean over seeds of each run's own first, last or mean value; None if none logged the metric."""
    runs = collect(loaded, method, split, metric, group)
    if not runs:
        return None
    if at == "mean":
        runs = [(info, x[-1:], np.array([y.mean()])) for info, x, y in runs]
    where = 0 if at == "first" else -1
    interval = mean_interval([y[where] for _, _, y in runs], LEVEL)
    low, high, kind = interval.low, interval.high, "seeds" if len(runs) > 1 else "none"
    if len(runs) == 1 and at != "mean":
        bounds = recorded_bounds(loaded, runs[0][0].run, split, metric, group)
        if bounds is not None:
            low, high, kind = float(bounds[0][where]), float(bounds[1][where]), "run"
    seeds = tuple((info.run, info.seed, float(x[where]), float(y[where])) for info, x, y in runs)
    return Bar(method, group, interval.estimate, low, high, len(runs), seeds, kind)


# ---------------------------------------------------------------------------------------------- what to warn about


def warnings_about(loaded: Loaded, methods: Sequence[str]) -> list[str]:
    """Missing or repeated seeds, configs that differ inside a method, several commits, uncommitted code; one sentence each."""
    runs = [info for info in loaded.runs if info.method in methods]
    found = list(loaded.notes)
    seeds = {m: [i.seed for i in runs if i.method == m] for m in methods}
    everywhere = {s for values in seeds.values() for s in values if s is not None}
    for method in methods:
        missing = sorted(everywhere - set(seeds[method]))
        if missing:
            found.append(f"{method}: no run with seed {listing(missing)}, which other methods have")
        twice = sorted({s for s in seeds[method] if s is not None and seeds[method].count(s) > 1})
        if twice:
            found.append(f"{method}: more than one run with seed {listing(twice)}")
        differing = _differing_keys([i for i in runs if i.method == method])
        if differing is not None:
            found.append(f"{method}: configs differ in {differing}")
    commits = sorted({c[:7] for i in runs for c in i.commits})
    if len(commits) > 1:
        found.append(f"runs come from {len(commits)} commits: {listing(commits)}")
    restored = sum(i.restored for i in runs)
    if restored:
        found.append(
            f"{restored} of {len(runs)} runs end with their best weights restored: the last point is theirs"
        )
    unfinished = [i.run for i in runs if not i.finished]
    if unfinished:
        found.append(f"not finished: {listing(unfinished)}")
    dirty = sum(i.dirty for i in runs)
    if dirty:
        found.append(f"{dirty} of {len(runs)} runs had uncommitted changes")
    return found


def _differing_keys(runs: Sequence[RunInfo]) -> str | None:
    """Config keys whose values differ among runs of one method; None where the hashes agree."""
    if len({i.config_hash_no_seed for i in runs}) < 2:
        return None
    keys = sorted({k for i in runs for k in i.config if not NOT_METHOD.match(k)})
    differing = [k for k in keys if len({repr(i.config.get(k)) for i in runs}) > 1]
    return (
        listing(differing) if differing else "something their saved configs do not show (the hashes differ)"
    )


def differences_between(loaded: Loaded, methods: Sequence[str]) -> list[str]:
    """Config keys, besides those that make a method (loss, weighting, stopping, what its label says), in which methods differ."""
    runs = {m: loaded.of(m) for m in methods}
    common = set.intersection(*(set(i.config) for infos in runs.values() for i in infos)) if runs else set()
    found = []
    for key in sorted(common):
        head, _, last = key.partition(".")[0], *key.rpartition(".")[1:]
        if head in MAKES_METHOD or head in NOT_IDENTITY or NOT_METHOD.match(key):
            continue
        values = {m: {repr(i.config[key]) for i in infos} for m, infos in runs.items()}
        if len({frozenset(v) for v in values.values()}) > 1 and not all(f"{last}=" in m for m in methods):
            found.append(key)
    return found


def listing(items: Sequence, most: int = 4) -> str:
    text = ", ".join(str(i) for i in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"


def absent_warning(loaded: Loaded, shown: Mapping[str, int], what: str) -> list[str]:
    """One sentence per method some of whose runs never logged what a panel shows. shown: {method: runs drawn}."""
    return [
        f"{m}: {len(loaded.of(m)) - n} of {len(loaded.of(m))} runs did not log {what}"
        for m, n in shown.items()
        if n < len(loaded.of(m))
    ]


def ends_warning(ends: Mapping[str, Mapping[str, float]], how: str) -> list[str]:
    """One sentence per method that ends before the longest run, or some of whose runs do. ends: {method: {run: examples}}."""
    longest = max((x for runs in ends.values() for x in runs.values()), default=0.0)
    found = []
    for method, runs in ends.items():
        early = {run: x for run, x in runs.items() if x < longest}
        listed = ", ".join(f"{run} at {x:,.0f}" for run, x in list(early.items())[:3])
        if early and len(early) == len(runs) and len(set(early.values())) == 1:
            listed = f"all {len(runs)} runs at {min(early.values()):,.0f}" if len(runs) > 1 else listed
        if early:
            dots = " ..." if len(early) > 3 and "all" not in listed else ""
            found.append(f"{method}: unequal lengths: {listed}{dots} of {longest:,.0f} examples; {how}")
    return found
