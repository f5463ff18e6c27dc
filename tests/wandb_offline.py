"""What the real W&B client wrote offline, read back in the shape of the API's answers: recorded rows for the tests of the loader."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BLOCK = 32768  # bytes; the file is a LevelDB log after a header of 7 bytes, of wandb_internal.proto's Records
WHOLE, LAST = 1, 4  # kinds of a chunk that end a record


def records(path: Path) -> Iterator[Any]:
    """The transaction log's records, in order."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, []
    while at + 7 <= len(data):
        left = BLOCK - at % BLOCK
        if left < 7:  # padding
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (WHOLE, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


class OfflineRun:
    """One run directory's offline runs (several, if it was resumed) as ``wandb.Api()`` would give the run they belong to."""

    def __init__(self, run_dir: Path) -> None:
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.defined: list[tuple[str, str]] = []  # (glob, step metric)
        self.commit, self.state = None, "running"
        for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
            for record in records(path):
                self._take(record)

    def _take(self, record: Any) -> None:
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            self.id, self.name, self.group, self.job_type = (
                run.run_id,
                run.display_name,
                run.run_group,
                run.job_type,
            )
            self.tags = list(run.tags)
            self.config |= _items(run.config.update)
        elif kind == "history":
            self.history.append(_items(record.history.item))
        elif kind == "summary":
            self.summary |= _items(record.summary.update)
        elif kind == "metric" and record.metric.step_metric:
            self.defined.append((record.metric.glob_name or record.metric.name, record.metric.step_metric))
        elif kind == "exit":
            self.state = "finished" if record.exit.exit_code == 0 else "crashed"

    def scan_history(self) -> Iterator[dict[str, Any]]:
        return iter(self.history)


class OfflineApi:
    """Stands in for ``wandb.Api()``."""

    def __init__(self, run_dirs: Sequence[Path]) -> None:
        self._runs = [OfflineRun(run_dir) for run_dir in run_dirs]

    def runs(self, where: str, filters: dict, order: str) -> list[OfflineRun]:
        return self._runs


def _items(items: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        keys = list(item.nested_key) or [item.key]
        if keys[0] == "_wandb":
            continue
        place = found
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = json.loads(item.value_json)
    return found
