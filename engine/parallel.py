"""Ranks: who runs what, sums across processes, FSDP2 and hand-written data parallelism.

With one process every method is a local no-op, so the loop has one form.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError

T = TypeVar("T")
BUCKET_BYTES = 64 << 20


class PeerLost(RuntimeError):
    """A collective failed or timed out: another rank died or hangs."""


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them. ``mode`` is none, ddp or fsdp."""

    rank: int
    size: int
    device: torch.device
    mode: str

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def gradient_scale(self) -> float:
        """FSDP2 averages gradients over ranks; the loop wants their sum."""
        return float(self.size) if self.mode == "fsdp" else 1.0

    def share(self, parts: Sequence[T]) -> list[tuple[T, bool]]:
        """This rank's micro-batches as (part, live). Every rank gets the same number: a short one repeats a part with
        live=False (weight zero), because under FSDP a rank that skips a forward hangs the others."""
        rounds = -(-len(parts) // self.size)
        mine = [self.rank + k * self.size for k in range(rounds)]
        return [(parts[i], True) if i < len(parts) else (parts[-1], False) for i in mine]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item() > 0)

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """The concatenation over ranks, on every rank."""
        if self.size == 1:
            return values
        boxes: list[list[Any]] = [[] for _ in range(self.size)]
        dist.all_gather_object(boxes, values)
        return [value for box in boxes for value in box]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Data parallelism by hand: after the last micro-batch, add the gradients of all ranks in buckets.

        A parameter that this rank did not use counts as zero, so all ranks send the same bytes.
        """
        if self.mode != "ddp" or self.size == 1:
            return
        bucket: list[nn.Parameter] = []
        held = 0
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            bucket.append(p)
            held += p.grad.numel() * p.grad.element_size()
            if held >= BUCKET_BYTES:
                _reduce_bucket(bucket)
                bucket, held = [], 0
        if bucket:
            _reduce_bucket(bucket)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _reduce_bucket(parameters: list[nn.Parameter]) -> None:
    for dtype in {p.grad.dtype for p in parameters}:
        grads = [p.grad for p in parameters if p.grad.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        offset = 0
        for g in grads:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """``auto`` is this rank's GPU where there is one, else the CPU."""
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device={name}: unknown; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={name}: torch finds no CUDA device here; use device=cpu")
    return device


def start(mode: str, device: str, timeout_s: float) -> World:
    """Join the process group that torchrun's environment describes, or be the only process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if mode == "none":
        if size > 1:
            raise UserError(
                f"torchrun started {size} processes but trainer.parallel=none; use trainer=FSDPTrainer or trainer=DDPTrainer"
            )
        return World(0, 1, pick_device(device), "none")
    if "RANK" not in os.environ:
        raise UserError(
            f"trainer.parallel={mode} needs torchrun's environment: start through train.py or torchrun"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    where = pick_device(device, local)
    if where.type == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group(
        "nccl" if where.type == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout_s)
    )
    return World(dist.get_rank(), dist.get_world_size(), where, mode)


def block_classes(model: nn.Module, override: str | None) -> set[str]:
    """Names of the transformer-block classes to shard apart: the model's own ``_no_split_modules``."""
    if override:
        return {override}
    for module in model.modules():
        names = getattr(module, "_no_split_modules", None)
        if names:
            return set(names)
    raise UserError(
        "model.block_name: this model does not say what its blocks are; give model.block_name=CLASS"
    )


def shard(scorer: nn.Module, *, block_name: str | None, param_dtype: torch.dtype | None) -> nn.Module:
    """FSDP2: each transformer block and then the whole Scorer. Parameters become DTensors, in place."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    device_type = next(scorer.parameters()).device.type
    mesh = init_device_mesh(device_type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None
    )
    names = block_classes(scorer, block_name)
    blocks = [m for m in scorer.modules() if type(m).__name__ in names]
    if not blocks:
        known = sorted({type(m).__name__ for m in scorer.modules()})
        raise UserError(
            f"model.block_name={block_name}: no such module class in the model; it has {', '.join(known)}"
        )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(scorer, mesh=mesh, mp_policy=policy)


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor, on the CPU, on every rank (a collective under FSDP)."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()
