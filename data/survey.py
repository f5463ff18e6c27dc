"""What the survey sources (goqa, oqa) share: answers as letters, text-encoded lists, pairs from answer frequencies."""

from __future__ import annotations

import ast
import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.jsonl import RawRow, describe
from data.pairs import ranked_pairs

LETTERS = string.ascii_uppercase
Pairs = list[tuple[int, int]]


def lettered(options: Sequence[str]) -> str:
    """A line ``A. option`` for each option, each preceded by a newline."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def literal(row: RawRow, key: str, value: Any) -> Any:
    """A Python literal written as text, ``"['Yes', 'No']"`` or ``"defaultdict(<class 'list'>, {..})"``, never run.

    A value that is already a list or an object is returned as it is.
    """
    if isinstance(value, list | dict):
        return value
    if not isinstance(value, str):
        raise row.bad(f"text that holds a list or an object is due, found {describe(value)}", key)
    start, end = value.find("{"), value.rfind("}")
    text = value[start : end + 1] if value.startswith("defaultdict(") and 0 <= start < end else value
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise row.bad(
            f"{describe(value)} is no list or object ({type(error).__name__}: {error})", key
        ) from None


def option_texts(row: RawRow, key: str, value: Any) -> list[str]:
    """The answer options of a row as texts."""
    options = literal(row, key, value)
    if not isinstance(options, list | tuple):
        raise row.bad(f"a list of options is due, found {describe(options)}", key)
    if len(options) > len(LETTERS):
        raise row.bad(f"{len(options)} options, but there are {len(LETTERS)} letters; shorten the list", key)
    return [str(option) for option in options]


def check_frequencies(row: RawRow, key: str, values: Any) -> tuple[float, ...]:
    """Answer frequencies: finite numbers, none negative."""
    if not isinstance(values, list | tuple):
        raise row.bad(f"a list of probabilities is due, found {describe(values)}", key)
    for value in values:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or value < 0
        ):
            raise row.bad(f"probabilities are due, finite and not negative, found {describe(value)}", key)
    return tuple(float(value) for value in values)


# ---------------------------------------------------------------------------------------------- pairs


def best_of(frequencies: Sequence[float]) -> int:
    """The most frequent answer; the first of several."""
    return int(np.argmax(np.asarray(frequencies)))


def best_random(frequencies: Sequence[float], rng: np.random.Generator) -> Pairs:
    """The best answer against one drawn uniformly from the less frequent ones; none where all are equal."""
    best = best_of(frequencies)
    others = [i for i, f in enumerate(frequencies) if f < frequencies[best]]
    return [(best, others[int(rng.integers(len(others)))])] if others else []


def best_worst(frequencies: Sequence[float]) -> Pairs:
    """The best answer against the least frequent one (the first of several)."""
    best, worst = best_of(frequencies), int(np.argmin(np.asarray(frequencies)))
    return [(best, worst)] if frequencies[worst] < frequencies[best] else []


def ranked(frequencies: Sequence[float], max_pairs: int, rng: np.random.Generator) -> Pairs:
    """Up to ``max_pairs`` drawn without replacement from all (more frequent, less frequent), the best answer's last."""
    pairs = ranked_pairs(frequencies)
    chosen = rng.choice(len(pairs), size=min(max_pairs, len(pairs)), replace=False) if pairs else []
    return [pairs[k] for k in sorted(chosen)]


def softmax_pair(frequencies: Sequence[float], rng: np.random.Generator) -> Pairs:
    """Two different answers drawn with weights exp(frequency), the more frequent one chosen; none if equal."""
    weights = np.exp(np.asarray(frequencies, dtype=np.float64))
    i, j = rng.choice(len(weights), size=2, replace=False, p=weights / weights.sum())
    return [
        pair for pair in ((int(i), int(j)), (int(j), int(i))) if frequencies[pair[0]] > frequencies[pair[1]]
    ]
