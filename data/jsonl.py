"""The strict JSONL reader, and what every reader shares: a row with its place, typed access, quarantine.

A bad row is one message, ``file:line: key: problem; fix``. Nothing is skipped, defaulted or rounded silently:
what is accepted though unusual (a byte order mark, CRLF, blank lines, unknown keys) is counted.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from utils import UserError

T = TypeVar("T")


class BadRow(UserError):
    """One row that cannot be used. ``where`` is ``file:line``; the message is ``file:line: [key: ]problem; fix``."""

    def __init__(self, where: str, problem: str, key: str | None = None) -> None:
        super().__init__(f"{where}: {key}: {problem}" if key else f"{where}: {problem}")
        self.where = where
        self.reason = f"{key}: {problem}" if key else problem


@dataclass(frozen=True)
class RawRow:
    """One row as read: ``values`` are JSON values (all text when ``textual``, as in CSV).

    names maps our column names to the file's own where they differ, so that messages speak the file's language.
    """

    file: str
    line: int
    values: Mapping[str, Any]
    textual: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.file}:{self.line}"

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def bad(self, problem: str, key: str | None = None) -> BadRow:
        """The error to raise for this row; ``key`` is our name for the column."""
        if key:  # "responses[2]" is a part of the column "responses"
            column = re.split(r"[\[.]", key, maxsplit=1)[0]
            key = self.names.get(key, self.names.get(column, column) + key[len(column) :])
        return BadRow(self.where, problem, key)

    def renamed(self, columns: Mapping[str, str | None]) -> RawRow:
        """The row with our names: ``{ours: theirs}``; ``{ours: None}`` hides a column of that name."""
        taken = {theirs for theirs in columns.values() if theirs is not None}
        values = {k: v for k, v in self.values.items() if k not in taken and k not in columns}
        for ours, theirs in columns.items():
            if theirs is None:
                continue
            if theirs not in self.values:
                raise self.bad(
                    f"no such column (columns: {{{ours}: {theirs}}}); found {sorted(self.values)}", theirs
                )
            values[ours] = self.values[theirs]
        return replace(self, values=values, names={o: t for o, t in columns.items() if t is not None})


# ---------------------------------------------------------------------------------------------- typed access


def field_of(row: RawRow, key: str, kind: str) -> Any:
    """The value of ``key`` as ``kind``: "text", "number", "probability", "integer", "list" or "value".

    number       int or float, finite (float is returned); from CSV, text that is a number
    probability  a float in [0, 1]; an integer is refused, since a column of 0s and 1s is more often a label
    list         a JSON list; from CSV, text that is a JSON list
    value        whatever is there

    Raises BadRow naming file, line and key when the column is missing or holds something else.
    """
    if key not in row.values:
        raise row.bad(f"no such column; found {sorted(row.values)}", key)
    return checked(row, key, row.values[key], kind)


def checked(row: RawRow, key: str, value: Any, kind: str) -> Any:
    """``value`` (of column ``key``, or part of it) as ``kind``; see field_of."""
    if row.textual and kind not in ("text", "value"):
        value = _parse_cell(row, key, value, kind)
    fits, due, convert = _KINDS[kind]
    if not fits(value):
        raise row.bad(f"{due} is due, found {describe(value)}{_fix(value, kind)}", key)
    return convert(value)


def _is_number(value: Any) -> bool:
    # abs(int) < 1e308 keeps float() from overflowing on integers of hundreds of digits
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e308


def _same(value: Any) -> Any:
    return value


_KINDS: dict[str, tuple[Callable[[Any], bool], str, Callable[[Any], Any]]] = {
    "text": (lambda v: isinstance(v, str), "text", _same),
    "number": (_is_number, "a finite number", float),
    "probability": (lambda v: isinstance(v, float) and 0.0 <= v <= 1.0, "a float in [0, 1]", float),
    "integer": (lambda v: isinstance(v, int) and not isinstance(v, bool), "an integer", int),
    "list": (lambda v: isinstance(v, list), "a list", _same),
    "value": (lambda v: True, "anything", _same),
}


def _fix(value: Any, kind: str) -> str:
    if kind == "probability" and value in (0, 1) and not isinstance(value, bool | float):
        return f"; write {value}.0"
    return ""


def describe(value: Any) -> str:
    """``the number 3``, ``null``, ``a list``: what a value is, in the words of JSON, cut to a short length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "the boolean " + ("true" if value else "false")
    if isinstance(value, int | float):
        return f"the number {value:g}" if isinstance(value, float) else f"the integer {str(value)[:40]}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("..." if len(value) > 40 else "")
    return {list: "a list", dict: "an object"}.get(type(value), f"a {type(value).__name__}")


def _parse_cell(row: RawRow, key: str, cell: str, kind: str) -> Any:
    """A CSV cell as the JSON value it stands for; text that is no such value is returned as it is."""
    if kind == "list":
        try:
            return parse_json(cell)
        except ValueError as error:
            raise row.bad(f"a JSON list is due: {error}", key) from None
    try:
        return int(cell) if kind == "integer" else float(cell)
    except ValueError:
        return cell


# ---------------------------------------------------------------------------------------------- JSON, strictly


class _Strict(ValueError):
    """A JSON text that the lenient parser of the standard library would have let through."""


def _reject_constant(name: str) -> Any:
    raise _Strict(f"{name} is no JSON number; leave the key out, or write a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Strict(f"the number {text} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
        raise _Strict(f"{twice}: this key occurs twice; keep one")
    return values


_decoder = json.JSONDecoder(
    parse_constant=_reject_constant, parse_float=_finite, object_pairs_hook=_unique_keys
)
_surrogate = re.compile("[\ud800-\udfff]")


def parse_json(text: str) -> Any:
    """A JSON value, strictly: no duplicate keys, no NaN or Infinity, no lone surrogates. Raises ValueError."""
    try:
        value = _decoder.decode(text)
    except RecursionError:
        raise _Strict("nested too deeply") from None
    # only an escape can bring a surrogate in: the text itself was decoded from UTF-8
    if "\\u" in text:
        _check_surrogates(value, None)
    return value


def _check_surrogates(value: Any, key: str | None) -> None:
    if isinstance(value, str):
        if found := _surrogate.search(value):
            at = f"{key}: " if key else ""
            raise _Strict(f"{at}lone surrogate \\u{ord(found.group()):04x} is no character; repair the text")
    elif isinstance(value, dict):
        for inner, item in value.items():
            _check_surrogates(inner, inner)
            _check_surrogates(item, inner)
    elif isinstance(value, list):
        for item in value:
            _check_surrogates(item, key)


# ---------------------------------------------------------------------------------------------- files


def open_bytes(path: Path) -> BinaryIO:
    """The file's bytes, decompressed when its name ends in .gz."""
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def byte_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(1-based number, line with its newline), split at b"\\n" alone. A damaged file raises UserError."""
    number = 0
    try:
        with open_bytes(path) as handle:
            for number, line in enumerate(handle, start=1):
                yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(
            f"{path}:{number + 1}: damaged or truncated gzip file ({error}); fetch it again"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_jsonl(path: Path, counts: Counter[str]) -> Iterator[RawRow | BadRow]:
    """Every row of a .jsonl or .jsonl.gz file, a BadRow in the place of one that is no JSON object.

    Lines end at "\\n" only, so U+2028 may stand inside a string. A byte order mark, CRLF and blank lines are
    accepted and counted in ``counts``.
    """
    for number, raw in byte_lines(path):
        line = raw
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
            counts["byte order mark skipped"] += 1
        if line.endswith(b"\r\n"):
            counts["lines that end in CRLF"] += 1
        if not line.strip():
            counts["blank lines skipped"] += 1
            continue
        yield _parse_line(path, number, line)


def _parse_line(path: Path, number: int, line: bytes) -> RawRow | BadRow:
    where = f"{path}:{number}"
    try:
        values = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(where, f"not UTF-8 at byte {error.start + 1} of the line; convert the file to UTF-8")
    except _Strict as error:
        return BadRow(where, str(error))
    except json.JSONDecodeError as error:
        # only the last line of a file can lack its newline
        cut = "" if line.endswith(b"\n") else "; the last line is truncated, fetch the file again"
        return BadRow(where, f"not JSON: {error.msg} at column {error.colno}{cut}")
    except ValueError as error:  # e.g. an integer of more digits than Python converts
        return BadRow(where, f"not JSON: {error}")
    if not isinstance(values, dict):
        return BadRow(where, f"a JSON object is due, found {describe(values)}; one object a line")
    return RawRow(str(path), number, values)


# ---------------------------------------------------------------------------------------------- bad rows


@dataclass(frozen=True)
class BadRowPolicy:
    """What a bad row does: ``raise`` stops at the first; ``quarantine`` sets it aside, up to a fraction."""

    on_bad_row: str = "raise"
    max_bad_fraction: float = 0.001


@dataclass(frozen=True)
class Rejected:
    """A row set aside: where it stands and why."""

    where: str
    reason: str

    def as_json(self) -> str:
        return json.dumps({"where": self.where, "reason": self.reason})


def collect(
    rows: Iterable[RawRow | BadRow],
    convert: Callable[[RawRow], T],
    policy: BadRowPolicy,
    counts: Counter[str],
    known: Collection[str],
) -> tuple[list[T], list[Rejected], int]:
    """Convert every row -> (converted, rejected, rows seen). Keys outside ``known`` are counted, not refused.

    Raises the first BadRow, or, in quarantine, a UserError when more than ``max_bad_fraction`` of the rows are bad.
    """
    done: list[T] = []
    rejected: list[Rejected] = []
    total = 0
    for row in rows:
        total += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if row.values.keys() - known:
                counts["rows with keys that are not used"] += 1
            done.append(convert(row))
        except BadRow as error:
            if policy.on_bad_row == "raise":
                raise
            rejected.append(Rejected(error.where, error.reason))
    if len(rejected) > policy.max_bad_fraction * total:
        first = rejected[0]
        raise UserError(
            f"{first.where}: {first.reason} -- and {len(rejected) - 1} more: {len(rejected)} of {total} rows are bad, "
            f"more than max_bad_fraction={policy.max_bad_fraction:g} allows; repair the file or raise the limit"
        )
    return done, rejected, total
