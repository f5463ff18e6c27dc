"""CSV, Parquet and the hub: the same rows as data.jsonl gives, each with its place."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.jsonl import BadRow, RawRow, byte_lines, read_jsonl
from utils import UserError

ENDINGS = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


def read_table(path: Path, counts: Counter[str]) -> Iterator[RawRow | BadRow]:
    """The rows of a local file, by its ending: .jsonl, .csv (both also .gz) or .parquet."""
    name = path.name
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_jsonl(path, counts)
    if name.endswith((".csv", ".csv.gz")):
        return read_csv(path, counts)
    if name.endswith(".parquet"):
        return read_parquet(path)
    raise UserError(f"{path}: unknown ending; convert the file to one of {', '.join(ENDINGS)}")


def read_csv(path: Path, counts: Counter[str]) -> Iterator[RawRow | BadRow]:
    """Every record of a .csv or .csv.gz file (RFC 4180, UTF-8, a header line); all values are text.

    The place of a record is the line it starts on. A byte order mark and blank lines are accepted and counted.
    """
    data = b"".join(line for _, line in byte_lines(path))
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; convert the file to UTF-8") from None
    if text.startswith("\ufeff"):
        counts["byte order mark skipped"] += 1
        text = text[1:]
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            record = _next(reader, len(text) + 1)
        except StopIteration:
            return
        except csv.Error as error:
            # what follows an unclosed quote is lost, so that this is no matter of one row
            raise UserError(f"{path}:{start}: not CSV ({error}); mend the quotes of this record") from None
        if not record:
            counts["blank lines skipped"] += 1
        elif header is None:
            header = record
            if len(set(header)) != len(header):
                twice = next(name for name, n in Counter(header).items() if n > 1)
                raise UserError(f"{path}:{start}: {twice}: this column occurs twice; rename one")
        elif len(record) != len(header):
            yield BadRow(f"{path}:{start}", f"{len(record)} cells, the header has {len(header)} columns")
        else:
            yield RawRow(str(path), start, dict(zip(header, record, strict=True)), textual=True)


def _next(reader: Iterator[list[str]], longest: int) -> list[str]:
    """The next record. The library's limit on a cell is global and small (128 KiB; long dialogues are longer): it is changed for
    no longer than this, because a reader that is left in the middle would put it back who knows when."""
    limit = csv.field_size_limit(longest)
    try:
        return next(reader)
    finally:
        csv.field_size_limit(limit)


def read_parquet(path: Path) -> Iterator[RawRow | BadRow]:
    """Every row of a Parquet file; the place is the 1-based row. A null cell counts as a column that is not there."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield _dict_row(str(path), number, values)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path}: row {number + 1}: cannot be read as Parquet ({error})") from None


def read_hub(
    key: str, hub: str, config: str | None, folder: str | None, revision: str | None, streaming: bool
) -> dict[str, Iterator[RawRow | BadRow]]:
    """The splits of a data set on the hub. ``key`` is the config prefix, e.g. "data.hh", for the message."""

    def trouble(error: Exception) -> UserError:
        # the hub's client raises errors of a dozen libraries: each means that the data are not to be had
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return UserError(
            f"{key}.hub={hub} (revision {revision or 'newest'}): could not be loaded ({reason}); "
            f"set {key}.path= to a local file"
        )

    def rows_of(split: str, rows: Any) -> Iterator[RawRow | BadRow]:
        try:
            for number, values in enumerate(rows, start=1):
                yield _dict_row(f"{hub}[{split}]", number, values)
        except Exception as error:
            raise trouble(error) from error

    try:
        import datasets

        found = datasets.load_dataset(
            hub, name=config, data_dir=folder, revision=revision, streaming=streaming
        )
    except Exception as error:
        raise trouble(error) from error
    return {split: rows_of(split, rows) for split, rows in found.items()}


def _dict_row(file: str, number: int, values: dict[str, Any]) -> RawRow:
    return RawRow(file, number, {k: v for k, v in values.items() if v is not None})
