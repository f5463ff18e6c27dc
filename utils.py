"""Small things everything may use: user errors, named random streams, rank-0 logging, run directories, provenance.

Imports nothing of ours, so any module may import it.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("robust_pref")


class UserError(ValueError):
    """A mistake the user can mend. The entry prints the message alone and exits with code 2.

    The message names the key or ``file:line``, the value, and the fix.
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'beta'?"`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---------------------------------------------------------------------------------------------- random streams


def stream_seed(seed: int, name: str, *keys: int | str) -> int:
    """A 63-bit seed that is a pure function of (seed, name, keys): equal on every machine, process and rank."""
    text = json.dumps([seed, name, *keys], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(seed: int, name: str, *keys: int | str) -> np.random.Generator:
    """A NumPy generator for the stream (seed, name, keys). Nothing here draws from global generators."""
    return np.random.Generator(np.random.PCG64(stream_seed(seed, name, *keys)))


# ---------------------------------------------------------------------------------------------- hashes, files


def without_nan(value: Any) -> Any:
    """A JSON-able value with None for every NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable value, independent of dict order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_folder(path: Path) -> Path:
    """``path``, made where it is not there yet. Raises UserError where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror}); name another place") from error
    return path


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` (UTF-8) so that a reader sees the old file or the new one, never a part."""
    tmp = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with tmp.open("w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    tmp.replace(path)
    fsync_directory(path.parent)


# ---------------------------------------------------------------------------------------------- ranks and logging


def rank() -> int:
    """This process's rank (0 when not distributed), from the environment that torchrun sets."""
    return int(os.environ.get("RANK", "0"))


def setup_logging(level: int = logging.INFO) -> None:
    """Log to stderr: rank 0 at ``level``, other ranks warnings only and marked with their rank."""
    prefix = "" if rank() == 0 else f"[rank {rank()}] "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.disabled = False  # Hydra disables the loggers it finds
    log.setLevel(level if rank() == 0 else logging.WARNING)


@contextlib.contextmanager
def global_rng_untouched() -> Iterator[None]:
    """Restore torch's global generator on exit: for third-party code that insists on drawing from it."""
    import torch

    state = torch.random.get_rng_state()
    try:
        yield
    finally:
        torch.random.set_rng_state(state)


# ---------------------------------------------------------------------------------------------- provenance


def git_facts(root: Path) -> dict[str, Any]:
    """``{"commit": str | None, "dirty": bool | None}`` of the checkout that holds ``root``; None outside git."""

    def git(args: Sequence[str]) -> str | None:
        try:
            done = subprocess.run(
                ["git", *args], cwd=root, capture_output=True, text=True, timeout=10, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git(["rev-parse", "HEAD"])
    status = git(["status", "--porcelain", "--untracked-files=no"]) if commit else None
    return {"commit": commit, "dirty": bool(status) if status is not None else None}


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in (
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "hydra-core",
        "omegaconf",
        "peft",
        "datasets",
        "wandb",
    ):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
