"""The log of a run: ``metrics.jsonl``, the record of truth, and its mirror on W&B."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import secrets
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from engine.metric_names import OLDER_SAMPLES, direction, older_names, parts
from engine.rundir import redact, truncate_metrics
from utils import UserError, log, write_atomic

# ------------------------------------------------------------------------------------------------ the run's log


@dataclass(frozen=True)
class WandbSettings:
    """Keys under ``wandb.`` of the config. The API key is no setting: WANDB_API_KEY or ``wandb login``.

    mode          null: WANDB_MODE; else online where a key is found, else offline. Or online | offline | disabled
    legacy_names  also log under the names of older programs (engine/metric_names.py)
    init_timeout  seconds to wait for the server before going offline (in the background: training has begun)
    finish_timeout  seconds to wait at the end for uploads
    table_rows    most rows of a table of samples
    """

    enabled: bool = True
    project: str = "robust-preference-optimization"
    entity: str | None = None
    mode: str | None = None
    tags: tuple[str, ...] = ()
    legacy_names: bool = False
    init_timeout: float = 10.0
    finish_timeout: float = 60.0
    table_rows: int = 64

    def __post_init__(self) -> None:
        if self.mode not in (None, "online", "offline", "disabled"):
            raise UserError(f"wandb.mode={self.mode}: must be null, online, offline or disabled")
        if not self.init_timeout > 0 or not self.finish_timeout > 0:
            raise UserError("wandb.init_timeout, wandb.finish_timeout: must be > 0 seconds")

    def resolved_mode(self) -> str:
        """online, offline or disabled. Never asks anybody."""
        if not self.enabled:
            return "disabled"
        mode = self.mode or os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
        if mode not in _MODES:
            log.warning("WANDB_MODE=%s: not one of %s; logging offline", mode, ", ".join(_MODES))
        return _MODES.get(mode, "offline")


# the client's modes; it still knows two by older names
_MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    with contextlib.suppress(OSError, NetrcParseError):
        return netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    return False


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and hands them to the W&B mirror. Ranks other than 0 pass ``active=False``.

    config      settings to show on W&B (secrets are taken out)
    identity    keyword arguments of ``wandb.init``: name, group (the config's hash without the seed), job_type
    groups      names in the order of the data sets, validation: is there a validation split (for older names)
    state       of an earlier `state_dict`: the file is cut back to it and the same W&B run goes on. A checkpoint of
                another directory finds no file here: that is a new log and a new W&B run. None: a new log, rows of an
                earlier attempt are dropped
    examples    count at which the run starts or goes on
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        wandb: WandbSettings,
        config: Mapping[str, Any],
        identity: Mapping[str, str],
        groups: Sequence[str] = (),
        validation: bool = True,
        state: Mapping[str, Any] | None = None,
        examples: int = 0,
        active: bool = True,
    ) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        continues = state is not None and self.path.exists()
        self.wandb_id: str = state["wandb_id"] if continues else secrets.token_hex(4)
        self.best: dict[str, list[float]] = {k: list(v) for k, v in state["best"].items()} if state else {}
        self._older = older_names(groups, validation=validation) if wandb.legacy_names else {}
        self._table_rows = wandb.table_rows
        self._file: int | None = None
        self._mirror: Mirror | None = None
        if not active:
            return
        truncate_metrics(self.path, examples=examples, offset=state["offset"] if state else 0)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        mode = wandb.resolved_mode()
        if mode != "disabled":
            self._mirror = Mirror(Path(run_dir), wandb, mode, self.wandb_id, redact(config), dict(identity))

    def write(
        self, kind: str, *, step: int, examples: int, values: Mapping[str, float], **facts: int | float | str
    ) -> None:
        """One row: ``kind`` ("train", "eval"), counters, facts (split, epoch, time ...) and values by full name.

        A NaN means undefined and is left out. JSON has no infinity, so infinite values are left out too, and their names
        are listed under "nonfinite".
        """
        if self._file is None:
            return
        numbers = {name: _plain(value) for name, value in values.items()}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        infinite = sorted(name for name, value in numbers.items() if math.isinf(value))
        row = {"kind": kind, **facts, "step": step, "examples": examples, **finite}
        if infinite:
            row["nonfinite"] = infinite
        _append(self._file, self.path, row)
        improved = self._update_best(finite, examples) if kind == "eval" else {}
        if self._mirror is not None:
            mirrored = {key: value for key, value in row.items() if isinstance(value, int | float)}
            older = {self._older[name]: value for name, value in mirrored.items() if name in self._older}
            self._mirror.log({**mirrored, **older}, improved)
            if kind == "eval" and (table := group_table(finite)):
                self._mirror.table(f"{facts.get('split', 'eval')}_groups", table, examples)

    def samples(self, examples: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """``samples/<examples>.jsonl``; on W&B one table per ``model`` ("policy", "reference") among the rows."""
        if self._file is None or not rows:
            return
        folder = self.path.parent / "samples"
        folder.mkdir(exist_ok=True)
        write_jsonl(folder / f"{examples}.jsonl", rows)
        if self._mirror is not None:
            for model in dict.fromkeys(str(row["model"]) for row in rows):
                chosen = [row for row in rows if row["model"] == model][: self._table_rows]
                self._mirror.table(OLDER_SAMPLES.get(model, f"{model}_samples"), chosen, examples)

    def artifact(self, files: Sequence[Path], name: str) -> None:
        """Upload files (a model) to W&B, where there is one. ``close`` then waits for them, up to an hour."""
        if self._mirror is not None:
            self._mirror.artifact(files, name)

    def _update_best(self, values: Mapping[str, float], examples: int) -> dict[str, float]:
        """Best value so far, and at how many examples, of every metric with a direction; bounds of intervals aside."""
        improved = {}
        for name, value in values.items():
            mode = None if name.endswith(("/ci_low", "/ci_high")) else direction(name)
            if mode is None:
                continue
            before = self.best.get(name)
            if before is None or (value < before[0] if mode == "min" else value > before[0]):
                self.best[name] = [value, examples]
                improved[f"best/{name}"] = value
        return improved

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint. Makes the file durable first: the offset must never point past its end."""
        if self._file is not None:
            os.fsync(self._file)
        offset = self.path.stat().st_size if self.path.exists() else 0
        best = {name: list(value) for name, value in self.best.items()}
        return {"offset": offset, "wandb_id": self.wandb_id, "best": best}

    def close(self, exit_code: int = 0) -> None:
        """Close the file, wait (a bounded time) for the mirror. Twice is once."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._mirror is not None:
            self._mirror.close(exit_code)
            self._mirror = None


def group_table(values: Mapping[str, float]) -> list[dict[str, Any]]:
    """An evaluation's values -> a row per group (and worst, mean): {"group": "north", "loss": .., "rewards/accuracies/ci_low": ..}."""
    table: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        _, metric, group, bound = parts(name)
        if group:
            row = table.setdefault(group, {"group": group.removeprefix("group_")})
            row[f"{metric}/{bound}" if bound else metric] = value
    return list(table.values())


def _plain(value: Any) -> int | float:
    """NumPy and tensor scalars as Python numbers; None is undefined."""
    if value is None:
        return math.nan
    return value if isinstance(value, int) else float(value)


def _append(file: int, path: Path, row: Mapping[str, Any]) -> None:
    """One write call for one whole line; what a full disk tore is taken back before the error is raised."""
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    size = os.fstat(file).st_size
    try:
        written = os.write(file, line)
        if written != len(line):
            raise OSError(f"wrote {written} of {len(line)} bytes")
    except OSError as error:
        os.ftruncate(file, size)
        raise OSError(f"{path}: cannot append a row of metrics ({error})") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """All rows or none (the file is replaced atomically)."""
    write_atomic(
        Path(path), "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    )


# ---------------------------------------------------------------------------------------------------- mirror


class Mirror:
    """W&B, at arm's length: one background thread owns the client, so that a server which is down, slow or silent
    costs the training nothing but a warning. Whatever the client raises ends the mirror, never the run."""

    TEARDOWN_S = 5.0  # for the client to give up a connection that hangs
    UPLOAD_S = 3600  # for a model to be uploaded, where one is
    QUEUE = 20_000  # rows to hold while the server answers; beyond that rows are dropped and counted

    def __init__(
        self,
        run_dir: Path,
        settings: WandbSettings,
        mode: str,
        run_id: str,
        config: Any,
        identity: dict[str, str],
    ) -> None:
        self._queue: queue.Queue[Callable[[Any], None] | None] = queue.Queue(self.QUEUE)
        self._settings = settings
        self._init = {
            "dir": str(run_dir),
            "id": run_id,
            "project": settings.project,
            "entity": settings.entity,
            "config": config,
            "tags": list(settings.tags),
            **identity,
        }
        self._dropped = 0
        self._exit_code = 0
        self._uploads = 0
        self._dead = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(mode,), name="wandb-mirror", daemon=True)
        self._thread.start()

    def log(self, values: dict[str, float], best: dict[str, float]) -> None:
        def send(run: Any) -> None:
            run.log(values)
            if best:
                run.summary.update(best)

        self._put(send)

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], examples: int) -> None:
        def send(run: Any) -> None:
            import wandb

            columns = list(dict.fromkeys(key for row in rows for key in row))
            data = [[row.get(column) for column in columns] for row in rows]
            run.log({name: wandb.Table(columns=columns, data=data), "examples": examples})

        self._put(send)

    def artifact(self, files: Sequence[Path], name: str) -> None:
        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(name, type="model")
            for path in files:
                artifact.add_file(str(path))
            logged = run.log_artifact(artifact)
            if not run.offline:  # the client's finish_timeout is meant for rows, not for models
                logged.wait(self.UPLOAD_S)

        self._uploads += 1
        self._put(send)

    def close(self, exit_code: int) -> None:
        """Let the thread finish, for at most the client's time limits together; then leave it behind."""
        self._exit_code = exit_code
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=1.0)
        settings = self._settings
        patience = 2 * settings.init_timeout + self.TEARDOWN_S + settings.finish_timeout
        self._thread.join(patience + self._uploads * self.UPLOAD_S)
        if self._thread.is_alive():
            self._dead.set()
            log.warning("W&B did not finish in time; metrics.jsonl is complete")
        if self._dropped:
            log.warning("W&B was too slow: %d rows are only in metrics.jsonl", self._dropped)

    def _put(self, item: Callable[[Any], None]) -> None:
        if self._dead.is_set():
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._dropped += 1

    def _work(self, mode: str) -> None:
        run = None
        try:
            run = self._start(mode)
            while (item := self._queue.get()) is not None and not self._dead.is_set():
                item(run)
            run.finish(exit_code=self._exit_code)
        except Exception as error:  # noqa: BLE001 - a mirror must not be able to end a run, whatever the client raises
            log.warning(
                "W&B stopped (%s: %s); metrics.jsonl goes on", type(error).__name__, _first_line(error)
            )
        finally:
            self._dead.set()

    def _start(self, mode: str) -> Any:
        """The run: online, or offline after one warning."""
        if mode == "online":
            try:
                return self._open("online", resume="allow")
            except ImportError:
                raise
            except Exception as error:  # noqa: BLE001 - no connection, bad key, no such project: all mean "offline"
                log.warning(
                    "W&B cannot be reached (%s: %s); logging offline, upload later with `wandb sync`",
                    type(error).__name__,
                    _first_line(error),
                )
            import wandb

            wandb.teardown()  # the client's service still holds the run's id (wandb 0.31)
        return self._open("offline")

    def _open(self, mode: str, **options: Any) -> Any:
        # The client reports to its makers, offline too, and with a silent server waits 20 s at exit for that (0.31).
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        if not (os.environ.get("HOME") or os.environ.get("XDG_CACHE_HOME")):
            # its service would log to our stderr and keep its cache in the working directory (0.31)
            os.environ["XDG_CACHE_HOME"] = str(Path(self._init["dir"], "wandb", "cache").resolve())
        import wandb  # here: 0.3 s that runs without W&B need not wait for

        settings = wandb.Settings(
            init_timeout=self._settings.init_timeout,
            login_timeout=self._settings.init_timeout,
            finish_timeout=self._settings.finish_timeout,
            console="off",  # do not wrap stdout
            silent=True,
            disable_code=True,
            x_disable_meta=True,  # would upload the command line, secrets included; provenance is in the config
        )
        run = wandb.init(mode=mode, settings=settings, **self._init, **options)
        run.define_metric("examples", hidden=True)
        run.define_metric("*", step_metric="examples")
        return run


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
