"""Checkpoints in slices (``checkpoint.format=sharded``): every rank writes and reads its own, so that no host ever holds the whole.

The slices of parameters ("model.<name>", as the Scorer has them) and optimizer state ("<parameter>//<slot>") go through
torch.distributed.checkpoint (DCP) into ``step-<examples>/training/shards/``: one file a rank, and an index, ``.metadata``. The
rest of the checkpoint, and how it is committed, is engine/checkpoint.py's. DCP replaces an old index in place, so every save
goes into a new folder.

The index is a pickle, and DCP reads it as one, which runs whatever code the file names. Here it is read of an opened
`Checkpoint` only, whose every byte has agreed with its manifest, and by an unpickler that knows the classes of an index and
nothing else.
"""

from __future__ import annotations

import json
import pathlib
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from engine import checkpoint
from engine.checkpoint import MANIFEST, SHARD_INDEX, SHARDS, TRAINING, Checkpoint, CheckpointError
from engine.faults import crash_point
from engine.parallel import World
from utils import fsync_directory, log

MODEL = "model."  # the Scorer's name of the model inside
FILE_BYTES = 4 << 30  # of the files that `consolidate` writes: what it holds in memory at a time

CRASH_POINTS = ("save.shards", *checkpoint.CRASH_POINTS)

_KNOWN = {
    f"{cls.__module__}.{cls.__qualname__}"
    for cls in (
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.TensorStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.TensorProperties,
        metadata.StorageMeta,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        torch.Size,
        pathlib.PosixPath,
    )
} | {"torch.serialization._get_layout"}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = f"{module}.{name}"
        if found in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {found}, which no index of shards has")


class _Reader(dcp.FileSystemReader):
    def __init__(self, source: Checkpoint) -> None:
        super().__init__(source.path / SHARDS)
        self.source = source

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The index: tensors alone, in files that the manifest vouches for. CheckpointError for anything else."""
        path = self.source.path / SHARD_INDEX
        try:
            with path.open("rb") as handle:
                index = _IndexUnpickler(handle).load()
            files = {info.relative_path for info in index.storage_data.values()}
        except Exception as error:
            raise CheckpointError(f"{path}: refused ({error})") from error
        if unknown := sorted(f for f in files if f"{SHARDS}/{f}" not in self.source.files):
            raise CheckpointError(f"{path}: refused (names {unknown[0]}, which is not in the manifest)")
        index.storage_meta.load_id = self.load_id
        return index


def _tensors(source: Checkpoint) -> dict[str, metadata.TensorStorageMetadata]:
    """What is in the shards: {name: sizes and dtype}."""
    if not source.is_sharded:
        raise CheckpointError(f"{source.path}: holds no shards")
    return _Reader(source).read_metadata().state_dict_metadata


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns where ranks do not read together; here none needs another to read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)", UserWarning)
        yield


def _load(source: Checkpoint, into: Mapping[str, Tensor]) -> None:
    """Fill tensors (of a sharded one: this rank's slice) in place, whatever the number of ranks that wrote them."""
    try:
        with _quiet(), torch.no_grad():
            dcp.load(dict(into), storage_reader=_Reader(source), no_dist=True)
    except CheckpointException as error:  # no Exception, so it would pass by every handler
        raise CheckpointError(f"{source.path}: cannot be read ({_reason(error)})") from error


def _reason(error: CheckpointException) -> str:
    """The first rank's."""
    number, (first, _) = min(error.failures.items())
    return f"rank {number}: {type(first).__name__}: {first}"


# ---------------------------------------------------------------------------------------------------- saving


def write(
    world: World, run_dir: Path, examples: int, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Any]]:
    """Every rank's slices of ``tensors`` (the same names everywhere) into the folder of the coming checkpoint. On every rank;
    returns what `checkpoint.save` has to know of them. Raises CheckpointError on every rank if one of them fails."""

    def begin() -> Path:
        try:
            shutil.rmtree(checkpoint.whole_folder(Path(run_dir) / f"step-{examples}"), ignore_errors=True)
            return checkpoint.begin(run_dir, examples)
        except OSError as error:
            raise checkpoint.failed(run_dir, examples, f"{type(error).__name__}: {error}") from error

    folder = world.on_main(begin)
    try:
        dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder / SHARDS))
    except CheckpointException as error:
        if world.is_main:
            raise checkpoint.failed(run_dir, examples, _reason(error)) from error
        raise CheckpointError(f"step-{examples}: could not save ({_reason(error)})") from error
    crash_point("save.shards")
    mine = [*(folder / SHARDS).glob(f"__{world.rank}_*"), *([folder / SHARD_INDEX] * world.is_main)]
    return dict(world.gather([(p.relative_to(folder).as_posix(), checkpoint.describe(p)) for p in mine]))


# ---------------------------------------------------------------------------------------------------- reading


def read_model(source: Checkpoint, parameters: Mapping[str, Tensor]) -> None:
    """The model's parameters, in place and bit-equal. Strict. On every rank; no rank needs another."""
    held = _tensors(source)
    saved = {name: tuple(found.size) for name, found in held.items() if "//" not in name}
    wanted = {name: tuple(p.shape) for name, p in parameters.items()}
    if saved != wanted:
        names = sorted(n for n in saved.keys() | wanted.keys() if saved.get(n) != wanted.get(n))
        raise CheckpointError(
            f"{source.path}: holds another model; first difference: {names[0]} is {saved.get(names[0], 'absent')} there and "
            f"{wanted.get(names[0], 'absent')} here"
        )
    _load(source, parameters)


def read_optimizer(source: Checkpoint, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's tensors by "<parameter>//<slot>", sharded like their parameters where they have their shapes."""
    found: dict[str, Tensor] = {}
    for key, held in _tensors(source).items():
        name, slash, _ = key.rpartition("//")
        if slash:
            like, dtype = parameters.get(name), held.properties.dtype
            if isinstance(like, DTensor) and like.shape == held.size:
                found[key] = torch.empty_like(like, dtype=dtype, requires_grad=False)
            else:
                found[key] = torch.empty(held.size, dtype=dtype)
    _load(source, found)
    return found


# ------------------------------------------------------------------------------------------------ consolidating


def consolidate(source: Checkpoint, world: World) -> Path:
    """Write the whole model as a Hugging Face directory, `checkpoint.whole_folder`. On every rank; each writes some of the files, one at
    a time, and holds no more than a file (`FILE_BYTES`, or the largest tensor) in memory."""
    final = checkpoint.whole_folder(source.path)
    if world.on_main(final.is_dir):
        return final
    temporary = final.with_name(f".tmp-{final.name}")
    sizes = {
        name.removeprefix(MODEL): torch.empty(held.size, dtype=held.properties.dtype, device="meta")
        for name, held in _tensors(source).items()
        if "//" not in name
    }
    plan = split_torch_state_dict_into_shards(sizes, max_shard_size=FILE_BYTES)

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for path in source.path.iterdir():
            if path.name not in (MANIFEST, TRAINING):
                shutil.copyfile(path, temporary / path.name)

    def commit() -> None:
        if plan.is_sharded:
            index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
            (temporary / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=1), encoding="utf-8"
            )
        for path in temporary.iterdir():
            checkpoint.fsync_file(path)
        fsync_directory(temporary)
        temporary.rename(final)
        fsync_directory(final.parent)
        log.info("the whole model is in %s", final)

    world.on_main(prepare)
    for number, (file, names) in enumerate(plan.filename_to_tensors.items()):
        if number % world.size == world.rank:
            tensors = {name: torch.empty_like(sizes[name], device="cpu") for name in names}
            _load(source, {MODEL + name: tensor for name, tensor in tensors.items()})
            save_file(tensors, temporary / file, metadata={"format": "pt"})
    world.barrier()
    world.on_main(commit)
    return final
