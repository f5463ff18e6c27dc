"""Attention over a packed row of trees (see `engine.layouts`), plugged into transformers' attention interface.

A model whose attention implementation is set to ``NAME`` runs `tree_attention`: without ``trees`` (sampling, padded rows)
it is transformers' own ``sdpa``; with them, a prompt's tokens attend causally to the prompt, a branch's tokens to the
prompt and causally to their own branch. Nothing is padded and no mask over the whole row exists:

- on the CPU (and anywhere as a fallback) one `scaled_dot_product_attention` call per block, which keeps the cost at the
  pairs that may attend and lets autograd add up the gradients of a shared prompt;
- on CUDA one FlexAttention call with a block-sparse mask, compiled once with dynamic lengths, where `flex_works`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.layouts import Block
from utils import log

NAME = "shared_prefix"
FLEX_BLOCK = 128  # FlexAttention's tile
# relative error by which two correct kernels may differ; a wrong mask shows as 0.1 or more. float32: products may be TF32
FLEX_TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Arrays of one dtype as tensors on ``device``, in one copy that a GPU's host does not wait for.

    Each begins at a multiple of 16 bytes: compiled code copies an input that does not before every call.
    """
    if not arrays:
        return []
    step = 16 // arrays[0].itemsize
    flat = torch.from_numpy(np.concatenate([np.pad(a.ravel(), (0, -a.size % step)) for a in arrays]))
    if device.type == "cuda":
        flat = flat.pin_memory()
    parts = flat.to(device, non_blocking=True).split([a.size + -a.size % step for a in arrays])
    return [part[: a.size].view(a.shape) for part, a in zip(parts, arrays, strict=True)]


class Trees:
    """The attention pattern of one packed row, built once per micro-batch and used by every layer."""

    def __init__(self, blocks: tuple[Block, ...], device: torch.device, flex: bool) -> None:
        self.blocks = blocks
        self.device = device
        self.flex = flex
        self.sizes = [block.size for block in blocks]

    @cached_property
    def masks(self) -> list[Tensor | None]:
        """Per block a bool mask (block tokens, prompt + block tokens), True where a token may look; None: plain causal."""
        branches = [block for block in self.blocks if block.prompt is not None]
        masks = to_device([_block_mask(b, self.sizes[b.prompt]) for b in branches], self.device)
        found = iter(masks)
        return [None if block.prompt is None else next(found) for block in self.blocks]

    @cached_property
    def block_mask(self) -> BlockMask:
        """The same pattern for FlexAttention."""
        return _flex_mask(*_spans(self.blocks), self.device)


def _block_mask(block: Block, prompt_size: int) -> np.ndarray:
    """(n, prompt_size + n) bool for a block of branches with n tokens together."""
    n = block.size
    start = np.repeat(np.cumsum(block.branches) - block.branches, block.branches)  # each token's branch start
    column = np.arange(n)
    own = (column[None] <= column[:, None]) & (column[None] >= start[:, None])
    return np.concatenate([np.ones((n, prompt_size), bool), own], axis=1)


def _spans(blocks: tuple[Block, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per token of the row: where its prompt begins and ends, and where its own branch begins; each (T,) int32."""
    starts = np.cumsum([0] + [block.size for block in blocks])
    sizes = np.array([block.size for block in blocks])
    prompt = np.array([i if block.prompt is None else block.prompt for i, block in enumerate(blocks)])
    branches = np.array([n for block in blocks for n in block.branches])
    own = np.repeat(np.cumsum(branches) - branches, branches)
    first, stop = np.repeat(starts[prompt], sizes), np.repeat(starts[prompt] + sizes[prompt], sizes)
    return first.astype(np.int32), stop.astype(np.int32), own.astype(np.int32)


def _flex_mask(first: np.ndarray, stop: np.ndarray, own: np.ndarray, device: torch.device) -> BlockMask:
    """A query i may look at keys own[i]..i and first[i]..stop[i]-1 (cut at i): a BlockMask built without a (T, T) array.

    Both directions are worked out here: `BlockMask.from_kv_blocks` would find the second on the device, in many small kernels.
    """
    length = len(own)
    num = -(-length // FLEX_BLOCK)
    low = np.arange(num) * FLEX_BLOCK  # (num,) first key of each key tile
    high = np.minimum(low + FLEX_BLOCK, length)
    query = np.arange(length)
    end = query + 1
    touches = (low < end[:, None]) & (high > own[:, None])
    touches |= (low < np.minimum(stop, end)[:, None]) & (high > first[:, None])
    inside = (low >= own[:, None]) & (high <= end[:, None])
    inside |= (low >= first[:, None]) & (high <= np.minimum(stop, end)[:, None])
    tiles = np.arange(0, length, FLEX_BLOCK)
    some = np.logical_or.reduceat(touches, tiles, axis=0)
    full = np.logical_and.reduceat(inside, tiles, axis=0)
    part = some & ~full
    tables = (*_ordered(part), *_ordered(full), *_ordered(part.T), *_ordered(full.T))
    first_t, stop_t, own_t, *tables_t = to_device((first, stop, own, *tables), device)

    def may_look(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k >= own_t[q]) | ((k >= first_t[q]) & (k < stop_t[q])))

    return BlockMask((length, length), *tables_t, (FLEX_BLOCK, FLEX_BLOCK), may_look)


def _ordered(tiles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(num, num) bool -> (1, 1, num) counts and (1, 1, num, num) tile indices, wanted ones first, int32."""
    index = np.argsort(~tiles, axis=1, kind="stable").astype(np.int32)
    return tiles.sum(axis=1).astype(np.int32)[None, None], index[None, None]


@cache
def _compiled_flex() -> Any:
    # dynamic: packed lengths differ in every micro-batch, and one compilation per length takes seconds
    return torch.compile(flex_attention, dynamic=True)


def _by_blocks(
    query: Tensor, key: Tensor, value: Tensor, trees: Trees, dropout: float, scale: float | None
) -> Tensor:
    """(1, heads, T, D) -> (1, heads, T, D), one call per block."""
    queries, keys, values = (x.split(trees.sizes, dim=2) for x in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    outs = []
    for i, (block, mask) in enumerate(zip(trees.blocks, trees.masks, strict=True)):
        k, v = keys[i], values[i]
        if block.prompt is not None:
            k, v = torch.cat((keys[block.prompt], k), dim=2), torch.cat((values[block.prompt], v), dim=2)
        outs.append(
            F.scaled_dot_product_attention(
                queries[i],
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scale,
                enable_gqa=gqa,
            )
        )
    return torch.cat(outs, dim=2)


def _dtype(query: Tensor) -> torch.dtype:
    """What is multiplied in: autocast does not know FlexAttention, and rotary queries and keys come in float32."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _by_flex(query: Tensor, key: Tensor, value: Tensor, trees: Trees, scale: float | None) -> Tensor:
    """As `_by_blocks` without dropout, in one call."""
    query, key, value = (x.to(_dtype(query)) for x in (query, key, value))
    gqa = query.shape[1] != key.shape[1]
    return _compiled_flex()(query, key, value, block_mask=trees.block_mask, scale=scale, enable_gqa=gqa)


@cache
def flex_works(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether FlexAttention compiles for heads of this shape and agrees with `_by_blocks`, values and gradients.

    It need not: a GPU's shared memory does not hold the float32 tiles of wide heads, for one. Tried once in a process.
    """
    blocks = (Block(None, (150,)), Block(0, (90, 60)), Block(None, (40,)), Block(2, (100,)))
    trees = Trees(blocks, device, flex=True)
    draw = torch.Generator(device).manual_seed(0)
    *inputs, upstream = (
        torch.randn(1, n, sum(trees.sizes), head_dim, generator=draw, device=device, dtype=dtype)
        for n in (heads, kv_heads, kv_heads, heads)
    )

    def results(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, upstream)
        return torch.cat([x.detach().flatten().double() for x in (out, *grads)])

    try:
        found = results(lambda q, k, v: _by_flex(q, k, v, trees, None))
        expected = results(lambda q, k, v: _by_blocks(q, k, v, trees, 0.0, None))
        error = float((found - expected).norm() / expected.norm())
        why = f"relative error {error:.1e}" if not error <= FLEX_TOLERANCE[dtype] else None
    except Exception as reason:  # noqa: BLE001 - compilers raise what they like; the other kernel does without them
        why = f"{type(reason).__name__}: {str(reason).strip().splitlines()[0]}"
    name = f"{heads}/{kv_heads} heads of {head_dim} in {dtype} on {device}"
    if why is None:
        log.info("attention: FlexAttention for %s", name)
    else:
        log.warning("attention: no FlexAttention for %s, one SDPA call per block instead (%s)", name, why)
    return why is None


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    trees: Trees | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (N, heads, L, D), key and value (N, kv heads, L, D) -> (N, L, heads, D).

    Raises:
        ValueError: the layer wants something that the tree pattern does not have (soft-capping, a bias, sinks).
    """
    if trees is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    unknown = [n for n in ("softcap", "position_bias", "s_aux") if kwargs.get(n) is not None]
    if unknown:
        raise ValueError(f"{type(module).__name__}: attention with {unknown[0]} has no shared-prefix form")
    shape = query.shape[1], key.shape[1], query.shape[3]
    # FlexAttention has no dropout
    if trees.flex and dropout == 0.0 and flex_works(*shape, _dtype(query), query.device):
        out = _by_flex(query, key, value, trees, scaling)
    else:
        out = _by_blocks(query, key, value, trees, dropout, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
