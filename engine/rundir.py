"""The run directory: who may write in it, which settings it belongs to, what was run.

The same command on the same directory continues the run; other settings in it are refused with the difference.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from utils import UserError, git_facts, log, versions, write_atomic

LOCK = ".lock"
# What a run leaves behind; `set_aside` moves these and nothing else.
OURS = (
    "config.yaml",
    "provenance.json",
    "metrics.jsonl",
    "results.json",
    "results.csv",
    "rejected-*.jsonl",
    "spikes.jsonl",
    "passport.json",
    "merged",
    "wandb",
    "records",
    "samples",
    "figures",
    "LATEST",
    "step-*",
    "model-step-*",
    "bad_batch-step-*.json",
)

_SECRET_KEY = re.compile(
    r"(?:.*\.)?(?:key|token|(?:.*[_-])?(?:api_?key|auth_token|access_token|hf_token|password|secret))",
    re.IGNORECASE,
)
_SECRET_ENV = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENAI_API_KEY", "ANTHROPIC_API_KEY")
HIDDEN = "***"


def prepare(run_dir: Path) -> Path:
    """Make the run directory and prove that it can be written, before anything expensive happens."""
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".tmp-probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"run_dir={run_dir}: cannot write there ({error.strerror}); use a directory that you own"
        ) from error
    return run_dir


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory for this process; the kernel lets go when it dies, however it dies.

    Raises UserError naming the holder's pid and host. Forked ranks inherit the lock, so that a new run cannot start
    beside survivors of a dead parent.
    """
    path = Path(run_dir) / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 4096, 0).decode("utf-8", "replace").strip() or "an unknown process"
            raise UserError(
                f"run_dir={run_dir}: in use by {holder}; wait for it, stop it, or use another exp_name="
            ) from None
        except OSError as error:
            log.warning("%s: this file system has no locks (%s); do not start a second run here", path, error)
        os.ftruncate(fd, 0)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        os.pwrite(fd, f"pid {os.getpid()} on {socket.gethostname()} since {started}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


def set_aside(run_dir: Path) -> Path | None:
    """``fresh=true``: move an earlier run's files into ``previous-<k>/`` (nothing is deleted). None: there were none."""
    run_dir = Path(run_dir)
    found = sorted(path for pattern in OURS for path in run_dir.glob(pattern))
    if not found:
        return None
    k = 1
    while (target := run_dir / f"previous-{k}").exists():
        k += 1
    target.mkdir()
    for path in found:
        path.rename(target / path.name)
    log.info("fresh=true: moved the earlier run to %s", target)
    return target


# --------------------------------------------------------------------------------------------------- settings


def redact(value: Any) -> Any:
    """A copy of a config (or of a command line) without secrets: values under names like ``api_key`` or ``token``,
    ``name=value`` words of that kind, and anything equal to a secret of the environment."""
    if isinstance(value, Mapping):
        return {
            k: HIDDEN if isinstance(v, str) and v and _SECRET_KEY.fullmatch(str(k)) else redact(v)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(v) for v in value]
    if isinstance(value, str):
        for name in _SECRET_ENV:
            secret = os.environ.get(name)
            if secret:
                value = value.replace(secret, HIDDEN)
        name, equals, rest = value.partition("=")
        if equals and rest and _SECRET_KEY.fullmatch(name.lstrip("+-")):
            return f"{name}={HIDDEN}"
    return value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"loss": {"beta": 0.1}}`` -> ``{"loss.beta": 0.1}``; lists and empty dicts are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return flat


def _covered(key: str, names: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], *, ignore: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """``{dotted key: (old, new)}`` where two configs differ; "(absent)" for a key that one of them lacks."""
    before, after = flatten(old), flatten(new)
    return {
        key: (before.get(key, "(absent)"), after.get(key, "(absent)"))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, "(absent)") != after.get(key, "(absent)") and not _covered(key, ignore)
    }


def check_config(
    run_dir: Path, config: Mapping[str, Any], *, allow: Collection[str] = (), ignore: Collection[str] = ()
) -> list[str]:
    """Refuse to continue the run in ``run_dir`` with other settings.

    allow   dotted keys (or groups) that the user lets change (``resume_allow=[lr]``); each change is logged
    ignore  keys that cannot move a number (directories, W&B, how often to log)

    Returns the allowed changes as ``"lr: 1e-05 -> 2e-05"``. Raises UserError with the whole difference otherwise.
    """
    path = Path(run_dir) / "config.yaml"
    if not path.exists():
        return []
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: unreadable ({reason}); use another exp_name= or fresh=true") from error
    if not isinstance(saved, dict):
        raise UserError(f"{path}: not a mapping; use another exp_name= or fresh=true")
    changed = differences(saved, _plain(redact(config)), ignore=ignore)
    refused = {k: v for k, v in changed.items() if not _covered(k, allow)}
    if refused:
        lines = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in refused.items())
        raise UserError(
            f"run_dir={run_dir}: holds a run with other settings:\n{lines}\nuse another exp_name=, start over with "
            f"fresh=true, or let them change with resume_allow=[{','.join(refused)}]"
        )
    allowed = [f"{key}: {old} -> {new}" for key, (old, new) in changed.items()]
    for line in allowed:
        log.warning("resume_allow: %s", line)
    return allowed


def _plain(config: Mapping[str, Any]) -> Any:
    """Tuples to lists, as YAML gives them back."""
    return yaml.safe_load(_yaml(config))


def _yaml(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False, allow_unicode=True, width=100)


# ------------------------------------------------------------------------------------------------- provenance


def provenance(
    *, config_hash: str, config_hash_no_seed: str, command: Sequence[str], seed: int, root: Path
) -> dict[str, Any]:
    """What was run: git, versions, settings' hashes, command, host, time (UTC). ``root`` is the source checkout."""
    return {
        "git": git_facts(root),
        "versions": versions(),
        "config_hash": config_hash,
        "config_hash_no_seed": config_hash_no_seed,
        "command": redact(list(command)),
        "seed": seed,
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_facts(
    run_dir: Path, config: Mapping[str, Any], facts: Mapping[str, Any], *, examples: int = 0
) -> None:
    """``config.yaml`` and ``provenance.json``. A continuation (``examples`` > 0) keeps the first start's facts and adds
    its own to ``"resumed"``: one run may have been made by several commits, and the figure must be able to say so."""
    run_dir = Path(run_dir)
    path = run_dir / "provenance.json"
    document = dict(facts)
    if examples > 0 and path.exists():
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            document["resumed"] = [*document.get("resumed", []), {"examples": examples, **facts}]
        except ValueError as error:
            log.warning("%s: unreadable (%s), written anew", path, error)
    write_atomic(run_dir / "config.yaml", _yaml(redact(config)))
    write_atomic(path, json.dumps(document, indent=1) + "\n")


# ---------------------------------------------------------------------------------------------------- resume


def truncate_metrics(path: Path, *, examples: int, offset: int | None = None) -> int:
    """Forget what was logged after the checkpoint at ``examples``; returns the bytes kept.

    ``offset`` is the size of the file when the checkpoint was made: exact whatever was logged at that very count.
    Where it is unknown, or the file is not the one it belonged to, whole rows with more than ``examples`` go.
    A torn last line goes in any case.
    """
    path = Path(path)
    if not path.exists():
        return 0
    text = path.read_bytes()
    if offset is not None and (offset == 0 or text[offset - 1 : offset] == b"\n"):
        kept = text[:offset]
    else:
        if offset is not None:
            log.warning(
                "%s: not the file that the checkpoint knew; keeping rows up to %d examples", path, examples
            )
        whole = text[: text.rfind(b"\n") + 1].split(b"\n")[:-1]
        kept = b"".join(
            line + b"\n" for n, line in enumerate(whole, 1) if _examples(path, n, line) <= examples
        )
    if kept != text:
        temporary = path.with_name(f".tmp-{path.name}")
        with temporary.open("wb") as handle:
            handle.write(kept)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    return len(kept)


def _examples(path: Path, number: int, line: bytes) -> int:
    try:
        return json.loads(line)["examples"]
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{path}:{number}: not a row of metrics ({error}); mend it or use fresh=true"
        ) from error


def truncate(run_dir: Path, *, examples: int, metrics_offset: int | None = None) -> None:
    """Take the run directory back to the checkpoint at ``examples`` (0 and offset 0: to nothing): what was logged,
    evaluated and sampled after it goes, and so do final results."""
    run_dir = Path(run_dir)
    truncate_metrics(run_dir / "metrics.jsonl", examples=examples, offset=metrics_offset)
    for name in ("results.json", "results.csv"):
        (run_dir / name).unlink(missing_ok=True)
    for path in [*run_dir.glob("records/*.jsonl"), *run_dir.glob("samples/*.jsonl")]:
        count = path.stem.rpartition("-")[2]
        if count.isdigit() and (int(count) > examples or metrics_offset == 0):
            path.unlink()
