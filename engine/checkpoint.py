"""Checkpoints that are there or not there, never half there.

Layout of ``<run_dir>/step-<examples>/``::

    config.json, model*.safetensors, tokenizer files ...   whatever ``write_model`` writes: the folder itself loads as a model
    training/optimizer.safetensors                         "<parameter>//<slot>" -> tensor
    training/shards/                                       instead of it and model*.safetensors: engine/sharded.py
    training/state.json                                    step, examples, optimizer scalars, schedule, weighting, stopper ...
    manifest.json                                          facts, and the size and SHA-256 of every file above

The training state sits in a folder of its own because some loaders read every ``*.safetensors`` beside ``config.json``.

Commit protocol: write into ``.tmp-step-<examples>/``, fsync every file, write and fsync the manifest, fsync the
folders, rename to ``step-<examples>``, fsync the run directory, point ``LATEST`` at it, and only then prune. A crash
at any instant leaves the checkpoints committed before it untouched. ``LATEST`` is for people: what counts is the scan
for valid manifests (`find`). A bit flip is invisible to every tensor format in use here, hence the hashes.

No function here talks to other ranks: rank 0 saves and chooses; gathering, broadcasting and writing shards belong to the
caller.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from engine.faults import crash_point
from utils import UserError, content_hash, file_hash, fsync_directory, log

FORMAT = 1
MANIFEST = "manifest.json"
TRAINING = "training"
SHARDS = f"{TRAINING}/shards"
SHARD_INDEX = f"{SHARDS}/.metadata"
CRASH_POINTS = (
    "save.begin",  # temporary folder made, nothing in it
    "save.model",
    "save.optimizer",
    "save.state",
    "save.manifest",  # written, not yet durable
    "save.sealed",  # durable, not yet renamed
    "save.renamed",  # committed
    "save.latest",
    "save.prune",  # an old checkpoint is moved out of sight, not yet deleted
)
CRASH_POINT_REPLACE = "save.moved_aside"  # only when step-<examples> was there before

_NAME = re.compile(r"step-(\d+)(\.old)?")
# What this process has already hashed: {folder: sizes and times of its files}. A file that changes is hashed again.
_verified: dict[Path, tuple] = {}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or is not what its manifest says."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose every byte agreed with its manifest when it was opened."""

    path: Path
    step: int
    examples: int
    facts: Mapping[str, Any]
    files: frozenset[str]  # below ``path``, as the manifest has them

    @property
    def is_sharded(self) -> bool:
        return SHARD_INDEX in self.files

    @cached_property
    def state(self) -> dict[str, Any]:
        """The JSON state given to `save`; floats come back bit-equal."""
        return json.loads((self.path / TRAINING / "state.json").read_text(encoding="utf-8"))

    def optimizer(self) -> dict[str, Tensor]:
        """The optimizer's tensors on the CPU, by "<parameter>//<slot>" (for `engine.optim.restore_optimizer`); of a
        sharded checkpoint `engine.sharded.read_optimizer` reads them."""
        return load_file(self.path / TRAINING / "optimizer.safetensors")


# ---------------------------------------------------------------------------------------------------- saving


def save(
    run_dir: Path,
    examples: int,
    *,
    write_model: Callable[[Path], None],
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
    shards: Mapping[str, Mapping[str, Any]] | None = None,
    keep: int | None = 2,
    best: int | None = None,
    also_keep: Collection[int] = (),
) -> Path:
    """Commit ``<run_dir>/step-<examples>`` and prune. Call on rank 0 only, under the run directory's lock.

    write_model  writes the model (and tokenizer) into the folder it is given
    optimizer    full tensors by "<parameter>//<slot>" (`engine.optim.optimizer_tensors`); None: they are in the shards
    state        JSON-able, string keys; must hold ``step`` (optimizer updates) and the same ``examples``
    facts        what exactness depends on: config_hash, data_fingerprint, world_size, micro_batches, threads, device,
                 versions, git. They go to the manifest; `compare_facts` reads them on resume
    shards       {name below the checkpoint: `describe`} of what the ranks have already written into `begin`'s folder
    keep, best, also_keep   see `prune`

    Raises CheckpointError, after removing its temporary folder, when anything fails before the commit.
    """
    run_dir = Path(run_dir)
    if state["examples"] != examples:
        raise ValueError(f"state says {state['examples']} examples, the checkpoint {examples}")
    final = run_dir / f"step-{examples}"
    try:
        temporary = begin(run_dir, examples) if shards is None else _temporary(run_dir, examples)
        _write(temporary, write_model, optimizer, state, facts, shards or {})
        _commit(temporary, final)
    except Exception as error:
        raise failed(run_dir, examples, f"{type(error).__name__}: {error}") from error
    _point_latest(run_dir, final.name)
    crash_point("save.latest")
    prune(run_dir, keep=keep, best=best, also_keep=also_keep)
    return final


def _temporary(run_dir: Path, examples: int) -> Path:
    return Path(run_dir) / f".tmp-step-{examples}"


def whole_folder(path: Path) -> Path:
    """Where the whole model of the sharded checkpoint in ``path`` goes: ``model-step-<examples>`` beside it."""
    path = Path(path).resolve()
    return path.parent / f"model-{path.name}"


def begin(run_dir: Path, examples: int) -> Path:
    """An empty folder that `save` makes the checkpoint of."""
    folder = _temporary(run_dir, examples)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / TRAINING).mkdir(parents=True)
    crash_point("save.begin")
    return folder


def failed(run_dir: Path, examples: int, reason: str) -> CheckpointError:
    """The error to raise; what there is of the checkpoint goes."""
    shutil.rmtree(_temporary(run_dir, examples), ignore_errors=True)
    return CheckpointError(
        f"{Path(run_dir) / f'step-{examples}'}: could not save ({reason}); {free_bytes(run_dir)} bytes free; "
        "earlier checkpoints are untouched"
    )


def _write(
    folder: Path,
    write_model: Callable[[Path], None],
    optimizer: Mapping[str, Tensor] | None,
    state: Mapping[str, Any],
    facts: Mapping[str, Any],
    shards: Mapping[str, Mapping[str, Any]],
) -> None:
    """Everything into ``folder``, durable, the manifest last."""
    write_model(folder)
    crash_point("save.model")
    training = folder / TRAINING
    if optimizer is not None:
        tensors = {key: value.detach().cpu().contiguous() for key, value in optimizer.items()}
        save_file(tensors, training / "optimizer.safetensors")
    crash_point("save.optimizer")
    _require_string_keys(state, "state")
    (training / "state.json").write_text(json.dumps(state), encoding="utf-8")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    facts_of_files = {name: describe(folder / name) for name in sorted(files - shards.keys())}
    crash_point("save.state")
    body = {
        "format": FORMAT,
        "step": state["step"],
        "examples": state["examples"],
        "facts": dict(facts),
        "files": {**facts_of_files, **shards},
    }
    manifest = folder / MANIFEST
    manifest.write_text(
        json.dumps({**body, "manifest_sha256": content_hash(body)}, indent=1), encoding="utf-8"
    )
    crash_point("save.manifest")
    fsync_file(manifest)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        fsync_directory(path)
    crash_point("save.sealed")


def _commit(temporary: Path, final: Path) -> None:
    """Rename into place. A folder cannot replace a full one, so an older save of the same count steps aside first,
    under a name that `find` reads: there is no instant without one of the two."""
    aside = final.with_name(final.name + ".old")
    if final.exists():
        if aside.exists():  # left by a crash in this very place; `final` is then the one that does not verify
            _delete(final)
        else:
            final.rename(aside)
        crash_point(CRASH_POINT_REPLACE)
    temporary.rename(final)
    crash_point("save.renamed")
    fsync_directory(final.parent)
    _verified[final.resolve()] = _signature(final)  # hashed while it was written
    if aside.exists():
        _delete(aside)


def describe(path: Path) -> dict[str, Any]:
    """What the manifest says of a file, which is made durable first."""
    fsync_file(path)
    return {"bytes": path.stat().st_size, "sha256": file_hash(path)}


def fsync_file(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _require_string_keys(value: Any, where: str) -> None:
    """JSON turns the key 1 into "1" without a word; a state that came back different would be our bug."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where}: key {key!r} is not a string")
            _require_string_keys(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _require_string_keys(item, f"{where}[{i}]")


def _point_latest(run_dir: Path, name: str) -> None:
    """``LATEST`` -> name, atomically. Only a convenience, so a file system without links costs a warning."""
    link = run_dir / ".tmp-LATEST"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(run_dir / "LATEST")
        fsync_directory(run_dir)
    except OSError as error:
        log.warning("%s: could not point LATEST at %s (%s); resuming does not need it", run_dir, name, error)


def _delete(folder: Path) -> None:
    """Out of sight at once (a half deleted checkpoint would look like a damaged one), then gone."""
    _verified.pop(folder.resolve(), None)
    hidden = folder.with_name(f".tmp-delete-{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    crash_point("save.prune")
    shutil.rmtree(hidden)


def prune(
    run_dir: Path, *, keep: int | None = 2, best: int | None = None, also_keep: Collection[int] = ()
) -> None:
    """Delete valid checkpoints but the ``keep`` newest, the one at ``best`` examples and those in ``also_keep``.

    ``keep=None`` deletes nothing. Damaged checkpoints are neither counted nor deleted. At least 2 are kept, so that
    damage to one never ends a run.
    """
    if keep is None:
        return
    valid = find(run_dir)
    wanted = (
        {c.examples for c in valid[: max(keep, 2)]} | set(also_keep) | ({best} if best is not None else set())
    )
    for checkpoint in valid:
        if checkpoint.examples not in wanted:
            try:
                _delete(checkpoint.path)
            except OSError as error:
                log.warning("%s: could not delete this old checkpoint (%s)", checkpoint.path, error)


# --------------------------------------------------------------------------------------------------- finding


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in ``path`` (a link is followed). Raises CheckpointError with the file and the reason."""
    path = Path(path).resolve()
    body = _read_manifest(path / MANIFEST)
    signature = _signature(path)
    files = body["files"]
    if _verified.get(path) != signature:
        with ThreadPoolExecutor() as pool:  # hashing lets other threads run
            list(pool.map(lambda name: _verify_file(path / name, files[name]), files))
        _verified[path] = signature
    return Checkpoint(path, body["step"], body["examples"], body["facts"], frozenset(files))


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error
    if not isinstance(body, dict) or "manifest_sha256" not in body:
        raise CheckpointError(f"{path}: not a manifest")
    claimed = body.pop("manifest_sha256")
    if content_hash(body) != claimed:
        raise CheckpointError(f"{path}: does not match its own hash")
    if body["format"] != FORMAT:
        raise CheckpointError(f"{path}: format {body['format']}, this program reads {FORMAT}")
    return body


def _verify_file(path: Path, fact: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != fact["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {fact['bytes']}")
        if file_hash(path) != fact["sha256"]:
            raise CheckpointError(f"{path}: contents do not match the manifest's SHA-256")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error


def _signature(folder: Path) -> tuple:
    """Names, sizes, inodes and times: changes whenever a file of the folder is written."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            stat = path.stat()
            found.append((path.relative_to(folder).as_posix(), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return tuple(found)


def _valid(run_dir: Path) -> Iterator[Checkpoint]:
    """Valid checkpoints, newest first; a damaged one costs a warning with file and reason."""
    entries = [(p, m) for p in Path(run_dir).glob("step-*") if (m := _NAME.fullmatch(p.name))]
    seen = set()
    for path, match in sorted(entries, key=lambda e: (-int(e[1][1]), e[1][2] or "")):
        try:
            checkpoint = open_checkpoint(path)
            if checkpoint.examples != int(match[1]):
                raise CheckpointError(f"{path}: the manifest says {checkpoint.examples} examples")
        except CheckpointError as error:
            log.warning("ignoring a damaged checkpoint: %s", error)
            continue
        if checkpoint.examples not in seen:
            seen.add(checkpoint.examples)
            yield checkpoint


def find(run_dir: Path) -> list[Checkpoint]:
    """All valid checkpoints of a run, newest first (every byte is hashed, once per process)."""
    return list(_valid(run_dir))


def choose(
    run_dir: Path, *, resume: str = "auto", resume_from: Path | str | None = None
) -> Checkpoint | None:
    """The checkpoint to continue from, or None to start over. Rank 0 chooses and tells the others.

    Precedence: the newest valid checkpoint in the run directory; else ``resume_from`` (a checkpoint folder, or a run
    directory, whose newest is meant); else None: the caller starts from model.archive or the pretrained weights.
    ``resume="must"`` refuses None, ``"never"`` refuses to mix a new run into an old one's directory.
    """
    if resume not in ("auto", "must", "never"):
        raise UserError(f"resume={resume}: must be auto, must or never")
    there = any(_NAME.fullmatch(p.name) for p in Path(run_dir).glob("step-*"))
    if resume == "never":
        if there or resume_from is not None:
            what = f"{run_dir} holds checkpoints" if there else f"resume_from={resume_from} is set"
            raise UserError(f"resume=never: but {what}; use another exp_name=, fresh=true or resume=auto")
        return None
    newest = next(_valid(run_dir), None)
    if newest is None and resume_from is not None:
        newest = _resume_from(Path(resume_from))
    if newest is None and resume == "must":
        raise UserError(
            f"resume=must: {run_dir} holds no valid checkpoint; check exp_name= or use resume=auto"
        )
    if newest is None and there:
        log.warning("%s: no checkpoint is valid, starting over", run_dir)
    return newest


def _resume_from(path: Path) -> Checkpoint:
    try:
        if not (path / MANIFEST).exists() and any(path.glob("step-*")):
            newest = next(_valid(path), None)
            if newest is None:
                raise CheckpointError(f"{path}: no valid checkpoint in this run directory")
            return newest
        return open_checkpoint(path)
    except CheckpointError as error:
        raise UserError(f"resume_from={path}: {error}; name an intact step-<examples> folder") from error


def clean(run_dir: Path) -> None:
    """Remove what a dead process left half done. Call at start, under the run directory's lock."""
    run_dir = Path(run_dir)
    for path in run_dir.glob(".tmp-*"):
        log.info("removing %s, left by a process that died", path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for aside in run_dir.glob("step-*.old"):
        final = aside.with_suffix("")
        if not final.exists():
            aside.rename(final)
            fsync_directory(run_dir)
        elif final.resolve() in {c.path for c in _valid(run_dir)}:
            _delete(aside)


def compare_facts(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, allow: Collection[str] = ()
) -> list[str]:
    """Why the continuation is not bit-equal to a run never interrupted ("world_size: 2 -> 1"); empty: it is.

    Other data is refused (UserError) unless ``allow`` holds "data": the plan of examples would be another one.
    ``config_hash`` is left to the run directory, which can show the difference.
    """
    old, new = _flat(saved), _flat(now)
    if old.get("data_fingerprint") != new.get("data_fingerprint") and "data" not in allow:
        raise UserError(
            f"the data changed since the checkpoint (fingerprint {old.get('data_fingerprint')} -> "
            f"{new.get('data_fingerprint')}): rows were edited, added, removed or reordered; restore the data, use "
            "another exp_name=, or pass resume_allow=[data]"
        )
    keys = sorted((old.keys() | new.keys()) - {"config_hash"})
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys if old.get(key) != new.get(key)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as dotted keys, in the form that JSON gives back."""
    flat: dict[str, Any] = {}
    for key, item in json.loads(json.dumps(value)).items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def place(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor (the same on every rank) moved to where ``parameter`` lives, and sharded like it. A sharded one stays."""
    if isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(parameter.device, copy=True)
    if not isinstance(parameter, DTensor):
        return tensor
    same = tensor.shape == parameter.shape
    placements = parameter.placements if same else [Replicate()] * parameter.device_mesh.ndim
    # every rank has read the whole tensor, so none needs to be sent (src_data_rank=None)
    return distribute_tensor(tensor, parameter.device_mesh, placements, src_data_rank=None)


# ---------------------------------------------------------------------------------------------------- space


def rehearse(run_dir: Path) -> None:
    """Commit, verify and remove a checkpoint of a few bytes where the real ones will go: what makes a save impossible (no
    rename, no fsync, a full quota) shows before the first step and not hours later. Raises CheckpointError."""
    folder = Path(run_dir) / ".tmp-rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        state, tensors = {"step": 0, "examples": 0}, {"parameter//slot": torch.zeros(1)}
        made = save(folder, 0, write_model=lambda path: None, optimizer=tensors, state=state, facts={})
        _verified.pop(made.resolve(), None)
        open_checkpoint(made)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error})") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write on the file system of ``path`` (which need not exist)."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def estimate_bytes(parameters: Iterable[Tensor], *, slots: int = 2) -> int:
    """Size of a checkpoint: every parameter, and ``slots`` (2 for Adam) optimizer tensors per trained one."""
    return sum(p.numel() * p.element_size() * (1 + slots * p.requires_grad) for p in parameters)


def warn_if_space_short(run_dir: Path, checkpoint_bytes: int) -> bool:
    """Warn (and return True) when less than 2.5 checkpoints fit: two are kept while a third is written."""
    free = free_bytes(run_dir)
    short = free < 2.5 * checkpoint_bytes
    if short:
        log.warning(
            "%s: %.1f GB free, but a checkpoint takes about %.1f GB and three must fit for a moment; saving may fail",
            run_dir,
            free / 1e9,
            checkpoint_bytes / 1e9,
        )
    return short
