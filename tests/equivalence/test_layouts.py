"""Every layout and every tiling of the head gives the log-probs and gradients of plain Hugging Face rows, in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from engine import attention, head, layouts
from engine.scoring import Scorer, verify
from tests.scoring_tools import (
    CONFIGS,
    gradients,
    largest_gap,
    make_batch,
    make_model,
    plain_logps,
    ragged_batch,
)

ROLES = ("chosen", "rejected", "aux_1")
SHARING = ("llama", "gpt2", "gpt_neox", "gptj", "gemma", "qwen2", "mistral")
# transformers computes the attention of these in float32, for plain rows too
TOLERANCE = {"bloom": 1e-5, "gemma2": 1e-5, "gptj": 1e-5}


@functools.cache
def expected(kind):
    """(model, token log-probs, gradients of a weighted sum) from plain rows; the weights tell every token apart."""
    model = make_model(kind)
    pieces = plain_logps(model, ragged_batch(), ROLES)
    logps = torch.cat(pieces)
    return model, [p.detach() for p in pieces], gradients(model, (logps * weights(len(logps))).sum())


def weights(count):
    return torch.linspace(-1.3, 1.7, count, dtype=torch.float64)


def check(kind, scorer):
    model, pieces, grads = expected(kind)
    tolerance = TOLERANCE.get(kind, 1e-10)
    scored = scorer(ragged_batch(), ROLES, tokens=True)
    logps = torch.cat(pieces)
    assert (scored.token_logps - logps).abs().max() < tolerance
    assert (scored.logps - torch.stack([p.sum() for p in pieces])).abs().max() < tolerance
    ours = gradients(model, (scored.token_logps * weights(len(logps))).sum())
    assert largest_gap(ours, grads) < tolerance


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_log_probs_and_gradients_equal_plain_rows(kind, layout):
    scorer = Scorer(expected(kind)[0], layout=layout)
    assert scorer.layout == (layout if kind in SHARING else "padded")
    check(kind, scorer)


@pytest.mark.parametrize("kept_tokens", [0, 7, 1000])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 8, None])
@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_tiles_of_the_head_change_nothing(layout, chunk_tokens, kept_tokens, monkeypatch):
    monkeypatch.setattr(head, "CPU_TILE_VOCAB", 16)  # 61 entries: three tiles and a rest
    monkeypatch.setattr(head, "MIN_KEPT_TOKENS", 1)
    keep = kept_tokens * 61 * 8
    check("llama", Scorer(expected("llama")[0], layout=layout, chunk_tokens=chunk_tokens, keep_bytes=keep))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma"])
def test_flex_attention_with_its_block_mask_changes_nothing(kind, monkeypatch):
    """On CUDA it is compiled; here it runs as it is written, with the same mask, and forward only (torch has no more)."""
    calls = []

    def flex(*args, **kwargs):
        calls.append(kwargs["block_mask"])
        return flex_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex)
    monkeypatch.setattr(attention, "flex_works", lambda *_: True)
    monkeypatch.setattr(attention, "FLEX_BLOCK", 16)  # the row has more tiles than one
    scorer = Scorer(expected(kind)[0])
    monkeypatch.setattr(scorer, "_flex", True)
    with torch.no_grad():
        scored = scorer(ragged_batch(), ROLES, tokens=True)
    assert (scored.token_logps - torch.cat(expected(kind)[1])).abs().max() < 1e-10
    assert len(calls) == 2 and calls[0].kv_num_blocks.shape[-1] > 1


@pytest.mark.parametrize("limit", [1, 4, 1000])
def test_grouping_of_branches_changes_nothing(limit, monkeypatch):
    monkeypatch.setattr(layouts, "GROUP_TOKENS", limit)
    check("llama", Scorer(expected("llama")[0]))


def test_summed_log_probs_carry_the_gradient_of_duplicates():
    model, pieces, _ = expected("gpt2")
    upstream = weights(len(pieces))
    theirs = gradients(
        model, torch.stack([p.sum() for p in plain_logps(model, ragged_batch(), ROLES)]) @ upstream
    )
    ours = gradients(model, Scorer(model)(ragged_batch(), ROLES).logps @ upstream)
    assert largest_gap(ours, theirs) < 1e-9


tokens = st.lists(st.integers(0, 5), min_size=1, max_size=7)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.lists(tokens, max_size=4)),
        min_size=1,
        max_size=4,
    )
)
def test_layouts_agree_on_any_ragged_batch(examples):
    rows = [(i, "chosen", r) for i, (_, responses) in enumerate(examples) for r in responses]
    batch = make_batch([p for p, _ in examples], rows)
    model = expected("llama")[0]
    with torch.no_grad():
        packed, apart = (
            Scorer(model, layout=x)(batch, ("chosen",), tokens=True) for x in ("shared_prefix", "padded")
        )
    torch.testing.assert_close(packed.logps, apart.logps, rtol=0, atol=1e-10)
    torch.testing.assert_close(packed.token_logps, apart.token_logps, rtol=0, atol=1e-10)
    assert packed.num_tokens.tolist() == [len(r) for _, _, r in rows]


# ---------------------------------------------------------------------------------------------- rows


def arrays(*lists):
    return [np.array(x, np.int32) for x in lists]


def test_a_packed_row_holds_each_prompt_and_each_response_once():
    prompts = arrays([1, 2, 3], [9], [1, 2, 3])
    responses = arrays([4, 5], [6, 7, 8], [5], [6, 7, 8])
    layout = layouts.shared_prefix(prompts, responses, [0, 0, 1, 2], last=False)
    assert layout.ids.tolist() == [[1, 2, 3, 4, 6, 7, 9]]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 3, 4, 0]]
    assert layout.unit.tolist() == [0, 1, 2, 1]
    assert layout.at.tolist() == [2, 3, 4, 5, 6]  # the prompt's end predicts both first tokens, once
    assert layout.row.tolist() == [0, 1, 0, 2, 3, 4]
    assert layout.target.tolist() == [4, 5, 6, 7, 8, 5]
    assert [(b.prompt, b.branches) for b in layout.blocks] == [(None, (3,)), (0, (1, 2)), (None, (1,))]


def test_last_token_is_fed_only_when_its_state_is_wanted():
    prompts, responses = arrays([1, 2]), arrays([3, 4], [5])
    for build, fed in ((layouts.shared_prefix, 5), (layouts.padded, 8)):
        layout = build(prompts, responses, [0, 0], last=True)
        assert layout.body_tokens == fed
        assert layout.ids.ravel()[layout.at].tolist() == [4, 5]
        assert len(layout.row) == len(layout.target) == 0
    assert layouts.shared_prefix(prompts, responses, [0, 0], last=False).body_tokens == 3
    assert layouts.padded(prompts, responses, [0, 0], last=False).body_tokens == 6


def dense_pattern(blocks):
    """(T, T) bool of who may look at whom, token by token from the rule."""
    prompt_of, branch_of = [], []
    for i, block in enumerate(blocks):
        for j, n in enumerate(block.branches):
            prompt_of += [i if block.prompt is None else block.prompt] * n
            branch_of += [-1 if block.prompt is None else (i, j)] * n
    size = len(prompt_of)
    may = np.zeros((size, size), bool)
    for q in range(size):
        for k in range(q + 1):
            may[q, k] = prompt_of[q] == prompt_of[k] and (branch_of[k] == -1 or branch_of[k] == branch_of[q])
    return may


def test_flex_mask_is_the_same_pattern_and_its_tiles_cover_it():
    blocks = (
        layouts.Block(None, (150,)),
        layouts.Block(0, (140,)),
        layouts.Block(0, (3, 1, 9)),
        layouts.Block(None, (5,)),
        layouts.Block(3, (260,)),
    )
    may = dense_pattern(blocks)
    mask = attention.Trees(blocks, torch.device("cpu"), flex=True).block_mask
    index = torch.arange(len(may))
    assert np.array_equal(mask.mask_mod(None, None, index[:, None], index[None]).numpy(), may)
    num = -(-len(may) // attention.FLEX_BLOCK)
    partial, full = np.zeros((num, num), bool), np.zeros((num, num), bool)
    for tiles, counts, indices in (
        (partial, mask.kv_num_blocks, mask.kv_indices),
        (full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for i in range(num):
            tiles[i, indices[0, 0, i, : int(counts[0, 0, i])].numpy()] = True
    assert not (partial & full).any() and full.any()
    blow = np.ones((attention.FLEX_BLOCK, attention.FLEX_BLOCK), bool)
    covered = np.kron(partial | full, blow)[: len(may), : len(may)]
    assert not (may & ~covered).any()  # nothing needed is skipped
    assert may[np.kron(full, blow)[: len(may), : len(may)]].all()  # nothing forbidden is taken whole
    assert not covered.all()  # and tiles that nobody needs are left out


def test_block_masks_are_the_pattern():
    blocks = (layouts.Block(None, (4,)), layouts.Block(0, (2, 3)), layouts.Block(0, (1,)))
    may = dense_pattern(blocks)
    masks = attention.Trees(blocks, torch.device("cpu"), flex=False).masks
    assert masks[0] is None
    assert np.array_equal(masks[1].numpy(), may[4:9, :9])
    assert np.array_equal(masks[2].numpy(), may[9:, [0, 1, 2, 3, 9]])


# ---------------------------------------------------------------------------------------------- verification


def see_everything(block, prompt_size):
    return np.ones((block.size, prompt_size + block.size), bool)


def test_verify_reports_the_gap_and_stops_a_wrong_mask(monkeypatch):
    scorer = Scorer(expected("llama")[0])
    assert verify(scorer, ragged_batch(), ROLES, 1e-9) < 1e-12
    monkeypatch.setattr(attention, "_block_mask", see_everything)
    with pytest.raises(ValueError, match=r"scoring\.layout: t:\d, .*use scoring\.layout=padded"):
        verify(scorer, ragged_batch(), ROLES, 1e-3)
    assert scorer.training and scorer.model.training


def test_a_model_that_fails_the_probe_falls_back_to_padded(monkeypatch):
    monkeypatch.setattr(attention, "_block_mask", see_everything)
    model = make_model("llama")
    scorer = Scorer(model)
    assert scorer.layout == "padded" and "differ from those of separate rows" in scorer.fallback_reason
    assert model.config._attn_implementation == "sdpa"
    check("llama", Scorer(expected("llama")[0], layout="padded"))
