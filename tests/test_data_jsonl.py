"""The strict readers: every kind of bad row is one message with file, line and key; what is unusual is counted."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.jsonl import BadRow, BadRowPolicy, RawRow, collect, field_of, parse_json, read_jsonl
from data.tables import read_csv, read_parquet, read_table
from utils import UserError

GOOD = b'{"text": "a", "n": 1.5}'


def rows_of(path: Path, data: bytes, counts: Counter | None = None) -> list[RawRow | BadRow]:
    path.write_bytes(data)
    return list(read_table(path, Counter() if counts is None else counts))


def collected(path: Path, data: bytes, policy: BadRowPolicy, counts: Counter | None = None):
    path.write_bytes(data)
    counts = Counter() if counts is None else counts
    return collect(
        read_jsonl(path, counts), lambda row: field_of(row, "text", "text"), policy, counts, {"text", "n"}
    )


BAD_LINES = {
    "not an object": (b'["text"]', "a JSON object is due, found a list"),
    "no JSON": (b"text", "not JSON: Expecting value at column 1"),
    "two values": (GOOD + b" " + GOOD, "not JSON: Extra data"),
    "NaN": (b'{"text": "a", "n": NaN}', "NaN is no JSON number"),
    "Infinity": (b'{"text": "a", "n": -Infinity}', "-Infinity is no JSON number"),
    "a number too large": (b'{"text": "a", "n": 1e999}', "the number 1e999 is too large"),
    "duplicate key": (b'{"text": "a", "text": "a"}', "text: this key occurs twice"),
    "duplicate key inside": (b'{"text": "a", "m": {"k": 1, "k": 2}}', "k: this key occurs twice"),
    "bad UTF-8": (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
    "encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "lone surrogate": (b'{"text": "x\\ud83d"}', "text: lone surrogate \\ud83d is no character"),
    "lone surrogate in a list": (b'{"text": ["a", "\\udc00"]}', "text: lone surrogate \\udc00"),
    "control character": (b'{"text": "a\x00"}', "not JSON: Invalid control character"),
    "too deep": (b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "too many digits": (b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
    "missing key": (b'{"other": "a"}', "text: no such column; found ['other']"),
    "null": (b'{"text": null}', "text: text is due, found null"),
    "number": (b'{"text": 3}', "text: text is due, found the integer 3"),
    "boolean": (b'{"text": true}', "text: text is due, found the boolean true"),
    "list": (b'{"text": ["a"]}', "text: text is due, found a list"),
    "object": (b'{"text": {}}', "text: text is due, found an object"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_row_names_file_line_and_problem(tmp_path, kind):
    line, problem = BAD_LINES[kind]
    path = tmp_path / "d.jsonl"
    with pytest.raises(UserError) as caught:
        collected(path, GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n", BadRowPolicy())
    assert str(caught.value).startswith(f"{path}:3: {problem}"), str(caught.value)


@pytest.mark.parametrize("kind", BAD_LINES)
def test_quarantine_sets_exactly_the_bad_row_aside(tmp_path, kind):
    line, problem = BAD_LINES[kind]
    path = tmp_path / "d.jsonl"
    done, rejected, total = collected(
        path, GOOD + b"\n" + line + b"\n" + GOOD, BadRowPolicy("quarantine", 0.5)
    )
    assert done == ["a", "a"] and total == 3
    (row,) = rejected
    assert row.where == f"{path}:2" and row.reason.startswith(problem)
    assert json.loads(row.as_json()) == {"where": row.where, "reason": row.reason}


def test_quarantine_stops_above_the_fraction_and_names_the_first_bad_row(tmp_path):
    data = (GOOD + b"\n") * 9 + b"{}\n"
    assert len(collected(tmp_path / "d.jsonl", data, BadRowPolicy("quarantine", 0.1))[1]) == 1
    with pytest.raises(UserError, match=r"d\.jsonl:10: text: no such column.* 1 of 10 rows are bad"):
        collected(tmp_path / "d.jsonl", data, BadRowPolicy("quarantine", 0.09))


def test_bom_crlf_blank_lines_and_extra_keys_are_accepted_and_counted(tmp_path):
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n \n" + b'{"text": "b", "more": 1}\n'
    counts: Counter[str] = Counter()
    done, _, _ = collected(tmp_path / "d.jsonl", data, BadRowPolicy(), counts)
    assert done == ["a", "b"]
    assert counts == {
        "byte order mark skipped": 1,
        "lines that end in CRLF": 2,
        "blank lines skipped": 2,
        "rows with keys that are not used": 1,
    }


def test_line_separators_and_strange_characters_survive_in_strings(tmp_path):
    text = "a\u2028b\u2029c\x85d\v\f \u202e \u200d\U0001f469\u200d\U0001f4bb e\u0301 \x00 </s> <|endoftext|>"
    for ascii_only in (True, False):
        data = json.dumps({"text": text}, ensure_ascii=ascii_only).encode() + b"\n" + GOOD
        assert collected(tmp_path / "d.jsonl", data, BadRowPolicy())[0] == [text, "a"]


@given(
    st.dictionaries(
        st.text(),
        st.one_of(st.text(), st.floats(allow_nan=False, allow_infinity=False), st.none()),
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_whatever_json_can_say_comes_back_equal(values, ascii_only):
    assert parse_json(json.dumps(values, ensure_ascii=ascii_only)) == values


def test_long_line_is_read(tmp_path):
    data = json.dumps({"text": "x" * 10_000_000}).encode() + b"\n"
    assert len(collected(tmp_path / "d.jsonl", data, BadRowPolicy())[0][0]) == 10_000_000


def test_file_cut_at_any_byte_of_its_last_row_is_an_error_on_that_line(tmp_path):
    last = b'{"text": "\xc3\xa9 \\u00e9", "n": [1.5, {"k": true}]}'
    path = tmp_path / "d.jsonl"
    for cut in range(1, len(last)):
        _, rejected, total = collected(path, GOOD + b"\n" + last[:cut], BadRowPolicy("quarantine", 1.0))
        assert total == 2 and rejected[0].where == f"{path}:2", cut
    assert collected(path, GOOD + b"\n" + last, BadRowPolicy())[2] == 2
    with pytest.raises(UserError, match="the last line is truncated"):
        collected(path, GOOD + b"\n" + last[:-3], BadRowPolicy())


def test_gzip_is_read_and_a_damaged_one_is_an_error(tmp_path):
    path = tmp_path / "d.jsonl.gz"
    whole = gzip.compress((GOOD + b"\n") * 1000)
    assert len(rows_of(path, whole)) == 1000
    for data in (whole[:-9], whole[: len(whole) // 2], whole[:10], b"plain text"):
        with pytest.raises(UserError, match="damaged or truncated gzip"):
            rows_of(path, data)


def test_unknown_ending_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"unknown ending; convert the file to one of \.jsonl"):
        rows_of(tmp_path / "d.json", b"[]")


# ---------------------------------------------------------------------------------------------- typed access


@pytest.mark.parametrize(
    ("kind", "value", "problem"),
    [
        ("number", "3", "a finite number is due, found the text '3'"),
        ("number", True, "a finite number is due, found the boolean true"),
        ("number", float("nan"), "a finite number is due, found the number nan"),
        ("number", float("inf"), "a finite number is due, found the number inf"),
        ("number", 10**400, "a finite number is due, found the integer 1000"),
        ("probability", 1, "a float in [0, 1] is due, found the integer 1; write 1.0"),
        ("probability", False, "a float in [0, 1] is due, found the boolean false"),
        ("probability", 1.5, "a float in [0, 1] is due, found the number 1.5"),
        ("probability", -0.1, "a float in [0, 1] is due"),
        ("probability", float("nan"), "a float in [0, 1] is due"),
        ("integer", 1.0, "an integer is due, found the number 1"),
        ("integer", True, "an integer is due, found the boolean true"),
        ("list", "[]", "a list is due, found the text '[]'"),
    ],
)
def test_wrong_kind_is_named(kind, value, problem):
    with pytest.raises(BadRow) as caught:
        field_of(RawRow("f", 7, {"k": value}), "k", kind)
    assert str(caught.value).startswith(f"f:7: k: {problem}")


def test_right_kind_is_returned():
    row = RawRow("f", 1, {"t": "x", "i": 3, "f": 0.5, "l": [1], "o": None})
    assert field_of(row, "t", "text") == "x"
    assert field_of(row, "i", "number") == 3.0 and isinstance(field_of(row, "i", "number"), float)
    assert field_of(row, "i", "integer") == 3
    assert field_of(row, "f", "probability") == 0.5
    assert field_of(row, "l", "list") == [1]
    assert field_of(row, "o", "value") is None


def test_csv_cells_are_parsed_as_what_is_due():
    row = RawRow(
        "f", 1, {"n": "2.5", "p": "1", "i": "3", "l": '["a", 1]', "bad": "x", "nan": "nan"}, textual=True
    )
    assert field_of(row, "n", "number") == 2.5
    assert field_of(row, "p", "probability") == 1.0
    assert field_of(row, "i", "integer") == 3
    assert field_of(row, "l", "list") == ["a", 1]
    for key, kind in (("bad", "number"), ("bad", "list"), ("nan", "number"), ("n", "integer"), ("n", "list")):
        with pytest.raises(BadRow, match=f"f:1: {key}: "):
            field_of(row, key, kind)


def test_strict_json_accepts_what_is_json():
    assert parse_json('{"a": [1, 2.5, "\\ud83d\\ude00", true, null]}') == {
        "a": [1, 2.5, "\U0001f600", True, None]
    }


# ---------------------------------------------------------------------------------------------- CSV, Parquet


def test_csv_rows_have_the_line_they_start_on(tmp_path):
    counts: Counter[str] = Counter()
    data = b'\xef\xbb\xbftext,n\r\n"two\nlines",1\r\n\r\n"a ""quoted"", one",2\r\n'
    rows = rows_of(tmp_path / "d.csv", data, counts)
    assert [(row.line, row.values["text"]) for row in rows] == [(2, "two\nlines"), (5, 'a "quoted", one')]
    assert counts == {"byte order mark skipped": 1, "blank lines skipped": 1}


def test_csv_mistakes_name_the_line(tmp_path):
    path = tmp_path / "d.csv"
    (_, bad) = rows_of(path, b"a,b\n1,2\n1,2,3\n")
    assert isinstance(bad, BadRow) and str(bad) == f"{path}:3: 3 cells, the header has 2 columns"
    for data, message in (
        (b"a,b\n1,2\n1,\xff\n", "d.csv:3: not UTF-8"),
        (b'a,b\n1,2\n1,"open\n', "d.csv:3: not CSV"),
        (b"a,a\n1,2\n", "d.csv:1: a: this column occurs twice"),
    ):
        with pytest.raises(UserError, match=message):
            rows_of(path, data)


def test_csv_reads_long_cells_and_leaves_the_global_limit_alone(tmp_path):
    import csv

    before = csv.field_size_limit()
    path = tmp_path / "d.csv.gz"
    path.write_bytes(gzip.compress(b"a\n" + b"x" * 300_000 + b"\n"))
    (row,) = read_csv(path, Counter())
    assert len(row.values["a"]) == 300_000
    assert csv.field_size_limit() == before
    rows = read_csv(path, Counter())
    next(rows)  # and left in the middle
    assert csv.field_size_limit() == before


def test_parquet_rows_are_typed_numbered_and_without_nulls(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "d.parquet"
    table = pyarrow.table({"text": ["a", None, "c"], "n": [1.5, 2.5, None], "l": [["x"], [], ["y", "z"]]})
    pyarrow.parquet.write_table(table, path)
    rows = list(read_table(path, Counter()))
    assert [row.line for row in rows] == [1, 2, 3]
    assert rows[0].values == {"text": "a", "n": 1.5, "l": ["x"]}
    assert "text" not in rows[1] and "n" not in rows[2]
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        list(read_parquet(path))
