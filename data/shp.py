"""stanfordnlp/SHP: pairs of Reddit comments ordered by score (Ethayarajh et al. 2022, arXiv 2110.08420)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from data.files import GroupedSettings, Reader, by_prompt, group_of, load_examples
from data.jsonl import RawRow, field_of
from data.schema import Example
from utils import UserError

COLUMNS = ("history", "human_ref_A", "human_ref_B", "labels", "score_A", "score_B")


@dataclass(frozen=True, kw_only=True)
class Settings(GroupedSettings):
    """min_score_ratio: pairs whose higher score is less than this many times the lower are skipped (>= 1)."""

    hub: str | None = "stanfordnlp/SHP"
    min_score_ratio: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_score_ratio < 1.0:
            raise UserError(f"data.<name>.min_score_ratio={self.min_score_ratio}: must be at least 1; try 2")


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """Pairs by split; of one prompt, the pair with the best comment comes last (it is the SFT target)."""
    reader = Reader(name, settings, {*COLUMNS, settings.group_field or "group"})
    splits = load_examples(
        reader, settings, lambda row: convert(row, settings, name, reader.counts), by_prompt
    )
    return {split: best_last(examples) for split, examples in splits.items()}


def convert(row: RawRow, settings: Settings, name: str, counts: Counter[str]) -> list[Example]:
    """One pair, or none when the scores are too close. labels=1: A is preferred."""
    history = field_of(row, "history", "text")
    texts = [" " + field_of(row, key, "text") for key in ("human_ref_A", "human_ref_B")]
    scores = [field_of(row, key, "number") for key in ("score_A", "score_B")]
    label = field_of(row, "labels", "integer")
    if label not in (0, 1):
        raise row.bad(f"must be 1 (A preferred) or 0, found {label}", "labels")
    low, high = sorted(scores)
    if high < settings.min_score_ratio * low:
        counts[f"pairs skipped: score ratio below {settings.min_score_ratio:g}"] += 1
        return []
    winner = 0 if label == 1 else 1
    return [
        Example(
            uid=str(row.line),
            prompt=f"\n\nHuman: {history}\n\nAssistant:",
            responses=(("chosen", texts[winner]), ("rejected", texts[1 - winner])),
            group=group_of(row, settings.group_field, name),
            meta={"chosen_score": scores[winner]},
        )
    ]


def best_last(examples: list[Example]) -> list[Example]:
    """Within a prompt's run of pairs, move the pair whose winner has the highest score to the end."""
    ordered: list[Example] = []
    start = 0
    for end in range(1, len(examples) + 1):
        if end == len(examples) or examples[end].prompt != examples[start].prompt:
            run = examples[start:end]
            best = max(range(len(run)), key=lambda i: run[i].meta["chosen_score"])
            ordered += [*run[:best], *run[best + 1 :], run[best]]
            start = end
    return [replace(example, meta={}) for example in ordered]
