"""Where reference log-probs come from: a second model, the policy with its adapter off, or a cache on disk.

All three are called as ``reference(batch, roles)`` and return a Scored without gradient.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from data.schema import Batch, Row
from engine.archives import weights_hash
from engine.lora import adapter_off
from engine.parallel import World
from losses.types import Scored
from utils import UserError, content_hash, fsync_directory, log, make_folder, stream

__all__ = [
    "AdapterOffReference",
    "CachedReference",
    "LiveReference",
    "adapter_off",
    "kernel_id",
    "weights_hash",
]

FORMAT = 1
CACHED = "cached"  # role of the responses in the batches that fill the cache
# Largest difference, in nats per response token, between a cached value and the same response scored in another batch
CHECK_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1e-1, torch.float16: 2e-2}


class LiveReference:
    """A frozen model behind a Scorer of its own."""

    def __init__(self, scorer: nn.Module) -> None:
        self.scorer = scorer.eval()

    def __call__(self, batch: Batch, roles: Sequence[str], tokens: bool = False) -> Scored:
        with torch.no_grad():
            return self.scorer(batch, roles, tokens)


class AdapterOffReference:
    """The policy's own LoRA model with the trained adapter off; needs no second model."""

    def __init__(self, scorer: nn.Module, model: nn.Module) -> None:
        self.scorer, self.model = scorer, model

    def __call__(self, batch: Batch, roles: Sequence[str], tokens: bool = False) -> Scored:
        with torch.no_grad(), adapter_off(self.model):
            return self.scorer(batch, roles, tokens)


# ---------------------------------------------------------------------------------------------- cache


def kernel_id(scorer: nn.Module) -> str:
    """What rounding depends on besides weights and dtype: values of another kernel are not used.

    Append ``/bf16`` for a Scorer that runs under autocast, and the dtype that FSDP casts parameters to.
    """
    attention = scorer.model.config._attn_implementation
    return f"{scorer.layout}/{attention}/{scorer.device.type}/torch {torch.__version__}/transformers {transformers.__version__}"


def _key(prompt: np.ndarray, response: np.ndarray) -> bytes:
    """128-bit key of a (prompt, response) pair of token ids."""
    digest = hashlib.sha256(len(prompt).to_bytes(8, "big"))
    digest.update(np.ascontiguousarray(prompt, np.int64))
    digest.update(np.ascontiguousarray(response, np.int64))
    return digest.digest()[:16]


class CachedReference:
    """Reference log-probs computed once and kept on disk for every run with the same reference, data and kernels.

    ``folder/<hash of weights, dtype, kernel>/<hash of content>.safetensors`` holds one value per (prompt, response), found
    by the token ids alone: data sets, splits, roles and orders share it. Files are written whole, never changed, and
    verified by their name when read.

    weights         ``weights_hash`` of the reference (of the policy before training, when they are the same)
    kernel          ``kernel_id`` of the Scorer that computes
    dtype           dtype of the reference's weights
    scorer_factory  gives something called as ``(batch, roles, tokens) -> Scored``; used without gradient, and only if
                    something is missing or rows are checked. May be the policy's own Scorer before the first step, or an
                    AdapterOffReference: then no second model exists
    tokens          keep per-token log-probs too (4 bytes per response token instead of 8 per response)
    batch_tokens    tokens scored together while filling
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        weights: str,
        kernel: str,
        dtype: torch.dtype,
        device: torch.device | str,
        scorer_factory: Callable[[], Callable[..., Scored]],
        tokens: bool = False,
        batch_tokens: int = 16384,
    ) -> None:
        identity = {
            "format": FORMAT,
            "weights": weights,
            "kernel": kernel,
            "dtype": str(dtype),
            "tokens": tokens,
        }
        self.folder = Path(folder) / content_hash(identity)[:32]
        self.dtype, self.device, self.tokens, self.batch_tokens = (
            dtype,
            torch.device(device),
            tokens,
            batch_tokens,
        )
        self._padded = kernel.startswith("padded")
        half = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        rounding = {"bf16": torch.bfloat16, "tf32": torch.float16, **half}  # as many bits
        precision = next((rounding[part] for part in kernel.split("/") if part in rounding), dtype)
        self._limit = CHECK_TOLERANCE[precision]
        self._factory = scorer_factory
        self._value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self._logps: dict[bytes, float] = {}
        self._token_logps: dict[bytes, np.ndarray] = {}

    def fill(
        self,
        rows: Sequence[Row],
        roles: Sequence[str],
        *,
        world: World,
        check: int = 4,
        tolerance: float | None = None,
    ) -> None:
        """Make sure every response of ``rows`` with a role in ``roles`` is cached. Call on every rank with equal rows.

        Only rank 0 reads and writes the disk. Ranks share the work and make the same number of Scorer calls. Then ``check``
        rows, drawn at random, are scored again.

        Raises UserError when the check finds a difference above ``tolerance`` nats per token (None: by precision), or a file
        is damaged.
        """
        start = time.perf_counter()
        self._logps, self._token_logps = world.on_main(self._read)
        num_cached = len(self._logps)
        parts = self._missing(rows, roles)
        scorer = self._factory() if parts or check else None
        found: list[tuple[bytes, float, np.ndarray | None]] = []
        for batch, live in world.share(parts) if parts else []:
            scored = self._score(scorer, batch, (CACHED,))
            if live:
                found += self._entries(batch, batch.positions((CACHED,)), scored)
        found = world.gather(found)
        self._add(found)
        if found and world.is_main:
            self._write(found)
        seconds = time.perf_counter() - start
        log.info(
            "reference log-probs: %d computed in %.2f s, %d were cached", len(found), seconds, num_cached
        )
        if check and rows:
            self._check(scorer, rows, roles, check, tolerance)

    def __call__(self, batch: Batch, roles: Sequence[str], tokens: bool = False) -> Scored:
        if tokens and not self.tokens:
            raise ValueError("this cache was made without per-token log-probs")
        positions = batch.positions(roles)
        keys = [self._key_at(batch, i) for i in positions]
        missing = {
            batch.uids[int(batch.example[i])]
            for i, k in zip(positions, keys, strict=True)
            if k not in self._logps
        }
        if missing:
            shown = ", ".join(sorted(missing)[:8])
            raise UserError(
                f"reference_cache={self.folder}: {len(missing)} rows of the batch are not in it ({shown}); the data changed "
                "after it was filled; use reference=live, or start the run again"
            )
        token_logps = None
        if tokens:
            flat = [self._token_logps[k] for k in keys] or [np.empty(0)]
            token_logps = self._moved(torch.from_numpy(np.concatenate(flat)).to(self._value_dtype))
        return Scored(
            logps=self._moved(torch.tensor([self._logps[k] for k in keys], dtype=self._value_dtype)),
            num_tokens=self._moved(
                torch.tensor([len(batch.responses[i]) for i in positions], dtype=torch.long)
            ),
            roles=tuple(batch.roles[i] for i in positions),
            example=self._moved(batch.example[positions]),
            num_examples=len(batch),
            token_logps=token_logps,
        )

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    @staticmethod
    def _key_at(batch: Batch, position: int) -> bytes:
        return _key(batch.prompts[int(batch.example[position])], batch.responses[position])

    # ------------------------------------------------------------------ computing

    def _missing(self, rows: Sequence[Row], roles: Sequence[str]) -> list[Batch]:
        """What has to be scored, as large batches: every prompt once with all its different responses."""
        wanted: dict[str, tuple[Row, dict[bytes, np.ndarray]]] = {}
        for row in rows:
            for response, role in zip(row.responses, row.roles, strict=True):
                key = _key(row.prompt, response)
                if role in roles and key not in self._logps:
                    wanted.setdefault(row.prompt_key, (row, {}))[1][key] = response
        merged: list[Row] = []
        for row, responses in wanted.values():
            merged += self._cut(row, list(responses.values()))
        merged.sort(key=lambda r: (self._cost(r), r.prompt_key))
        batches, held, used = [], [], 0
        for row in merged:
            if held and used + self._cost(row) > self.batch_tokens:
                batches.append(Batch.collate(held))
                held, used = [], 0
            held.append(row)
            used += self._cost(row)
        return batches + ([Batch.collate(held)] if held else [])

    def _cost(self, row: Row) -> int:
        return row.num_tokens + (len(row.responses) - 1) * len(row.prompt) * self._padded

    def _cut(self, row: Row, responses: list[np.ndarray]) -> Iterator[Row]:
        """Rows of one prompt, each within ``batch_tokens`` where possible."""
        held: list[np.ndarray] = []
        for response in responses:
            if held and self._cost(self._row(row, [*held, response])) > self.batch_tokens:
                yield self._row(row, held)
                held = []
            held.append(response)
        yield self._row(row, held)

    @staticmethod
    def _row(row: Row, responses: list[np.ndarray]) -> Row:
        return Row(
            row.uid, row.prompt, tuple(responses), (CACHED,) * len(responses), row.group, row.prompt_key
        )

    def _score(self, scorer: Callable[..., Scored], batch: Batch, roles: Sequence[str]) -> Scored:
        with torch.no_grad():
            scored = scorer(batch, roles, self.tokens)
        if not torch.isfinite(scored.logps).all():
            bad = scored.example[~torch.isfinite(scored.logps)].tolist()
            raise UserError(
                f"the reference gives log-probs that are not finite: {', '.join(batch.uids[i] for i in bad[:8])}"
            )
        return scored

    def _entries(
        self, batch: Batch, positions: list[int], scored: Scored
    ) -> list[tuple[bytes, float, np.ndarray | None]]:
        keys = [self._key_at(batch, i) for i in positions]
        values = scored.logps.double().cpu().tolist()
        if not self.tokens:
            return [(k, v, None) for k, v in zip(keys, values, strict=True)]
        pieces = np.split(scored.token_logps.cpu().numpy(), np.cumsum(scored.num_tokens.tolist())[:-1])
        return list(zip(keys, values, pieces, strict=True))

    def _add(self, entries: Sequence[tuple[bytes, float, np.ndarray | None]]) -> None:
        for key, value, pieces in entries:
            self._logps[key] = value
            if pieces is not None:
                self._token_logps[key] = pieces

    def _check(
        self,
        scorer: Callable[..., Scored],
        rows: Sequence[Row],
        roles: Sequence[str],
        count: int,
        tolerance: float | None,
    ) -> None:
        chosen = stream(0, "reference_check", len(rows)).choice(
            len(rows), min(count, len(rows)), replace=False
        )
        batch = Batch.collate([rows[i] for i in sorted(chosen)])
        now, cached = self._score(scorer, batch, roles), self(batch, roles)
        limit = self._limit if tolerance is None else tolerance
        gap = (now.logps.to(cached.logps) - cached.logps).abs() / cached.num_tokens
        if gap.numel() and not gap.max() <= limit:
            worst = int(gap.argmax())
            raise UserError(
                f"reference_cache={self.folder}: {batch.uids[int(cached.example[worst])]} is {cached.logps[worst]:.6g} there and "
                f"{now.logps[worst]:.6g} when scored again ({gap[worst]:.2e} nats per token, tolerance {limit:g}); delete this "
                "folder, or use reference=live"
            )

    # ------------------------------------------------------------------ disk

    def _read(self) -> tuple[dict[bytes, float], dict[bytes, np.ndarray]]:
        make_folder(self.folder)  # before anything is computed that could not be kept
        logps: dict[bytes, float] = {}
        token_logps: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            content = path.read_bytes()
            try:
                if hashlib.sha256(content).hexdigest() != path.stem:
                    raise ValueError("its contents do not match its name")
                tensors = load(content)
                keys = [k.tobytes() for k in tensors["keys"].numpy()]
            except (SafetensorError, ValueError, KeyError) as error:
                raise UserError(f"reference_cache={path}: damaged ({error}); delete this file") from error
            logps.update(zip(keys, tensors["logps"].tolist(), strict=True))
            if self.tokens:
                pieces = np.split(
                    tensors["token_logps"].numpy(), np.cumsum(tensors["num_tokens"].numpy())[:-1]
                )
                token_logps.update(zip(keys, pieces, strict=True))
        return logps, token_logps

    def _write(self, entries: Sequence[tuple[bytes, float, np.ndarray | None]]) -> None:
        tensors: dict[str, Tensor] = {
            "keys": torch.from_numpy(
                np.frombuffer(b"".join(k for k, _, _ in entries), np.uint8).copy().reshape(-1, 16)
            ),
            "logps": torch.tensor([v for _, v, _ in entries], dtype=torch.float64),
        }
        if self.tokens:
            tensors["num_tokens"] = torch.tensor([len(p) for _, _, p in entries])
            tensors["token_logps"] = torch.from_numpy(np.concatenate([p for _, _, p in entries]))
        content = save(tensors)
        path = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        try:
            with temporary.open("wb") as handle:
                handle.write(content)
                handle.flush()
                os.fsync(handle.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(self.folder)
