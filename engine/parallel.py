"""Ranks: who runs what, sums across processes, FSDP2 and hand-written data parallelism.

With one process every method is a local no-op, so the loop has one form.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import UserError

T = TypeVar("T")
BUCKET_BYTES = 64 << 20


# how gloo, NCCL and the store word the loss of a peer where torch raises a bare RuntimeError
_PEER_WORDS = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out|timeout|socket", re.IGNORECASE
)


class PeerLost(RuntimeError):
    """A collective failed or timed out: another rank died or hangs. Says at which step."""


class MainFailed(PeerLost):
    """Rank 0 failed at what only it does (a save, say) and told the others, whose run ends with it."""


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

    def on_main(self, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 alone and give its value to every rank.

        If it raises, rank 0 raises that and every other rank MainFailed: none is left waiting.
        """
        if self.size == 1:
            return action()
        value, failure = None, None
        if self.is_main:
            try:
                value = action()
            except Exception as error:
                self.broadcast((None, f"{type(error).__name__}: {error}"))
                raise
        value, failure = self.broadcast((value, failure))
        if failure is not None:
            raise MainFailed(f"rank 0 failed: {failure}")
        return value

    def to_main(self, tensor: Tensor) -> Tensor:
        """The whole of a possibly sharded tensor on rank 0's CPU, an empty one elsewhere (a collective under FSDP)."""
        whole = full_tensor(tensor)
        return whole if self.is_main else whole.new_empty(0)

    @contextlib.contextmanager
    def watched(self, where: Callable[[], str]) -> Iterator[None]:
        """Name the place where a collective failed, be it ours or one inside FSDP: PeerLost instead of RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            bare = isinstance(error, dist.DistError) or type(error) is RuntimeError
            if self.size == 1 or not bare or not _PEER_WORDS.search(str(error)):
                raise
            reason = " ".join(str(error).split())[:300]
            raise PeerLost(f"rank {self.rank}: peer lost at {where()}: {reason}") from error

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

    def leave(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the group together (an ``ExitStack.push`` callback). After an error there is nobody to wait for: the
        process ends and the kernel closes its connections, which is how the others learn of it."""
        if error is None and self.mode != "none" and dist.is_initialized():
            dist.barrier()  # a group torn down while a peer still talks aborts the peer (torch 2.13, gloo)
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
    # gloo as well: what is offloaded to the CPU is gathered there
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
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


def shard(
    scorer: nn.Module,
    *,
    block_name: str | None,
    param_dtype: torch.dtype | None,
    device: torch.device | None = None,
    cpu_offload: bool = False,
) -> nn.Module:
    """FSDP2: each transformer block and then the whole Scorer. Parameters become DTensors, in place.

    param_dtype  of the forward and backward pass; gradients are then summed in float32. None: the parameters' own
    device       where to compute; a model built elsewhere goes there block by block. None: where the parameters are
    cpu_offload  keep parameters, gradients and optimizer state in CPU memory; blocks go to the device for their turn
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
    )

    device_type = (device or next(scorer.parameters()).device).type
    options = {
        "mesh": init_device_mesh(device_type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=param_dtype, reduce_dtype=torch.float32 if param_dtype else None
        ),
        "offload_policy": CPUOffloadPolicy(pin_memory=device_type == "cuda")
        if cpu_offload
        else OffloadPolicy(),
        # the root too: parameters are then DTensors whenever the optimizer, a save or a gather looks at them
        "reshard_after_forward": True,
    }
    names = block_classes(scorer, block_name)
    blocks = [m for m in scorer.modules() if type(m).__name__ in names]
    if not blocks:
        known = sorted({type(m).__name__ for m in scorer.modules()})
        raise UserError(
            f"model.block_name={block_name}: no such module class in the model; it has {', '.join(known)}"
        )
    for block in blocks:
        fully_shard(block, **options)
    return fully_shard(scorer, **options)


def materialize(module: nn.Module, device: torch.device | str, parameters: torch.device | str) -> None:
    """Give memory (not values) to a sharded module whose parameters are on the meta device: this rank's slices alone.

    Buffers are there already and go to ``device``.
    """
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for m in module.modules():
        for name, p in m._parameters.items():
            holders.setdefault(id(p), []).append((m, name))
    module._apply(lambda t: torch.empty_like(t, device=parameters) if t.is_meta else t.to(device))
    for (first, name), *others in holders.values():  # tied parameters got memory each
        for other, alias in others:
            other._parameters[alias] = first._parameters[name]


@contextlib.contextmanager
def unsharded(scorer: nn.Module) -> Iterator[None]:
    """For calling the model behind a sharded Scorer directly, as generation does: gathers what lies outside the blocks.

    On every rank, with the same inputs; the blocks gather themselves.
    """
    if not hasattr(scorer, "unshard"):
        yield
        return
    scorer._get_fsdp_state()._lazy_init()  # or the first block to run would take itself for the root (torch 2.13)
    scorer.unshard()
    try:
        yield
    finally:
        scorer.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a possibly sharded tensor, on the CPU, on every rank (a collective under FSDP)."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()
