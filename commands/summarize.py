"""Tables of what runs reached, and which differences between methods the data can tell apart.

    python -m commands.summarize runs/ipo_* runs/gr_ipo_* metric=loss,rewards/accuracies out=tables

metric=A,B        default: loss and rewards/accuracies, where logged
split=test,eval   the first of these in which the metric was logged
group=A,B         of all, mean, worst and the groups' names; default: all of them
by=  labels=      what a method is and what it is called, as for make_figures
baseline=METHOD   compare the others with this one only; default: every pair
out=DIR           also write summary.md, summary.csv, differences.csv and summary.tex
entity= project= filters= cache=   runs from Weights & Biases instead (no records there: seeds only)

A method's number is the mean over its seeds of each run's last evaluation, with a 95 % t interval; for a single run the interval is the one
over its examples. Differences are paired: over the seeds that both methods have (would other seeds agree?) and over the prompts both were
evaluated on, from records/ (would other prompts agree, for these very models?), examples of one prompt taken together.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from config.build import build
from engine.stats import Interval, counted, needed_n, paired_difference, paired_over_seeds
from plot_scripts.aggregate import LEVEL, Bar, bar, collect, warnings_about
from plot_scripts.load import Loaded, RunInfo, read_rows
from plot_scripts.panels import group_label
from plot_scripts.sources import load, parse_words, run
from utils import UserError, did_you_mean, make_folder

USUAL = ("loss", "rewards/accuracies")


@dataclass(frozen=True)
class Request:
    """The words of the command line."""

    runs: list[str] = field(default_factory=list)
    metric: list[str] | None = None
    split: str = "test,eval"
    group: list[str] | None = None
    by: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    baseline: str | None = None
    out: str | None = None
    entity: str | None = None
    project: str | None = None
    filters: dict[str, Any] = field(default_factory=dict)
    cache: str | None = None
    refresh: bool = False


@dataclass(frozen=True)
class Difference:
    """a - b of one metric and group. ``seeds``, ``prompts``: None where the two have none in common."""

    a: str
    b: str
    split: str
    metric: str
    group: str
    seeds: Interval | None
    prompts: Interval | None


# ---------------------------------------------------------------------------------------------- numbers


def cells(loaded: Loaded, request: Request) -> list[tuple[str, str, str, Bar]]:
    """(split, metric, group, number) of every method, in the order of the tables."""
    found = []
    logged = {m for _, _, m, _ in loaded.series if "/ci_" not in m}
    splits = sorted({split for _, split, _, _ in loaded.series})
    if not {s.strip() for s in request.split.split(",")} & set(splits):
        raise UserError(
            f"split={request.split}: not logged{did_you_mean(request.split, splits)}; logged: {', '.join(splits)}"
        )
    for metric in request.metric or [m for m in USUAL if m in logged]:
        split = loaded.first_split(request.split, metric)
        names = ["", "mean_group", "worst_group", *loaded.groups(split, metric)]
        for group in _chosen(names, request.group):
            for method in loaded.methods:
                number = bar(loaded, method, split, metric, group)
                if number is not None:
                    found.append((split, metric, group, number))
        if not any(m == metric for _, m, _, _ in found):
            raise UserError(
                f"metric={metric}: not logged in {request.split}{did_you_mean(metric, logged)}; logged: {', '.join(sorted(logged))}"
            )
    return found


def _chosen(names: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    if wanted is None:
        return list(names)
    known = {group_label(g): g for g in names}
    for name in wanted:
        if name not in known:
            raise UserError(
                f"group={name}: no such group{did_you_mean(name, known)}; groups: {', '.join(known)}"
            )
    return [known[name] for name in wanted]


def method_pairs(loaded: Loaded, baseline: str | None) -> list[tuple[str, str]]:
    """Every pair of methods, or every method and the baseline."""
    methods = loaded.methods
    if baseline is None:
        return list(itertools.combinations(methods, 2))
    if baseline not in methods:
        known = ", ".join(methods)
        raise UserError(
            f"baseline={baseline}: no such method{did_you_mean(baseline, methods)}; methods: {known}"
        )
    return [(m, baseline) for m in methods if m != baseline]


def differences(
    loaded: Loaded, pairs: Sequence[tuple[str, str]], numbers: Sequence[tuple[str, str, str, Bar]]
) -> list[Difference]:
    """The pairs' differences in every number of the tables; losses only where they are the same function."""
    places = list(dict.fromkeys((split, metric, group) for split, metric, group, _ in numbers))
    found = []
    for a, b in pairs:
        for split, metric, group in places:
            if metric == "loss" and not same_loss(loaded, a, b):
                continue
            seeds = _over_seeds(loaded, a, b, split, metric, group)
            prompts = _over_prompts(loaded, a, b, split, metric, group)
            if seeds is not None or prompts is not None:
                found.append(Difference(a, b, split, metric, group, seeds, prompts))
    return found


def same_loss(loaded: Loaded, a: str, b: str) -> bool:
    """Whether the two methods' losses measure the same thing: no setting of ``loss.*`` that both have differs, its name aside.

    A group-robust run logs its base loss; DPO and IPO, or two betas, are different scales.
    """
    first, second = (loaded.of(m)[0].config for m in (a, b))
    common = [k for k in first if k in second and k.startswith("loss.") and k != "loss.name"]
    return all(first[k] == second[k] for k in common)


def _last_by_seed(loaded: Loaded, method: str, split: str, metric: str, group: str) -> dict[int, float]:
    """{seed: last value}; of several runs with one seed their mean (a warning tells)."""
    values: dict[int, list[float]] = {}
    for info, _, y in collect(loaded, method, split, metric, group):
        if info.seed is not None:
            values.setdefault(info.seed, []).append(float(y[-1]))
    return {seed: float(np.mean(v)) for seed, v in values.items()}


def _over_seeds(loaded: Loaded, a: str, b: str, split: str, metric: str, group: str) -> Interval | None:
    first, second = (_last_by_seed(loaded, m, split, metric, group) for m in (a, b))
    return paired_over_seeds(first, second, LEVEL) if set(first) & set(second) else None


def _over_prompts(loaded: Loaded, a: str, b: str, split: str, metric: str, group: str) -> Interval | None:
    """Examples both methods were evaluated on; each example's value is a mean over the method's runs (the common seeds', if any).

    A loss per token is the examples' sum over all their tokens, as it is logged."""
    if group in ("mean_group", "worst_group"):
        return None
    runs = {m: loaded.of(m) for m in (a, b)}
    common = {i.seed for i in runs[a]} & {i.seed for i in runs[b]}
    if common:
        runs = {m: [i for i in infos if i.seed in common] for m, infos in runs.items()}
    name = group.removeprefix("group_") if group else None
    first, second = (_example_values(infos, split, metric, name) for infos in (runs[a], runs[b]))
    uids = [uid for uid in first if uid in second]
    if not uids:
        return None
    scale = 1.0
    if metric == "loss" and runs[a][0].config.get("loss.unit") == "token":
        scale = len(uids) / sum(first[uid][2] for uid in uids)
    values = [[scale * table[uid][1] for uid in uids] for table in (first, second)]
    return paired_difference(*values, clusters=[first[uid][0] for uid in uids], level=LEVEL)


def _example_values(
    runs: Sequence[RunInfo], split: str, metric: str, group: str | None
) -> dict[str, tuple[str, float, int]]:
    """{uid: (prompt, mean over the runs, tokens)} of the examples that every run evaluated."""
    tables = [_records(info.source, split) for info in runs]
    if not tables or not all(tables):
        return {}
    found = {}
    for uid, row in tables[0].items():
        rows = [t.get(uid) for t in tables]
        if (group is None or row["group"] == group) and all(r is not None and metric in r for r in rows):
            # losses count with the example's weight, as in the logged mean
            found[uid] = (
                row["prompt_key"],
                float(np.mean([counted(r, metric) for r in rows])),
                row["num_tokens"],
            )
    return found


@lru_cache(maxsize=256)
def _records(source: str, split: str) -> dict[str, dict[str, Any]]:
    """{uid: record} of the run's last evaluation of the split; empty where there are no records."""
    files = [p for p in Path(source).glob(f"records/{split}-*.jsonl") if p.stem.rpartition("-")[2].isdigit()]
    if not files:
        return {}
    last = max(files, key=lambda p: int(p.stem.rpartition("-")[2]))
    return {row["uid"]: row for row in read_rows(last)}


# ---------------------------------------------------------------------------------------------- writing


def decimals(half: float) -> int:
    """Digits after the point that show two significant digits of the half-width."""
    return 4 if not half > 0 or not math.isfinite(half) else min(8, max(0, 1 - math.floor(math.log10(half))))


def number(value: float, low: float, high: float) -> str:
    """``0.812 ± 0.013``; ``0.81 [0.74, 0.86]`` where the interval is not symmetric; the value alone where there is none."""
    if not math.isfinite(low):
        return f"{value:.4g}"
    half = (high - low) / 2.0
    digits = decimals(half)
    if abs(value - (low + high) / 2.0) <= 1e-9 * max(1.0, abs(value)):
        return f"{value:.{digits}f} ± {half:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def verdict(interval: Interval | None, unit: str) -> str:
    """``-0.30 ± 0.02 (5 seeds)``, and what it would take where 0 is not excluded."""
    if interval is None:
        return "none in common"
    text = f"{number(interval.estimate, interval.low, interval.high)} ({interval.n:,} {unit if interval.n > 1 else unit[:-1]})"
    if interval.n < 2:
        return text
    if interval.excludes(0.0):
        return f"**{text}**"
    needed = needed_n(interval)
    return f"{text}; not resolved" + (f", about {needed:,.0f} would" if math.isfinite(needed) else "")


def _grid(
    numbers: Sequence[tuple[str, str, str, Bar]], metric: str
) -> tuple[str, list[str], dict[str, dict[str, Bar]]]:
    """(split, groups, {method: {group: number}}) of one metric's table."""
    rows: dict[str, dict[str, Bar]] = {}
    groups: dict[str, None] = {}
    split = ""
    for place, name, group, value in numbers:
        if name == metric:
            split = place
            groups[group] = None
            rows.setdefault(value.method, {})[group] = value
    return split, list(groups), rows


def markdown(numbers: Sequence, found: Sequence[Difference], warnings: Sequence[str]) -> str:
    lines = ["# Summary", ""]
    lines += [f"> {w}" for w in warnings] + [""] * bool(warnings)
    for metric in dict.fromkeys(m for _, m, _, _ in numbers):
        split, groups, rows = _grid(numbers, metric)
        lines += [
            f"## {split}/{metric}",
            "",
            "| method | n | " + " | ".join(_cell(group_label(g)) for g in groups) + " |",
            "|---" * (2 + len(groups)) + "|",
        ]
        for method, row in rows.items():
            texts = [number(v.mean, v.low, v.high) if (v := row.get(g)) else "" for g in groups]
            lines.append(
                f"| {_cell(method)} | {max(v.n for v in row.values())} | " + " | ".join(texts) + " |"
            )
        lines.append("")
    lines += [
        "n: seeds. ±: 95 % t interval over seeds. [low, high]: one run, 95 % interval over its examples.",
        "",
    ]
    if found:
        lines += [
            "## Differences",
            "",
            "| a - b | metric | group | over seeds | over prompts |",
            "|---|---|---|---|---|",
        ]
        for d in found:
            cells = (
                f"{d.a} - {d.b}",
                f"{d.split}/{d.metric}",
                group_label(d.group),
                verdict(d.seeds, "seeds"),
                "" if d.group in ("mean_group", "worst_group") else verdict(d.prompts, "prompts"),
            )
            lines.append("| " + " | ".join(map(_cell, cells)) + " |")
        count = sum(i is not None and i.n > 1 for d in found for i in (d.seeds, d.prompts))
        lines += [
            "",
            f"Bold: the 95 % interval excludes 0. {count} intervals, each for itself: by chance alone about {0.05 * count:.1f} of them would.",
        ]
        lines += [
            "Not resolved: the n at which such an interval would exclude 0 in 80 % of repeats if the difference were the one seen here.",
            "",
        ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def summary_table(numbers: Sequence[tuple[str, str, str, Bar]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"method": v.method, "split": s, "metric": m, "group": group_label(g), "n": v.n}
            | {"mean": v.mean, "low": v.low, "high": v.high, "interval_over": v.interval}
            for s, m, g, v in numbers
        ]
    )


def difference_table(found: Sequence[Difference]) -> pd.DataFrame:
    names = [
        "a",
        "b",
        "split",
        "metric",
        "group",
        "over",
        "n",
        "difference",
        "low",
        "high",
        "resolved",
        "needed_n",
    ]
    rows = [
        [
            d.a,
            d.b,
            d.split,
            d.metric,
            group_label(d.group),
            unit,
            i.n,
            i.estimate,
            i.low,
            i.high,
            i.excludes(0.0),
            needed_n(i),
        ]
        for d in found
        for unit, i in (("seeds", d.seeds), ("prompts", d.prompts))
        if i is not None
    ]
    return pd.DataFrame(rows, columns=names)


def latex(numbers: Sequence[tuple[str, str, str, Bar]], found: Sequence[Difference] = ()) -> str:
    """One booktabs table per metric, and one of the differences."""
    lines = ["% \\usepackage{booktabs}; \\boldmath: the 95 % interval excludes 0", ""]
    for metric in dict.fromkeys(m for _, m, _, _ in numbers):
        split, groups, rows = _grid(numbers, metric)
        body = [
            [_tex(method), str(max(v.n for v in row.values()))]
            + [_math(v.mean, v.low, v.high) if (v := row.get(g)) else "" for g in groups]
            for method, row in rows.items()
        ]
        head = ["method", "$n$", *(_tex(group_label(g)) for g in groups)]
        lines += _tabular(f"{split}/{metric}: mean and 95 % interval", "lr" + "r" * len(groups), head, body)
    if found:
        body = [
            [_tex(f"{d.a} - {d.b}"), _tex(f"{d.split}/{d.metric}"), _tex(group_label(d.group))]
            + [cell for i in (d.seeds, d.prompts) for cell in _tex_difference(i)]
            for d in found
        ]
        head = ["$a - b$", "metric", "group", "over seeds", "$n$", "over prompts", "$n$"]
        lines += _tabular("paired differences and 95 % intervals", "lllrrrr", head, body)
    return "\n".join(lines)


def _tabular(title: str, columns: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [" & ".join(row) + " \\\\" for row in (head, *body)]
    return [
        f"% {title}", f"\\begin{{tabular}}{{{columns}}}", "\\toprule", rows[0], "\\midrule", *rows[1:], "\\bottomrule",
        "\\end{tabular}", "",
    ]  # fmt: skip


def _math(value: float, low: float, high: float) -> str:
    return "$" + number(value, low, high).replace("±", "\\pm").replace(" [", "\\ [") + "$"


def _tex_difference(interval: Interval | None) -> tuple[str, str]:
    """(difference, n), set in bold where 0 is excluded."""
    if interval is None:
        return "", ""
    text = _math(interval.estimate, interval.low, interval.high)
    resolved = interval.n > 1 and interval.excludes(0.0)
    return f"{{\\boldmath {text}}}" if resolved else text, f"{interval.n}"


def _tex(text: str) -> str:
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def main(words: Sequence[str]) -> list[Path]:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return []
    request = build(Request, parse_words(words, lists=("runs", "metric", "group", "by"), paths="runs"), "")
    _records.cache_clear()
    loaded = load(request)
    numbers = cells(loaded, request)
    pairs = method_pairs(loaded, request.baseline)
    found = differences(loaded, pairs, numbers)
    warnings = warnings_about(loaded, loaded.methods)
    if any(metric == "loss" for _, metric, _, _ in numbers):
        warnings += [
            f"{a} and {b}: not compared by loss, their losses are different functions"
            for a, b in pairs
            if not same_loss(loaded, a, b)
        ]
    text = markdown(numbers, found, warnings)
    print(text)
    if request.out is None:
        return []
    out = Path(request.out)
    make_folder(out)
    contents = {
        "summary.md": text,
        "summary.csv": summary_table(numbers).to_csv(index=False, lineterminator="\n"),
        "differences.csv": difference_table(found).to_csv(index=False, lineterminator="\n"),
        "summary.tex": latex(numbers, found),
    }
    for name, content in contents.items():
        (out / name).write_text(content, encoding="utf-8")
    return [out / name for name in contents]


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
