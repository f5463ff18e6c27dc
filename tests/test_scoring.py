"""The Scorer: what it scores, what it does not compute twice, when it falls back, heads other than a language model's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForSequenceClassification

from engine import scoring
from engine.head import Workspace
from engine.scoring import Scorer, verify
from tests.scoring_tools import (
    CONFIGS,
    VOCAB,
    gradients,
    largest_gap,
    make_batch,
    make_model,
    plain_logps,
    ragged_batch,
)
from utils import UserError

# peft 0.21 asks transformers 5 models by a deprecated name
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

PAIR = ("chosen", "rejected")
ROLES = (*PAIR, "aux_1")


def count_body_tokens(scorer, batch, roles):
    seen = []
    handle = scorer._inner.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer(batch, roles)
    handle.remove()
    return seen


# ---------------------------------------------------------------------------------------------- what is scored


def test_roles_are_scored_in_batch_order_with_their_counts_and_examples():
    model = make_model("llama")
    scored = Scorer(model)(ragged_batch(), ("aux_1", "rejected"))
    expected = plain_logps(model, ragged_batch(), ("rejected", "aux_1"))
    assert scored.roles == ("rejected", "rejected", "rejected", "rejected", "aux_1")
    assert scored.example.tolist() == [0, 1, 2, 3, 3]
    assert scored.num_tokens.tolist() == [1, 1, 4, 2, 3]
    assert scored.num_examples == 4 and scored.values is None and scored.token_logps is None
    torch.testing.assert_close(scored.logps, torch.stack([p.sum() for p in expected]), rtol=0, atol=1e-11)
    assert torch.equal(scored["rejected"], scored.logps[:4])


def test_token_log_probs_of_duplicates_stand_where_each_response_stands():
    model = make_model("llama")
    scored = Scorer(model)(ragged_batch(), PAIR, tokens=True)
    expected = plain_logps(model, ragged_batch(), PAIR)
    torch.testing.assert_close(scored.token_logps, torch.cat(expected), rtol=0, atol=1e-11)


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize(
    "prompts, rows",
    [
        ([[7]], [(0, "chosen", [3])]),
        ([[7]], [(0, "chosen", [3, 4, 2])]),
        ([[7, 1, 9]], [(0, "chosen", [3]), (0, "rejected", [3])]),
        ([[7, 1, 9], [4]], [(1, "chosen", [3, 3])]),
    ],
    ids=["one token each", "one-token prompt", "equal one-token responses", "an example without a response"],
)
def test_smallest_batches(layout, prompts, rows):
    model = make_model("gpt2")
    batch = make_batch(prompts, rows)
    scored = Scorer(model, layout=layout)(batch, PAIR)
    expected = torch.stack([p.sum() for p in plain_logps(model, batch, PAIR)])
    torch.testing.assert_close(scored.logps, expected, rtol=0, atol=1e-11)
    assert largest_gap(gradients(model, scored.logps.sum()), gradients(model, expected.sum())) < 1e-10


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
def test_no_response_of_the_roles_gives_empty_scores_that_reach_the_parameters(layout):
    # a rank without such a response must still make the collective calls of the others
    model = make_model("llama")
    scored = Scorer(model, layout=layout)(ragged_batch(), ("aux_2",), tokens=True)
    assert scored.logps.shape == scored.token_logps.shape == scored.num_tokens.shape == (0,)
    assert scored.num_examples == 4
    scored.logps.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())
    assert verify(Scorer(model, layout=layout), ragged_batch(), ("aux_2",), 0.0) == 0.0


def test_sums_are_formed_in_float64_and_returned_in_float32():
    model = make_model("llama", dtype=torch.float32)
    scored = Scorer(model)(ragged_batch(), PAIR, tokens=True)
    assert scored.logps.dtype == scored.token_logps.dtype == torch.float32
    pieces = scored.token_logps.double().split(scored.num_tokens.tolist())
    assert torch.equal(scored.logps, torch.stack([p.sum() for p in pieces]).float())


def test_transformers_own_float32_norms_of_gemma_cost_at_most_1e6():
    model = make_model("gemma", exact_norms=False)
    scored = Scorer(model)(ragged_batch(), ROLES)
    expected = torch.stack([p.sum() for p in plain_logps(model, ragged_batch(), ROLES)])
    assert (scored.logps - expected).abs().max() < 1e-6
    ours, theirs = gradients(model, scored.logps.sum()), gradients(model, expected.sum())
    assert all((ours[n] - theirs[n]).abs().max() <= 1e-6 * theirs[n].abs().max().clamp(min=1) for n in ours)


def test_scores_are_leaves_of_a_pytree():
    scored = Scorer(make_model("llama"))(ragged_batch(), PAIR)
    assert any(leaf is scored.logps for leaf in tree_leaves(scored))


# ---------------------------------------------------------------------------------------------- what it costs


def test_equal_prompts_and_equal_responses_cost_no_token():
    scorer = Scorer(make_model("llama"))
    prompt, a, b = [1, 2, 3, 4], [5, 6, 2], [7, 2]
    once = make_batch([prompt], [(0, "chosen", a), (0, "rejected", b)])
    often = make_batch(
        [prompt] * 3,
        [(i, role, r) for i in range(3) for role, r in (("chosen", a), ("rejected", b), ("aux_1", a))],
    )
    # the last token of a response predicts nothing and is not fed
    assert count_body_tokens(scorer, once, ROLES) == count_body_tokens(scorer, often, ROLES) == [4 + 2 + 1]
    assert count_body_tokens(Scorer(scorer.model, layout="padded"), often, ROLES) == [9 * (4 + 2)]


def test_no_tensor_of_tokens_times_vocabulary_is_saved():
    model = make_model("llama", vocab_size=4001, tie_word_embeddings=True)
    rows = [(0, role, list(range(1, 150))) for role in PAIR] + [(0, "aux_1", list(range(3, 160)))]
    batch = make_batch([[1, 2, 3]], rows)
    sizes = []
    for keep_bytes in (0, 40 * 4001 * 8):
        scorer = Scorer(model, keep_bytes=keep_bytes)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            scorer(batch, ROLES).logps.sum().backward()
        assert sum(m.numel() for m in scorer.workspace._memory.values()) * 8 <= keep_bytes + 1024 * 512 * 8
    assert max(sizes) < 300 * 4001 / 4


def test_every_scorer_has_its_own_bounded_workspace():
    model = make_model("llama")
    one, other = Scorer(model, keep_bytes=123), Scorer(model)
    assert one.workspace is not other.workspace and one.workspace.keep_bytes == 123
    assert isinstance(one.workspace, Workspace)


# ---------------------------------------------------------------------------------------------- falling back


@pytest.mark.parametrize(
    "kind, reason",
    [("bloom", "does not use transformers' attention interface"), ("gemma2", "attn_implementation=eager")],
)
def test_models_that_cannot_share_prompts_say_why(kind, reason):
    scorer = Scorer(make_model(kind))
    assert scorer.layout == "padded" and reason in scorer.fallback_reason
    assert Scorer(scorer.model, layout="padded").fallback_reason is None


def test_eager_attention_stays_eager():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    scorer = Scorer(model)
    assert scorer.layout == "padded" and "attn_implementation=eager" in scorer.fallback_reason
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("window, tokens", [(9, 9 * 9), (10, None), (12, None)])
def test_a_sliding_window_shorter_than_a_path_runs_padded(window, tokens):
    model = make_model("mistral", sliding_window=window)
    scorer = Scorer(model)
    assert scorer.layout == "shared_prefix"
    longest, packed = 5 + 5, 5 + 3 + 0 + 5 + 1 + 5 + 0 + 4 + 1 + 2
    assert count_body_tokens(scorer, ragged_batch(), ROLES) == [packed if tokens is None else 9 * longest]
    expected = torch.stack([p.sum() for p in plain_logps(model, ragged_batch(), ROLES)])
    torch.testing.assert_close(scorer(ragged_batch(), ROLES).logps, expected, rtol=0, atol=1e-11)


def test_a_head_that_the_hidden_states_do_not_explain_is_refused():
    model = make_model("llama")
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    with pytest.raises(UserError, match="LlamaForCausalLM: its logits are not head"):
        Scorer(model)


@pytest.mark.parametrize("changes", [{"layout": "packed"}, {"chunk_tokens": 0}])
def test_wrong_settings_name_their_key(changes):
    with pytest.raises(UserError, match=rf"scoring\.{next(iter(changes))}="):
        Scorer(make_model("llama"), **changes)


def test_sampling_and_other_users_of_the_model_are_not_disturbed():
    model = make_model("llama").eval()
    ids = torch.tensor([[5, 9, 2], [7, 1, 4]])
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(ids),
    }
    before, logits = model.generate(ids, **settings), model(ids).logits
    Scorer(model)
    assert model.config._attn_implementation == "shared_prefix"
    assert torch.equal(model.generate(ids, **settings), before)
    assert torch.equal(model(ids).logits, logits)
    assert "shared_prefix" not in model.config.to_json_string()


def test_gradient_checkpointing_changes_nothing():
    model = make_model("llama")
    scorer = Scorer(model)
    expected = gradients(model, scorer(ragged_batch(), ROLES).logps.sum())
    model.activation_checkpointing_enable()
    assert largest_gap(gradients(model, scorer(ragged_batch(), ROLES).logps.sum()), expected) < 1e-12


# ---------------------------------------------------------------------------------------------- adapters, other heads


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_models_are_scored_with_and_without_their_adapter(kind):
    base = make_model(kind)
    with torch.no_grad():
        expected_off = torch.stack([p.sum() for p in plain_logps(base, ragged_batch(), ROLES)])
    with torch.random.fork_rng():
        model = get_peft_model(
            base,
            LoraConfig(
                r=2, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=kind == "gpt2"
            ),
        ).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    scorer = Scorer(model)
    assert scorer.layout == "shared_prefix"
    scored = scorer(ragged_batch(), ROLES)
    expected = torch.stack([p.sum() for p in plain_logps(model, ragged_batch(), ROLES)])
    torch.testing.assert_close(scored.logps, expected, rtol=0, atol=1e-10)
    assert (scored.logps - expected_off).abs().max() > 1e-2
    assert largest_gap(gradients(model, scored.logps.sum()), gradients(model, expected.sum())) < 1e-9
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(scorer(ragged_batch(), ROLES).logps, expected_off, rtol=0, atol=1e-10)


def test_an_adapter_on_the_head_itself_is_scored_in_chunks():
    with torch.random.fork_rng():
        config = LoraConfig(
            r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(make_model("llama"), config).double()
    scored = Scorer(model, chunk_tokens=4)(ragged_batch(), ROLES)
    expected = torch.stack([p.sum() for p in plain_logps(model, ragged_batch(), ROLES)])
    torch.testing.assert_close(scored.logps, expected, rtol=0, atol=1e-10)
    assert largest_gap(gradients(model, scored.logps.sum()), gradients(model, expected.sum())) < 1e-9


@pytest.mark.parametrize("scale", [{"logit_scale": 0.5}, {"logits_scaling": 4.0}])
def test_scaled_logits_are_scored_as_the_config_says(scale, monkeypatch):
    model = make_model("llama")
    expected = plain_logps(model, ragged_batch(), PAIR)
    forward, factor = model.forward, 0.5 if "logit_scale" in scale else 0.25

    def scaled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * factor
        return out

    model.forward = scaled
    for key, value in scale.items():
        setattr(model.config, key, value)
    scored = Scorer(model)(ragged_batch(), PAIR)
    theirs = torch.stack([p.sum() for p in plain_logps(model, ragged_batch(), PAIR)])
    torch.testing.assert_close(scored.logps, theirs, rtol=0, atol=1e-11)
    assert (theirs - torch.stack([p.sum() for p in expected])).abs().max() > 1e-2


def expected_values(model, batch, roles):
    """(S, D): the classifier's own output for each unpadded row."""
    rows = [
        np.concatenate([batch.prompts[int(batch.example[i])], batch.responses[i]])
        for i in batch.positions(roles)
    ]
    return torch.cat([model(input_ids=torch.tensor(r, dtype=torch.long)[None]).logits for r in rows])


@pytest.mark.parametrize("layout", ["padded", "shared_prefix"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gptj"])
@pytest.mark.parametrize("output, dim", [("reward", 1), ("embedding", 3)])
def test_rewards_and_embeddings_are_read_at_the_last_response_token(kind, layout, output, dim):
    model = make_model(kind, AutoModelForSequenceClassification, num_labels=dim)
    scorer = Scorer(model, layout=layout, output=output)
    scored = scorer(ragged_batch(), ROLES)
    expected = expected_values(model, ragged_batch(), ROLES)
    expected = expected[:, 0] if output == "reward" else expected
    tolerance = 1e-5 if kind == "gptj" else 1e-10  # GPT-J's attention computes in float32
    torch.testing.assert_close(scored.values, expected, rtol=0, atol=tolerance)
    assert scored.logps.shape == (0,) and scored.num_tokens.tolist() == [4, 1, 6, 1, 6, 4, 2, 2, 3]
    upstream = torch.linspace(-1, 2, expected.numel(), dtype=torch.float64).view_as(expected)
    ours, theirs = (gradients(model, (v * upstream).sum()) for v in (scored.values, expected))
    assert largest_gap(ours, theirs) < tolerance * 10
    assert verify(scorer, ragged_batch(), ROLES, 1e-6) < 1e-6
    assert scorer(ragged_batch(), ("aux_2",)).values.shape[0] == 0


def test_every_tested_architecture_is_built():
    assert {"llama", "gpt2", "gpt_neox", "gemma", "qwen2", "mistral", "gptj", "bloom", "gemma2"} == set(
        CONFIGS
    )
    assert scoring.PROBE_TOLERANCE[torch.float64] < scoring.PROBE_TOLERANCE[torch.float32] and VOCAB < 64
