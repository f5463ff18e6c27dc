"""Anthropic/hh-rlhf: pairs of whole dialogues whose shared beginning is the prompt (Bai et al. 2022, arXiv 2204.05862)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from data.files import GroupedSettings, Reader, by_prompt, group_of, load_examples
from data.jsonl import RawRow, field_of
from data.pairs import shared_end
from data.schema import Example

MARKER = "\n\nAssistant:"


@dataclass(frozen=True, kw_only=True)
class Settings(GroupedSettings):
    """hh has nothing of its own but its place and that the end of a long dialogue is what matters."""

    hub: str | None = "Anthropic/hh-rlhf"
    truncation_mode: str = "keep_end"


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """Pairs by split. The data do not depend on the run's ``seed``."""
    reader = Reader(name, settings, {"chosen", "rejected", settings.group_field or "group"})
    return load_examples(
        reader, settings, lambda row: [convert(row, settings, name, reader.counts)], by_prompt
    )


def convert(row: RawRow, settings: Settings, name: str, counts: Counter[str]) -> Example:
    """One pair. The prompt ends at the last "Assistant:" up to which the two dialogues agree.

    In nearly all rows that is the last "Assistant:" of both. In the others (5 of 2,312 in harmless-base/test) the
    dialogues part at an earlier turn, and one response holds further turns; they are counted.
    """
    chosen, rejected = field_of(row, "chosen", "text"), field_of(row, "rejected", "text")
    end = shared_end((chosen, rejected), MARKER)
    if end is None:
        raise row.bad("the two dialogues share no beginning that ends in '\\n\\nAssistant:'; drop the row")
    if MARKER in chosen[end:] or MARKER in rejected[end:]:
        counts["pairs whose dialogues part before the last turn: the prompt ends where they part"] += 1
    if chosen == rejected:
        counts["pairs of equal responses"] += 1
    return Example(
        uid=str(row.line),
        prompt=chosen[:end],
        responses=(("chosen", chosen[end:]), ("rejected", rejected[end:])),
        group=group_of(row, settings.group_field, name),
    )
