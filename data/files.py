"""What every source that reads rows from a file or the hub shares: the settings, the reading, the splitting."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from data.jsonl import BadRow, BadRowPolicy, RawRow, Rejected, collect, field_of
from data.schema import Example
from data.split import SPLITS, by_first_appearance, check_fractions, prompt_key, split_of, without_overlap
from data.tables import read_hub, read_table
from utils import UserError, did_you_mean, log, rank, write_atomic

T = TypeVar("T")

SHOWN = 20  # rejected rows that are logged when there is no file for them
AGGREGATES = ("all", "mean", "worst", "mean_group", "worst_group")  # names in tables and figures
TRUNCATIONS = ("keep_start", "keep_end", "drop", "error")


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """Where rows come from and what happens to bad ones. Keys are typed as ``data.<name>.<key>=``.

    on_bad_row, max_bad_fraction and rejected_path may be None: the caller then fills in what holds for all data sets;
    unfilled they mean "raise", 0.001, and no file (rejected rows are then logged).
    """

    path: str | None = None
    hub: str | None = None
    hub_config: str | None = None
    hub_folder: str | None = None
    revision: str | None = None
    max_rows: int | None = None
    expected_rows: int | None = None
    on_bad_row: str | None = None
    max_bad_fraction: float | None = None
    rejected_path: str | None = None
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        if self.on_bad_row is not None:
            choose("on_bad_row", self.on_bad_row, ("raise", "quarantine"))
        choose("truncation_mode", self.truncation_mode, TRUNCATIONS)
        if self.max_bad_fraction is not None and not 0.0 <= self.max_bad_fraction <= 1.0:
            raise UserError(
                f"data.<name>.max_bad_fraction={self.max_bad_fraction}: must be in [0, 1]; try 0.001"
            )
        for name, value in (("max_rows", self.max_rows), ("expected_rows", self.expected_rows)):
            if value is not None and value < 1:
                raise UserError(f"data.<name>.{name}={value}: must be at least 1, or null for no limit")
        if self.max_rows is not None and self.expected_rows is not None:
            raise UserError(
                "data.<name>.max_rows and data.<name>.expected_rows: a part cannot be the whole; set one"
            )


@dataclass(frozen=True, kw_only=True)
class FileSettings(ReadSettings):
    """Settings of a source whose splits are files, or parts of one file chosen by prompt."""

    test_path: str | None = None
    validation_path: str | None = None
    test_fraction: float = 0.1
    validation_fraction: float = 0.0
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        keys = ("data.<name>.test_fraction", "data.<name>.validation_fraction")
        if problem := check_fractions(self.test_fraction, self.validation_fraction, keys):
            raise UserError(problem)
        for key, value in (("test_path", self.test_path), ("validation_path", self.validation_path)):
            if value is not None and self.path is None:
                raise UserError(
                    f"data.<name>.{key}={value}: needs data.<name>.path= too, the file to train on"
                )


@dataclass(frozen=True, kw_only=True)
class GroupedSettings(FileSettings):
    """Settings of a source whose rows may name their group."""

    group_field: str | None = None


def choose(key: str, value: str, allowed: Collection[str]) -> None:
    """Raise UserError unless ``value`` of ``data.<name>.<key>`` is one of ``allowed``."""
    if value not in allowed:
        listed = ", ".join(allowed)
        raise UserError(f"data.<name>.{key}={value}: must be one of {listed}{did_you_mean(value, allowed)}")


# ---------------------------------------------------------------------------------------------- reading


class Reader:
    """Reads the files of one data set; gathers counts and rejected rows; ``finish`` reports both."""

    def __init__(self, name: str, settings: ReadSettings, known: Collection[str]) -> None:
        self.name = name
        self.settings = settings
        self.known = known
        self.counts: Counter[str] = Counter()
        self.rejected: list[Rejected] = []

    def file(self, key: str, path: str, convert: Callable[[RawRow], T]) -> list[T]:
        """The converted rows of a local file; ``key`` is the setting that named it."""
        if not Path(path).is_file():
            raise UserError(
                f"data.{self.name}.{key}={path}: no such file; paths are relative to {Path.cwd()}"
            )
        done, total = self._collect(path, read_table(Path(path), self.counts), convert)
        expected = self.settings.expected_rows
        if key == "path" and expected is not None and total != expected:
            raise UserError(
                f"{path}: {total} rows, but data.{self.name}.expected_rows={expected}: the file is cut or another one"
            )
        return done

    def hub(self, convert: Callable[[RawRow], T]) -> dict[str, list[T]]:
        """The converted rows of the hub's data set by split: train, and validation and test where it has them."""
        s = self.settings
        if s.hub is None:
            raise UserError(
                f"data.{self.name}.path is not set; set data.{self.name}.path= to a file, or .hub="
            )
        streaming = s.max_rows is not None  # a few rows of a huge set: fetch no more than those
        found = read_hub(f"data.{self.name}", s.hub, s.hub_config, s.hub_folder, s.revision, streaming)
        if "train" not in found:
            raise UserError(
                f"data.{self.name}.hub={s.hub}: it has the splits {', '.join(found)} but no train; "
                f"download the file you want and set data.{self.name}.path="
            )
        return {
            split: self._collect(f"{s.hub}[{split}]", rows, convert)[0]
            for split, rows in found.items()
            if split in SPLITS
        }

    def _collect(
        self, file: str, rows: Iterator[RawRow | BadRow], convert: Callable[[RawRow], T]
    ) -> tuple[list[T], int]:
        s = self.settings
        limited: Iterable[RawRow | BadRow] = itertools.islice(rows, s.max_rows)
        fraction = BadRowPolicy.max_bad_fraction if s.max_bad_fraction is None else s.max_bad_fraction
        policy = BadRowPolicy(s.on_bad_row or BadRowPolicy.on_bad_row, fraction)
        done, rejected, total = collect(limited, convert, policy, self.counts, self.known)
        if total == 0:
            raise UserError(f"{file}: no rows; check data.{self.name}.path")
        self.rejected += rejected
        return done, total

    def finish(self) -> None:
        """Write the rejected rows (rank 0), or log the first of them, and log one line per kind of thing counted."""
        target = self.settings.rejected_path
        if self.rejected:
            self.counts["rows rejected" + (f", see {target}" if target else "")] += len(self.rejected)
        if self.rejected and target is None:
            for row in self.rejected[:SHOWN]:
                log.warning("%s: rejected %s: %s", self.name, row.where, row.reason)
        elif self.rejected and rank() == 0:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(Path(target), "".join(row.as_json() + "\n" for row in self.rejected))
        report(self.name, self.counts)


def report(name: str, counts: Counter[str]) -> None:
    """One log line per kind of thing counted while reading data set ``name``."""
    for kind, n in sorted(counts.items()):
        if n:
            log.info("%s: %d %s", name, n, kind)


# ---------------------------------------------------------------------------------------------- splitting


def load_examples(
    reader: Reader,
    settings: FileSettings,
    convert: Callable[[RawRow], list[Example]],
    key: Callable[[Example], str],
) -> dict[str, list[Example]]:
    """Read all files of a data set and split them: ``{"train": .., "validation": .., "test": ..}``.

    A split that has its own file (or split on the hub) is that file; the others are cut out of the training file by
    the hash of ``key`` (the prompt, or the question). Splits share no key: what is held out leaves train.
    ``convert`` gives examples whose uid is the row ("12" or "12#1"); it becomes "<name>/<split>:12#1".
    """
    parts = _read_parts(reader, settings, convert)
    fractions = (
        0.0 if "test" in parts else settings.test_fraction,
        0.0 if "validation" in parts else settings.validation_fraction,
    )
    if any(fractions):
        whole = parts.pop("train")
        for split, fraction in (("train", 1.0), ("validation", fractions[1]), ("test", fractions[0])):
            if fraction:
                parts[split] = [
                    e for e in whole if split_of(settings.split_seed, key(e), *fractions) == split
                ]
    splits = without_overlap(parts, key, reader.counts)
    reader.finish()
    for split, examples in splits.items():
        if not examples:
            log.warning("%s: no %s examples: the data are few, or the fractions small", reader.name, split)
    return {split: finish_split(reader.name, split, examples) for split, examples in splits.items()}


def _read_parts(
    reader: Reader, settings: FileSettings, convert: Callable[[RawRow], list[Example]]
) -> dict[str, list[Example]]:
    if settings.path is None:
        found = reader.hub(convert)
    else:
        files = (
            ("train", "path", settings.path),
            ("validation", "validation_path", settings.validation_path),
            ("test", "test_path", settings.test_path),
        )
        found = {split: reader.file(key, path, convert) for split, key, path in files if path is not None}
    return {split: [example for examples in rows for example in examples] for split, rows in found.items()}


def finish_split(name: str, split: str, examples: Iterable[Example]) -> list[Example]:
    """Pairs of one prompt made consecutive, uids completed with data set and split."""
    together = by_first_appearance(examples, lambda e: prompt_key(e.prompt))
    return [replace(example, uid=f"{name}/{split}:{example.uid}") for example in together]


def group_of(row: RawRow, group_field: str | None, name: str) -> str:
    """The row's group: the column ``group_field``, else the column ``group`` where there is one, else ``name``. A name that
    stands for several groups in the tables is refused."""
    if group_field is None and "group" not in row:
        return name
    column = group_field or "group"
    group = field_of(row, column, "text")
    if not group:
        raise row.bad("an empty group name", column)
    if group in AGGREGATES:
        raise row.bad(
            f"{group!r} is what the tables call a summary of groups; name the group otherwise", column
        )
    return group


def by_prompt(example: Example) -> str:
    """The key most sources split by."""
    return prompt_key(example.prompt)
