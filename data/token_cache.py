"""Tokenised rows on disk, found again by the content of everything that they were made of.

A file is an Arrow stream, `<key>-<SHA-256 of the file>.arrow`, which `datasets.Dataset.from_file` opens. The key hashes the
examples' text and numbers, the tokenizer, the settings and the code that tokenises, so nothing stale can be read; the name
tells a damaged file, which is made again. Files are written under another name and renamed: any number of processes may
share a folder, and deleting it costs time only.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from data.passport import Counts
from data.schema import Example, Row
from utils import fsync_directory, log


@dataclass
class TokenCache:
    """The files in ``folder``, and what was asked of them: parts and rows found or made, and the seconds it took."""

    folder: Path
    hits: int = 0
    misses: int = 0
    rows: int = 0
    seconds: float = 0.0

    def get(
        self,
        examples: Sequence[Example],
        facts: Mapping[str, Any],
        make: Callable[[], tuple[list[Row], Counts]],
    ) -> tuple[list[Row], Counts]:
        """What ``make`` gives for the examples and the JSON-able ``facts`` that it depends on besides: read, or made and
        written."""
        start = time.perf_counter()
        key = _key(examples, facts)
        found = self._read(key)
        self.hits, self.misses = self.hits + (found is not None), self.misses + (found is None)
        if found is None:
            found = make()
            self._write(key, _encode(*found))
        self.rows += len(found[0])
        self.seconds += time.perf_counter() - start
        return found

    def log(self) -> None:
        """One line on what was found."""
        log.info(
            "tokens: %d rows in %.2f s, %d of %d parts from token_cache=%s",
            self.rows,
            self.seconds,
            self.hits,
            self.hits + self.misses,
            self.folder,
        )

    def _read(self, key: str) -> tuple[list[Row], Counts] | None:
        for path in sorted(self.folder.glob(f"{key}-*.arrow")):
            try:
                content = path.read_bytes()
            except OSError as error:
                log.warning("token_cache: %s cannot be read (%s); it is made again", path, error.strerror)
                continue
            if path.stem == f"{key}-{hashlib.sha256(content).hexdigest()}":
                return _decode(content)
            log.warning("token_cache: %s is damaged (its name is not its hash); it is made again", path)
            with contextlib.suppress(OSError):
                path.unlink()
        return None

    def _write(self, key: str, content: pa.Buffer) -> None:
        path = self.folder / f"{key}-{hashlib.sha256(content).hexdigest()}.arrow"
        temporary = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".tmp-", delete=False) as handle:
                temporary = Path(handle.name)
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
            fsync_directory(self.folder)
        except OSError as error:  # a run does not end because of its cache
            log.warning("token_cache=%s: cannot be written (%s)", self.folder, error.strerror)
            if temporary is not None:
                temporary.unlink(missing_ok=True)


def _key(examples: Sequence[Example], facts: Mapping[str, Any]) -> str:
    """SHA-256 (hex); JSON values end where they end, so no two lists of examples give the same bytes."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=_plain).encode())
    for e in examples:
        content = [e.uid, e.prompt, e.responses, e.group, e.weight, e.scalars, e.response_scalars]
        digest.update(json.dumps(content, sort_keys=True, default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else float(value)


# ---------------------------------------------------------------------------------------------- rows <-> Arrow


def _lists(lengths: Sequence[int], values: pa.Array) -> pa.LargeListArray:
    return pa.LargeListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), values)


def _ids(arrays: Sequence[np.ndarray]) -> pa.LargeListArray:
    return _lists([len(a) for a in arrays], pa.array(np.concatenate([np.zeros(0, np.int32), *arrays])))


def _encode(rows: Sequence[Row], counts: Counts) -> pa.Buffer:
    table = pa.table(
        {
            "uid": pa.array([row.uid for row in rows], pa.string()),
            "group": pa.array([row.group for row in rows], pa.int32()),
            "weight": pa.array([row.weight for row in rows], pa.float64()),
            "prompt_key": pa.array([row.prompt_key for row in rows], pa.string()),
            "prompt": _ids([row.prompt for row in rows]),
            "responses": _lists(
                [len(row.responses) for row in rows], _ids([ids for row in rows for ids in row.responses])
            ),
            "roles": pa.array([row.roles for row in rows], pa.list_(pa.string())),
            # JSON keeps every float64, and NaN
            "scalars": pa.array([json.dumps(row.scalars) for row in rows], pa.string()),
            "response_scalars": pa.array([json.dumps(row.response_scalars) for row in rows], pa.string()),
        }
    )
    table = table.replace_schema_metadata({"counts": json.dumps([*counts.table.items()])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _decode(content: bytes) -> tuple[list[Row], Counts]:
    """Rows whose ids are read-only views of ``content``; equal prompts are one array."""
    table = pa.ipc.open_stream(content).read_all().combine_chunks()
    columns = {
        name: table[name].to_pylist() for name in table.column_names if name not in ("prompt", "responses")
    }
    prompts: dict[str, np.ndarray] = {}
    for key, ids in zip(columns["prompt_key"], _split(_only(table["prompt"])), strict=True):
        prompts.setdefault(key, ids)
    responses = _only(table["responses"])
    flat, ends = _split(responses.values), responses.offsets.to_numpy()
    rows = [
        Row(
            uid=columns["uid"][i],
            prompt=prompts[columns["prompt_key"][i]],
            responses=tuple(flat[ends[i] : ends[i + 1]]),
            roles=tuple(columns["roles"][i]),
            group=columns["group"][i],
            prompt_key=columns["prompt_key"][i],
            weight=columns["weight"][i],
            scalars=json.loads(columns["scalars"][i]),
            response_scalars={n: tuple(v) for n, v in json.loads(columns["response_scalars"][i]).items()},
        )
        for i in range(table.num_rows)
    ]
    counts = Counts()
    for (kind, group), times in json.loads(table.schema.metadata[b"counts"]):
        counts.add(kind, group, times)
    return rows, counts


def _only(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _split(lists: pa.LargeListArray) -> list[np.ndarray]:
    values, ends = lists.values.to_numpy(), lists.offsets.to_numpy().tolist()
    return [values[a:b] for a, b in itertools.pairwise(ends)]
