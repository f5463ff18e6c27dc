"""Splitting by key: the same key is never in two splits, and adding rows moves no others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from data.schema import Example, Text
from utils import stream_seed

T = TypeVar("T")

SPLITS = ("train", "validation", "test")


def prompt_key(prompt: Text) -> str:
    """A text equal for equal prompts (messages as JSON)."""
    if isinstance(prompt, str):
        return prompt
    return json.dumps([[m["role"], m["content"]] for m in prompt])


def position(split_seed: int, key: str, purpose: str = "split") -> float:
    """Where a key falls in [0, 1): uniform over keys, a pure function of the arguments, independent by purpose."""
    # 53 bits: every value is exact in a float, and below 1
    return (stream_seed(split_seed, purpose, key) >> 10) / 2.0**53


def split_of(split_seed: int, key: str, test_fraction: float, validation_fraction: float) -> str:
    """The split of a key: the first ``test_fraction`` of [0, 1) is test, the next part validation."""
    at = position(split_seed, key)
    if at < test_fraction:
        return "test"
    return "validation" if at < test_fraction + validation_fraction else "train"


def without_overlap(
    splits: dict[str, list[Example]], key: Callable[[Example], str], counts: Counter[str]
) -> dict[str, list[Example]]:
    """Drop from train what is in validation or test, and from validation what is in test (by ``key``); counted."""
    seen: set[str] = set()
    kept = {}
    for split in reversed([s for s in SPLITS if s in splits]):
        kept[split] = [e for e in splits[split] if key(e) not in seen]
        if dropped := len(splits[split]) - len(kept[split]):
            counts[f"{split} examples dropped: their prompt is also in a held-out split"] += dropped
        seen.update(key(e) for e in splits[split])
    return {split: kept[split] for split in SPLITS if split in kept}


def by_first_appearance(items: Iterable[T], key: Callable[[T], Hashable]) -> list[T]:
    """Reorder so that items of one key stand together, keys in the order in which they first appear."""
    together: dict[Hashable, list[T]] = {}
    for item in items:
        together.setdefault(key(item), []).append(item)
    return [item for same in together.values() for item in same]


def check_fractions(test: float, validation: float, where: Sequence[str]) -> str | None:
    """What is wrong with two fractions whose keys are ``where``, or None."""
    for name, value in zip(where, (test, validation), strict=True):
        if not 0.0 <= value < 1.0:
            return f"{name}={value}: must be in [0, 1); try {name}=0.1"
    if test + validation >= 1.0:
        return f"{where[0]}={test}, {where[1]}={validation}: nothing is left to train on; make their sum less than 1"
    return None
