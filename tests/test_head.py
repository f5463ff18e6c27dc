"""The tiled vocabulary head against a NumPy oracle and autograd, and what it may not hold in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import head
from engine.head import Workspace, module_logps, plan, target_logps

M, V, H = 13, 37, 5
ROW = [0, 0, 0, 1, 2, 2, 3, 5, 7, 8, 9, 10, 12]  # rows 4, 6 and 11 predict nothing, row 0 three tokens
TARGET = [3, 3, 36, 0, 1, 5, 17, 36, 9, 9, 20, 3, 11]


def problem(dtype=torch.float64, bias=True, spread=1.0):
    draw = torch.Generator().manual_seed(0)

    def make(*shape):
        return (
            (spread * torch.randn(*shape, generator=draw, dtype=torch.float64)).to(dtype).requires_grad_(True)
        )

    upstream = torch.randn(len(ROW), generator=draw, dtype=torch.float64).to(dtype)
    return (
        make(M, H),
        make(V, H),
        make(V) if bias else None,
        torch.tensor(ROW),
        torch.tensor(TARGET),
        upstream,
    )


def oracle(hidden, weight, bias, upstream):
    """Log-probs and gradients in NumPy float64, one target at a time, from the definition of the softmax."""
    h, w = hidden.detach().double().numpy(), weight.detach().double().numpy()
    b = np.zeros(V) if bias is None else bias.detach().double().numpy()
    logps, dh, dw, db = [], np.zeros_like(h), np.zeros_like(w), np.zeros_like(b)
    for row, target, g in zip(ROW, TARGET, upstream.double().tolist(), strict=True):
        z = w @ h[row] + b
        total = np.exp(z - z.max()).sum()
        p = np.exp(z - z.max()) / total
        logps.append(z[target] - z.max() - np.log(total))
        error = -p
        error[target] += 1
        dh[row] += g * (w.T @ error)
        dw += g * np.outer(error, h[row])
        db += g * error
    return np.array(logps), dh, dw, db


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(head, "CPU_TILE_VOCAB", 8)
    monkeypatch.setattr(head, "MIN_KEPT_TOKENS", 1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept_tokens", [0, 5, M])
@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
def test_values_and_gradients_equal_the_definition(chunk_tokens, kept_tokens, bias):
    hidden, weight, b, row, target, upstream = problem(bias=bias)
    workspace = Workspace(kept_tokens * V * 8)
    logps = target_logps(hidden, weight, b, row, target, workspace=workspace, chunk_tokens=chunk_tokens)
    wanted = [hidden, weight] + ([b] if bias else [])
    grads = torch.autograd.grad(logps, wanted, upstream)
    for ours, theirs in zip([logps, *grads], oracle(hidden, weight, b, upstream), strict=False):
        assert np.abs(ours.detach().numpy() - theirs).max() < 1e-12


@pytest.mark.parametrize("kept_tokens", [0, M])
def test_gradcheck(kept_tokens):
    hidden, weight, b, row, target, _ = problem()
    workspace = Workspace(kept_tokens * V * 8)
    assert torch.autograd.gradcheck(
        lambda h, w, c: target_logps(h, w, c, row, target, workspace=workspace, chunk_tokens=4),
        (hidden, weight, b),
    )


@pytest.mark.parametrize("kept_tokens", [0, M])
def test_large_logits_stay_finite_and_exact(kept_tokens):
    hidden, weight, b, row, target, upstream = problem(spread=40.0)  # logits in the thousands
    logps = target_logps(
        hidden, weight, b, row, target, workspace=Workspace(kept_tokens * V * 8), chunk_tokens=4
    )
    grads = torch.autograd.grad(logps, (hidden, weight, b), upstream)
    for ours, theirs in zip([logps, *grads], oracle(hidden, weight, b, upstream), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-10, atol=1e-10)


def test_half_precision_weights_are_multiplied_in_float32():
    hidden, weight, b, row, target, upstream = problem(torch.bfloat16)
    logps = target_logps(hidden, weight, b, row, target, workspace=Workspace(0))
    assert logps.dtype == torch.float32
    grads = torch.autograd.grad(logps, (hidden, weight, b), upstream.float())
    assert all(g.dtype == torch.bfloat16 for g in grads)
    expected, *gradients = oracle(hidden, weight, b, upstream)
    assert np.abs(logps.detach().numpy() - expected).max() < 1e-5
    for ours, theirs in zip(grads, gradients, strict=True):  # only the result is rounded
        np.testing.assert_allclose(ours.float().numpy(), theirs, rtol=2**-8, atol=1e-3)


class HalfProducts(head._Products):
    """CUDA's products of half-precision numbers with float32 sums, played on the CPU; nothing else may be multiplied."""

    def into(self, out, a, b, alpha=1.0):
        assert a.dtype == b.dtype == self.inputs and out.dtype == self.sums
        out.add_(a.float() @ b.float(), alpha=alpha)

    def logits(self, out, hidden, weight, shift):
        assert hidden.dtype == weight.dtype == self.inputs and out.dtype == self.sums
        out.copy_(hidden.float() @ weight.float().T + (0.0 if shift is None else shift))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kept_tokens", [0, 5, M])
def test_exponentials_are_rounded_and_kept_as_they_are_multiplied(kept_tokens, bias, monkeypatch):
    monkeypatch.setattr(head, "_products", lambda hidden: HalfProducts(torch.bfloat16, torch.float32))
    hidden, weight, b, row, target, upstream = problem(torch.bfloat16, bias=bias)
    hidden, weight = (x.detach().float().requires_grad_(True) for x in (hidden, weight))  # as under autocast
    workspace = Workspace(kept_tokens * V * 2)
    logps = target_logps(hidden, weight, b, row, target, workspace=workspace, chunk_tokens=4)
    wanted = [hidden, weight] + ([b] if bias else [])
    grads = torch.autograd.grad(logps, wanted, upstream.float())
    values, *gradients = oracle(hidden, weight, b, upstream)
    assert np.abs(logps.detach().numpy() - values).max() < 1e-5
    for ours, theirs in zip(grads, gradients, strict=False):
        assert np.linalg.norm(ours.float().numpy() - theirs) < 5e-3 * np.linalg.norm(theirs)
    assert {dtype for name, dtype in workspace._memory if name == "kept"} <= {torch.bfloat16}


@pytest.mark.parametrize("frozen", ["hidden", "weight", "all but bias"])
def test_only_wanted_gradients_are_formed(frozen):
    hidden, weight, b, row, target, upstream = problem()
    trained = {"hidden": [weight, b], "weight": [hidden], "all but bias": [b]}[frozen]
    expected = dict(
        zip((id(hidden), id(weight), id(b)), oracle(hidden, weight, b, upstream)[1:], strict=True)
    )
    for leaf in (hidden, weight, b):
        leaf.requires_grad_(any(leaf is t for t in trained))
    logps = target_logps(hidden, weight, b, row, target, workspace=Workspace(1 << 20))
    for leaf, grad in zip(trained, torch.autograd.grad(logps, trained, upstream), strict=True):
        assert np.abs(grad.numpy() - expected[id(leaf)]).max() < 1e-12


def test_a_later_forward_pass_takes_the_kept_memory_without_harm():
    hidden, weight, b, row, target, upstream = problem()
    workspace = Workspace(M * V * 8)
    first = target_logps(hidden, weight, b, row, target, workspace=workspace)
    second = target_logps(hidden * 1.5, weight, b, row, target, workspace=workspace)
    with torch.no_grad():
        target_logps(hidden * 3, weight, b, row, target, workspace=workspace)
    _, dh, dw, db = oracle(hidden, weight, b, upstream)
    for loss in (second, first):  # the second one's backward pass, twice, does not spoil anything either
        torch.autograd.grad(loss, weight, upstream, retain_graph=True)
        grads = torch.autograd.grad(loss, (hidden, weight, b), upstream, retain_graph=True)
    for ours, theirs in zip(grads, (dh, dw, db), strict=True):
        assert np.abs(ours.numpy() - theirs).max() < 1e-12


def test_nothing_to_score_still_reaches_every_parameter():
    hidden, weight, b, *_ = problem()
    none = torch.zeros(0, dtype=torch.long)
    logps = target_logps(hidden[:0], weight, b, none, none, workspace=Workspace(1 << 20))
    assert logps.shape == (0,)
    grads = torch.autograd.grad(logps.sum(), (hidden, weight, b))
    assert all(g.abs().max() == 0 for g in grads)


def test_any_head_can_be_chunked_with_recomputation():
    hidden, weight, b, row, target, upstream = problem()

    def capped(h):
        return 3 * torch.tanh((h @ weight.T + b) / 3)

    whole = capped(hidden).log_softmax(1)[row, target]
    logps = module_logps(capped, hidden, row, target, chunk_tokens=4)
    torch.testing.assert_close(logps, whole, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(logps, (hidden, weight, b), upstream),
        torch.autograd.grad(whole, (hidden, weight, b), upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    none = torch.zeros(0, dtype=torch.long)
    empty = module_logps(capped, hidden, none, none)
    assert empty.shape == (0,) and empty.requires_grad


@pytest.mark.parametrize("rows, kept", [(0, 0), (1, 0), (1, 1), (10, 0), (10, 3), (10, 10), (9, 5)])
def test_tiles_cover_every_entry_once_and_kept_ones_do_not_overlap(rows, kept):
    seen = np.zeros((rows, V), int)
    places = np.zeros(kept * V, int)
    for group in plan(rows, V, 4, 8, kept):
        for tile in group:
            seen[tile.rows, tile.vocab] += 1
            if tile.kept is not None:
                places[tile.kept : tile.kept + tile.shape[0] * tile.shape[1]] += 1
    assert (seen == 1).all() and (places == 1).all()


class Largest(TorchDispatchMode):
    """Elements of the largest storage that any operation makes or saves."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("keep_bytes", [0, 64 * V * 8])
def test_memory_does_not_grow_to_tokens_times_vocabulary(keep_bytes):
    num = 500
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(num, H, generator=draw, dtype=torch.float64).requires_grad_(True)
    weight = torch.randn(V, H, generator=draw, dtype=torch.float64).requires_grad_(True)
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    workspace = Workspace(keep_bytes)
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logps = target_logps(
            hidden,
            weight,
            None,
            torch.arange(num),
            torch.arange(num) % V,
            workspace=workspace,
            chunk_tokens=16,
        )
        logps.sum().backward()
    allowed = max(num * H, V * H, 64 * V)
    assert max(saved) <= num * H
    assert largest.numel <= allowed < num * V
