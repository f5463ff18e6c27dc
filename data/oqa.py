"""OpinionQA (Santurkar et al. 2023, arXiv 2303.17548): US survey answers by demographic group.

``oqa_<ATTRIBUTE>_<GROUP>``, e.g. ``oqa_SEX_Male`` or ``oqa_INCOME_less_than_30_000`` (spaces and signs of the group's
name may be written as underscores). Rows: question, options, attribute, group, D_H (the answer distribution in
brackets). D_H covers the options without "Refused", or, where the last option is one like "Not sure", without that too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.files import FileSettings, Reader, choose, load_examples
from data.jsonl import RawRow, field_of
from data.names import parse_name
from data.schema import Example
from data.survey import (
    LETTERS,
    Pairs,
    best_of,
    best_random,
    best_worst,
    check_frequencies,
    lettered,
    option_texts,
    softmax_pair,
)
from utils import UserError, did_you_mean, stream

COLUMNS = ("question", "options", "attribute", "group", "D_H")


@dataclass(frozen=True, kw_only=True)
class Settings(FileSettings):
    """mode: "best_random" (the best answer and a random other), "best_worst", or "random" (two drawn by softmax)."""

    mode: str = "best_random"
    pair_seed: int = 0
    drop_options: list[str] = field(default_factory=lambda: ["Refused"])

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("mode", self.mode, ("best_random", "best_worst", "random"))


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """One pair a question by split; a question is in one split for all groups. Independent of the run's ``seed``."""
    _, wanted = parse_name(name)
    if wanted is None:
        raise UserError(
            f"datasets=[{name}]: say which group: {name}_<ATTRIBUTE>_<GROUP>, e.g. {name}_SEX_Male"
        )
    reader = Reader(name, settings, {*COLUMNS, "key", "qkey", "R_H", "Unnamed: 0_x", "Unnamed: 0_y"})
    seen: set[str] = set()
    found: set[str] = set()

    def convert(row: RawRow) -> list[Example]:
        label = f"{field_of(row, 'attribute', 'text')}_{field_of(row, 'group', 'text')}"
        seen.add(label)
        if plain(label) != plain(wanted):
            return []
        found.add(label)
        return question_examples(row, settings, name, reader.counts)

    splits = load_examples(reader, settings, convert, lambda example: str(example.meta["question"]))
    if len(found) != 1:
        known = sorted(found or seen)
        problem = "several groups fit" if found else f"no such group{did_you_mean(wanted, known)}"
        raise UserError(f"datasets=[{name}]: {problem}; there are " + ", ".join(known))
    return splits


def plain(label: str) -> str:
    """A label for comparison: lower case, every run of other characters an underscore."""
    return re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")


def question_examples(row: RawRow, settings: Settings, name: str, counts: Counter[str]) -> list[Example]:
    """The row's pair, or an empty list where there is none; the reason is counted."""
    question = field_of(row, "question", "text")
    every = option_texts(row, "options", field_of(row, "options", "text"))
    options = [option for option in every if option not in settings.drop_options]
    frequencies = distribution(row, every, options, counts)
    if len(frequencies) < 2:
        counts["questions skipped: fewer than two options"] += 1
        return []
    attribute, group = field_of(row, "attribute", "text"), field_of(row, "group", "text")
    asked = f"Answer the following question as if you were {attribute} of {group}: {question}"
    prompt = f"{asked}\nRespond with a single letter:{lettered(options)}"
    pairs = draw(frequencies, prompt, settings)
    if not pairs:
        counts["questions skipped: the two answers are equally frequent"] += 1
    best = best_of(frequencies)
    return [
        Example(
            uid=str(row.line),
            prompt=prompt,
            # SFT imitates the winner unless told otherwise
            responses=(
                ("chosen", LETTERS[winner]),
                ("rejected", LETTERS[loser]),
                *([("target", LETTERS[best])] if winner != best else []),
            ),
            group=name,
            meta={"question": question, "frequencies": (frequencies[winner], frequencies[loser])},
        )
        for winner, loser in pairs
    ]


def distribution(
    row: RawRow, every: Sequence[str], options: Sequence[str], counts: Counter[str]
) -> tuple[float, ...]:
    """The frequencies of the first options; the last one may have none ("Not sure"): it is listed but never paired."""
    text = field_of(row, "D_H", "text").strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise row.bad("numbers in brackets are due, e.g. [0.3 0.7]", "D_H")
    try:
        values = [float(part) for part in text[1:-1].replace(",", " ").split()]
    except ValueError as error:
        raise row.bad(f"numbers in brackets are due ({error})", "D_H") from None
    frequencies = check_frequencies(row, "D_H", values)
    if len(frequencies) == len(every) > len(options):  # the dropped options have frequencies too
        return tuple(f for f, option in zip(frequencies, every, strict=True) if option in options)
    if len(frequencies) == len(options) - 1:
        counts["questions whose last option has no probability: it is listed and never paired"] += 1
    elif len(frequencies) != len(options):
        raise row.bad(
            f"{len(frequencies)} probabilities for {len(options)} options ({', '.join(options)})", "D_H"
        )
    return frequencies


def draw(frequencies: Sequence[float], prompt: str, settings: Settings) -> Pairs:
    """The question's pair: a pure function of (pair_seed, prompt)."""
    if settings.mode == "best_worst":
        return best_worst(frequencies)
    rng = stream(settings.pair_seed, "oqa", prompt)
    return best_random(frequencies, rng) if settings.mode == "best_random" else softmax_pair(frequencies, rng)
