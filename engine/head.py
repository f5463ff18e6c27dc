"""The vocabulary head where it is needed, in tiles: log-probs of given tokens without a [tokens, vocabulary] tensor.

For hidden states h (M, H), a linear head W (V, H), b (V,) and K pairs (row m_k, token y_k)::

    logp_k = h[m_k].W[y_k] + b[y_k] - lse[m_k],      lse[m] = log sum_v exp(h[m].W[v] + b[v])
    dh[m]  = sum_{k: m_k=m} g_k W[y_k] - G_m a_m,     a_m = sum_v p_m(v) W[v],   G_m = sum_{k: m_k=m} g_k
    dW     = sum_k g_k e(y_k) h[m_k]^T - sum_m G_m p_m h_m^T

The expectation a does not depend on the incoming gradient g, so it is formed in the forward pass while a tile of
exponentials is still in the cache, with a running maximum as in online softmax (Milakov and Gimelshein 2018). With a
frozen head (LoRA) the backward pass then has no matrix product at all. With a trained head only dW needs the probabilities
again: those that fitted into a fixed memory (`Workspace`) are still there, the rest is computed once more.

Tiles are reused memory: on a CPU the first touch of a fresh temporary costs more than the arithmetic on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# A CPU tile of 1024 x 512 float32 is 2 MB: it stays in the second-level cache between the product that makes it, its
# exponentials and the product that consumes it. A GPU wants few large launches: all of the vocabulary at once.
CPU_TILE_TOKENS = 1024
CPU_TILE_VOCAB = 512
CUDA_TILE_BYTES = 512 << 20
KEEP_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
MODULE_CHUNK_TOKENS = 256  # tokens of a chunk of `module_logps`
MIN_KEPT_TOKENS = 32  # fewer are not worth a tile of their own

aten = torch.ops.aten


@dataclass
class Workspace:
    """Memory of the head that lives as long as its Scorer: one tile, and exponentials kept from forward to backward.

    keep_bytes  size of the kept part; 0 keeps nothing. It does not grow with the batch.
    owner       the forward pass whose exponentials are kept now; a later forward pass takes the memory over, and the
                backward pass of the earlier one computes them again
    """

    keep_bytes: int
    owner: object | None = None
    _memory: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def take(self, name: str, numel: int, like: Tensor) -> Tensor:
        """(numel,) uninitialised memory of ``like``'s dtype and device."""
        key = name, like.dtype
        memory = self._memory.get(key)
        if memory is None or memory.numel() < numel or memory.device != like.device:
            memory = self._memory[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return memory[:numel]


@dataclass(frozen=True)
class Tile:
    """Rows ``rows`` times vocabulary entries ``vocab``; ``kept`` is its place in the kept memory, if it has one."""

    rows: slice
    vocab: slice
    kept: int | None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and vocabulary entries."""
        return self.rows.stop - self.rows.start, self.vocab.stop - self.vocab.start


def _spans(start: int, stop: int, size: int) -> Iterator[slice]:
    """start..stop in equal parts of at most ``size``."""
    if stop <= start:
        return
    parts = -(-(stop - start) // size)
    step = -(-(stop - start) // parts)
    for low in range(start, stop, step):
        yield slice(low, min(low + step, stop))


def plan(num_rows: int, vocab: int, tile_rows: int, tile_vocab: int, num_kept: int) -> list[list[Tile]]:
    """Tiles grouped by their rows: first the ``num_kept`` rows whose exponentials are kept, then the others."""
    offset, groups = 0, []
    for start, stop in ((0, num_kept), (num_kept, num_rows)):
        for rows in _spans(start, stop, tile_rows):
            group = []
            for columns in _spans(0, vocab, tile_vocab):
                tile = Tile(rows, columns, offset if stop == num_kept else None)
                offset += tile.shape[0] * tile.shape[1]
                group.append(tile)
            groups.append(group)
    return groups


@dataclass(frozen=True)
class _Products:
    """Matrix products with inputs rounded to ``inputs`` and sums kept in ``sums`` (float32, or float64 throughout)."""

    inputs: torch.dtype
    sums: torch.dtype

    def into(self, out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
        """out += alpha * a @ b, in place: a temporary of a weight's gradient would take 2 GB for Gemma's."""
        if self.inputs == self.sums:
            out.addmm_(a, b, alpha=alpha)
        else:
            torch.addmm(out, a, b, out_dtype=self.sums, alpha=alpha, out=out)

    def logits(self, out: Tensor, hidden: Tensor, weight: Tensor, shift: Tensor | None) -> None:
        """out = hidden @ weight^T + shift."""
        if self.inputs != self.sums:
            torch.mm(hidden, weight.T, out_dtype=self.sums, out=out)
            if shift is not None:
                out.add_(shift)
        elif shift is None:
            torch.mm(hidden, weight.T, out=out)
        else:
            torch.addmm(shift, hidden, weight.T, out=out)

    def rounded(self, z: Tensor, tile: Tile, workspace: Workspace) -> Tensor:
        """The tile's exponentials as they are multiplied: ``z``, or a copy with ``inputs`` for numbers in the tile's place."""
        return (
            z
            if self.inputs == self.sums
            else _place(tile, workspace, z.new_empty(0, dtype=self.inputs)).copy_(z)
        )

    def scratch(self, tile: Tile, workspace: Workspace, like: Tensor) -> Tensor:
        """Where the logits of a tile are formed: in its place, if they can stay there."""
        return _place(tile if self.inputs == self.sums else replace(tile, kept=None), workspace, like)


def _products(hidden: Tensor) -> _Products:
    """Half precision only where the device multiplies it with float32 sums (CUDA); elsewhere float32 or float64."""
    if hidden.dtype == torch.float64:
        return _Products(torch.float64, torch.float64)
    if hidden.device.type == "cuda":
        half = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype
        return _Products(half, torch.float32)
    return _Products(torch.float32, torch.float32)


def _scatter(values: Tensor, index: Tensor, size: int) -> Tensor:
    """(size, H) with row i the sum of the ``values`` (K, H) whose ``index`` is i; deterministic on every device."""
    return aten.embedding_dense_backward(values, index, size, -1, False)


def _place(tile: Tile, workspace: Workspace, like: Tensor) -> Tensor:
    """(rows, entries) memory of a tile: its own where it is kept, else the one that all others share."""
    size = tile.shape[0] * tile.shape[1]
    if tile.kept is None:
        return workspace.take("scratch", size, like).view(tile.shape)
    return workspace.take("kept", tile.kept + size, like)[tile.kept :].view(tile.shape)


def _exponentials(
    group: list[Tile],
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    products: _Products,
    workspace: Workspace,
    mean: Tensor | None,
    kept_max: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """Largest logit and sum of exponentials relative to it, each (rows,), for the rows ``h`` of one group of tiles.

    Adds sum_v exp(logit - largest) W[v] to the group's rows of ``mean``, and the maximum of each kept tile to ``kept_max``.
    """
    rows = group[0].rows
    like = h.new_empty(0, dtype=products.sums)
    # the lowest finite number, not -inf: exp(-inf - -inf) would be NaN
    top = like.new_full((len(h),), torch.finfo(like.dtype).min)
    total = torch.zeros_like(top)
    for tile in group:
        z = products.scratch(tile, workspace, like)
        products.logits(z, h, w[tile.vocab], None if b is None else b[tile.vocab])
        new_top = torch.maximum(top, z.amax(1))
        z.sub_(new_top[:, None]).exp_()
        shrink = (top - new_top).exp_()
        total.mul_(shrink).add_(z.sum(1))
        if mean is not None:
            mean[rows].mul_(shrink[:, None])
        if mean is not None or tile.kept is not None:
            z = products.rounded(z, tile, workspace)
        if mean is not None:
            products.into(mean[rows], z, w[tile.vocab])
        if tile.kept is not None:
            kept_max.append(new_top)
        top = new_top
    return top, total


class _TargetLogps(torch.autograd.Function):
    """See the module's docstring; arguments as `target_logps`, plus which gradients are wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: Tensor,
        target: Tensor,
        tiling: tuple[int, int],
        workspace: Workspace,
        wants: _Wants,
    ) -> Tensor:
        products = _products(hidden)
        h, w = hidden.to(products.inputs), weight.to(products.inputs)
        b = None if bias is None else bias.to(products.sums)
        num, vocab = len(h), len(w)
        num_kept = 0
        if wants.weight or wants.bias:
            num_kept = min(num, workspace.keep_bytes // (vocab * products.inputs.itemsize))
            num_kept = 0 if num_kept < min(num, MIN_KEPT_TOKENS) else num_kept
        groups = plan(num, vocab, *tiling, num_kept)
        ctx.key = object() if num_kept else None
        like = h.new_empty(0, dtype=products.sums)
        if num_kept:
            workspace.owner = ctx.key
            # all of it now: growing later would lose what is kept
            workspace.take("kept", num_kept * vocab, h)
        lse = like.new_empty(num)
        mean = like.new_zeros(num, h.shape[1]) if wants.hidden else None
        kept_max: list[Tensor] = []
        for group in groups:
            rows = group[0].rows
            top, total = _exponentials(group, h[rows], w, b, products, workspace, mean, kept_max)
            lse[rows] = top + total.log()
            if mean is not None:
                mean[rows].div_(total[:, None])
        picked = h.index_select(0, row).to(like.dtype).mul_(w.index_select(0, target).to(like.dtype)).sum(1)
        if b is not None:
            picked += b.index_select(0, target)
        needs_probs = wants.weight or wants.bias
        ctx.save_for_backward(
            h if needs_probs else None,
            weight,
            bias,
            row,
            target,
            lse if needs_probs else None,
            mean,
            *kept_max,
        )
        ctx.products, ctx.groups, ctx.workspace, ctx.wants = products, groups, workspace, wants
        ctx.dtypes, ctx.num = (hidden.dtype, weight.dtype), num
        return picked - lse.index_select(0, row)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, row, target, lse, mean, *kept_max = ctx.saved_tensors
        products, wants, num = ctx.products, ctx.wants, ctx.num
        w = weight.to(products.inputs)
        row_grad = _scatter(grad[:, None], row, num)[:, 0]  # G, (M,)
        d_hidden = d_weight = d_bias = None
        if wants.hidden:
            d_hidden = _scatter(w.index_select(0, target).to(grad.dtype).mul_(grad[:, None]), row, num)
            d_hidden.addcmul_(row_grad[:, None], mean, value=-1.0)
            d_hidden = d_hidden.to(ctx.dtypes[0])
        if wants.weight:
            d_weight = _scatter(h.index_select(0, row).to(grad.dtype).mul_(grad[:, None]), target, len(w))
        if wants.bias:
            d_bias = _scatter(grad[:, None], target, len(w))[:, 0]
        if wants.weight or wants.bias:
            _subtract_expected(ctx, h, w, bias, lse, row_grad, kept_max, d_weight, d_bias)
        if d_weight is not None:
            d_weight = d_weight.to(ctx.dtypes[1])
        if d_bias is not None:
            d_bias = d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def _subtract_expected(
    ctx: Any,
    h: Tensor,
    w: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    row_grad: Tensor,
    kept_max: Sequence[Tensor],
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    """d_weight -= sum_m G_m p_m h_m^T and d_bias -= sum_m G_m p_m, tile by tile, from kept exponentials where possible."""
    products, workspace = ctx.products, ctx.workspace
    still_kept = ctx.key is not None and workspace.owner is ctx.key
    tops = iter(kept_max)
    for group in ctx.groups:
        rows = group[0].rows
        scaled = (h[rows] * row_grad[rows, None]).to(products.inputs)
        for tile in group:
            top = next(tops) if tile.kept is not None else None
            if still_kept and top is not None:
                # exponentials are relative to the tile's own maximum: the correction goes to the (narrower) hidden side
                p = _place(tile, workspace, h)
                weight_of_row = row_grad[rows] * (top - lse[rows]).exp_()
                left = (h[rows] * weight_of_row[:, None]).to(products.inputs)
            else:
                again = replace(tile, kept=None)  # its place may belong to another forward pass by now
                z = products.scratch(again, workspace, lse)
                products.logits(
                    z, h[rows], w[tile.vocab], None if bias is None else bias[tile.vocab].to(z.dtype)
                )
                p = products.rounded(z.sub_(lse[rows, None]).exp_(), again, workspace)
                weight_of_row, left = row_grad[rows], scaled
            if d_weight is not None:
                products.into(d_weight[tile.vocab], p.T, left, alpha=-1.0)
            if d_bias is not None:
                column = weight_of_row[:, None].to(products.inputs)
                products.into(d_bias[tile.vocab, None], p.T, column, alpha=-1.0)


@dataclass(frozen=True)
class _Wants:
    """Which gradients the backward pass will have to give."""

    hidden: bool
    weight: bool
    bias: bool


def target_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row: Tensor,
    target: Tensor,
    *,
    workspace: Workspace,
    chunk_tokens: int | None = None,
    chunk_vocab: int | None = None,
) -> Tensor:
    """Log-probs (nats) of tokens under a linear head.

    hidden        (M, H); weight (V, H); bias (V,) or None
    row, target   (K,) int64: token ``target[k]`` is predicted from ``hidden[row[k]]``
    chunk_tokens  rows of a tile; None: what suits the device
    chunk_vocab   columns of a tile; None: what suits the device
    returns       (K,) float32, or float64 when ``hidden`` is
    """
    grad = torch.is_grad_enabled()
    wants = _Wants(
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
    )
    on_cuda = hidden.device.type == "cuda"
    columns = chunk_vocab or (len(weight) if on_cuda else CPU_TILE_VOCAB)
    rows = chunk_tokens or (max(256, CUDA_TILE_BYTES // (4 * columns)) if on_cuda else CPU_TILE_TOKENS)
    return _TargetLogps.apply(hidden, weight, bias, row, target, (rows, columns), workspace, wants)


def module_logps(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    row: Tensor,
    target: Tensor,
    chunk_tokens: int | None = None,
) -> Tensor:
    """As `target_logps` for any head: hidden (n, H) -> logits (n, V), called on ``chunk_tokens`` (None: 256) at a time.

    Each chunk is computed again in the backward pass instead of being stored.
    """

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        logits = head(h)
        if logits.dtype != torch.float64:
            logits = logits.float()
        return logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(1)

    size = chunk_tokens or MODULE_CHUNK_TOKENS
    if len(row) == 0:
        return F.linear(hidden, hidden.new_zeros(1, hidden.shape[1]))[:0, 0].to(_products(hidden).sums)
    parts = [
        checkpoint(chunk, h, y, use_reentrant=False, preserve_rng_state=False)
        for h, y in zip(hidden.index_select(0, row).split(size), target.split(size), strict=True)
    ]
    return torch.cat(parts)
