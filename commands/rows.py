"""Labelled pairs as JSONL rows: written by commands.sample, completed by commands.annotate, read by ``datasets=[local]``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data import local
from data.jsonl import RawRow, read_jsonl
from data.schema import Example, Text
from utils import UserError, make_folder, write_atomic

Json = dict[str, Any]
KEPT_SCALARS = (
    "p_chosen",
    "margin",
)  # of the labelled pair itself; preferences belong to one scorer and are made anew


def to_row(example: Example) -> Json:
    """The labelled pair with all its columns, without auxiliary responses.

    Completions of a chat prompt become lists of messages even where the source had plain text.
    """
    chat = not isinstance(example.prompt, str)
    scalars = {k: example.scalars[k] for k in KEPT_SCALARS if k in example.scalars}
    return {
        "uid": example.uid,
        "prompt": example.prompt,
        "chosen": _completion(example.response("chosen"), chat),
        "rejected": _completion(example.response("rejected"), chat),
        "group": example.group,
        "weight": example.weight,
        **scalars,
    }


def _completion(text: Text, chat: bool) -> Text | list[dict[str, str]]:
    return [{"role": "assistant", "content": text}] if chat and isinstance(text, str) else text


def add_auxiliary(row: Json, texts: Sequence[str], finished: Sequence[bool]) -> None:
    """Put 2M responses (first, second, first, ..) and whether each ended by itself into ``row``."""
    chat = not isinstance(row["prompt"], str)
    pairs = [_completion(text, chat) for text in texts]
    row["aux_responses"] = [list(pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
    row["aux_finished"] = [list(pair) for pair in zip(finished[::2], finished[1::2], strict=True)]


@dataclass(frozen=True)
class Labelled:
    """One row of a file: as it is there, and as an Example whose uid is the row's own (else ``file:line``)."""

    row: Json
    example: Example


def read(path: Path) -> list[Labelled]:
    """All rows, each with ``chosen`` and ``rejected``. Raises UserError naming file, line and key."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    settings, found = local.Settings(path=str(path)), []
    seen: dict[str, int] = {}
    counts: Counter[str] = Counter()
    for raw in read_jsonl(path, counts):
        if not isinstance(raw, RawRow):
            raise raw
        if "chosen" not in raw:
            raise raw.bad(
                f"no such column; auxiliary preferences are for labelled pairs; found {sorted(raw.values)}",
                "chosen",
            )
        (example,) = local.convert(raw, settings, path.stem, counts)
        uid = str(raw.values.get("uid", raw.where))
        if uid in seen:
            raise raw.bad(f"{uid!r} is also the name of line {seen[uid]}; names must differ", "uid")
        seen[uid] = raw.line
        found.append(Labelled(dict(raw.values) | {"uid": uid}, replace(example, uid=uid)))
    if not found:
        raise UserError(f"{path}: no rows")
    return found


def without_preferences(row: Mapping[str, Any]) -> Json:
    """The row without what an annotation adds, whichever of the two forms it has."""
    return {k: v for k, v in row.items() if k not in (*local.PREFERENCES, "aux_preferences", "annotation")}


def without_auxiliary(row: Mapping[str, Any]) -> Json:
    """The labelled pair alone."""
    dropped = (*local.AUXILIARY, *local.PREFERENCES, "annotation", "aux_from")
    return {k: v for k, v in row.items() if k not in dropped}


def as_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A whole JSONL file, atomically."""
    make_folder(path.parent)
    write_atomic(path, as_lines(rows))
