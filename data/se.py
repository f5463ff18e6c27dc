"""HuggingFaceH4/stack-exchange-preferences: answers to a question, ordered by their votes."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser

from data.files import GroupedSettings, Reader, by_prompt, choose, group_of, load_examples
from data.jsonl import RawRow, checked, field_of
from data.pairs import ranked_pairs
from data.schema import Example


@dataclass(frozen=True, kw_only=True)
class Settings(GroupedSettings):
    """ties: what two answers of equal score give: "skip" (no pair) or "later_wins" (as the DPO repository has it)."""

    hub: str | None = "HuggingFaceH4/stack-exchange-preferences"
    test_fraction: float = 0.01
    ties: str = "skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("ties", self.ties, ("skip", "later_wins"))


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """All pairs of answers by split; the last pair of a question has its best answer (the SFT target)."""
    reader = Reader(name, settings, {"question", "answers", settings.group_field or "group"})
    return load_examples(reader, settings, lambda row: convert(row, settings, name, reader.counts), by_prompt)


def convert(row: RawRow, settings: Settings, name: str, counts: Counter[str]) -> list[Example]:
    """Every pair of answers of one question, the higher ``pm_score`` chosen."""
    prompt = f"\n\nHuman: {plain_text(field_of(row, 'question', 'text'))}\n\nAssistant:"
    answers = [
        _answer(row, answer, f"answers[{i}]") for i, answer in enumerate(field_of(row, "answers", "list"))
    ]
    pairs = ranked_pairs([score for _, score in answers], settings.ties)
    counts["pairs skipped: equal scores"] += len(answers) * (len(answers) - 1) // 2 - len(pairs)
    if not pairs:
        counts["questions without a pair"] += 1
    return [
        Example(
            uid=f"{row.line}#{k}",
            prompt=prompt,
            responses=(("chosen", answers[winner][0]), ("rejected", answers[loser][0])),
            group=group_of(row, settings.group_field, name),
        )
        for k, (winner, loser) in enumerate(pairs)
    ]


def _answer(row: RawRow, answer: object, key: str) -> tuple[str, float]:
    if not isinstance(answer, dict):
        raise row.bad("an object with text and pm_score is due", key)
    for part in ("text", "pm_score"):
        if part not in answer:
            raise row.bad(f"no {part}; found {sorted(answer)}", key)
    text = checked(row, f"{key}.text", answer["text"], "text")
    return " " + plain_text(text), checked(row, f"{key}.pm_score", answer["pm_score"], "number")


# ---------------------------------------------------------------------------------------------- HTML

BLOCKS = {
    "p",
    "div",
    "pre",
    "ul",
    "ol",
    "li",
    "blockquote",
    "table",
    "tr",
    "hr",
    "br",
    *(f"h{i}" for i in range(1, 7)),
}
HIDDEN = {"script", "style"}


def plain_text(html: str) -> str:
    """The text of an HTML fragment: blocks apart by a blank line, white space collapsed, code kept as it is between
    ``<code>`` and ``</code>``."""
    parser = _TextOf()
    parser.feed(html)
    parser.close()
    return parser.text()


class _TextOf(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[str] = [""]
        self.code = 0  # depth of <code>
        self.hidden = 0  # depth of <script> and <style>

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS and not self.code:
            self.blocks.append("")
        elif tag == "code":
            self.code += 1
            if self.code == 1:
                self.blocks[-1] += "<code>"
        elif tag in HIDDEN:
            self.hidden += 1

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS and not self.code:
            self.blocks.append("")
        elif tag == "code" and self.code:
            self.code -= 1
            if self.code == 0:
                self.blocks[-1] += "</code>"
        elif tag in HIDDEN and self.hidden:
            self.hidden -= 1

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.blocks[-1] += data if self.code else re.sub(r"\s+", " ", data)

    def text(self) -> str:
        if self.code:  # an unclosed <code>: close it, so that what follows is not read as code
            self.blocks[-1] += "</code>"
        return "\n\n".join(block.strip(" ") for block in self.blocks if block.strip())
