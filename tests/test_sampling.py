"""Generation: exact conditional distributions, draws that depend on seed and key alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from engine.models import ModelSpec, build_policy, load_tokenizer
from engine.sampling import generate, next_tokens
from utils import UserError, stream

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # far from uniform, so that a wrong context shows
}
GPT2 = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.5,
}
GEMMA = LLAMA | {"model_type": "gemma", "head_dim": 8, "initializer_range": 0.2}
CONFIGS = pytest.mark.parametrize("config", [LLAMA, GPT2, GEMMA], ids=lambda c: c["model_type"])


class Words:
    """Stands for a tokenizer of 6 tokens: only its EOS is looked at."""

    eos_token_id = 5


def model_of(config, small=False, **changes):
    spec = ModelSpec(
        name="t",
        lr=1e-3,
        config=config,
        tokenizer_name_or_path="assets/tokenizer",
        policy_dtype="float64",
        reference_dtype="float64",
        **changes,
    )
    model = build_policy(spec, seed=0, device="cpu")
    if small:  # a vocabulary of 6, so that everything can be enumerated
        model.set_input_embeddings(
            torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight[:6])
        )
        head = torch.nn.Linear(16, 6, bias=False, dtype=torch.float64)
        head.weight = torch.nn.Parameter(
            model.lm_head.weight[:6].detach() * (0.5 if "n_embd" in config else 2)
        )
        model.set_output_embeddings(head)
        model.generation_config.eos_token_id = None
    return model


def full_distribution(model, ids):
    """(V,) next-token probabilities from one unpadded forward without a cache."""
    with torch.no_grad():
        return (
            model(input_ids=torch.tensor([list(map(int, ids))]), use_cache=False)
            .logits[0, -1]
            .softmax(-1)
            .numpy()
        )


def oracle(model, prompt, uniforms, stops, temperature=1.0, top_p=1.0, top_k=None):
    """The same sampling, token by token, in NumPy, from the definition."""
    ids = []
    for u in uniforms:
        probs = full_distribution(model, [*prompt, *ids]) ** (1 / temperature)
        probs /= probs.sum()
        order = np.argsort(-probs, kind="stable")
        keep = order[:top_k]
        probs = np.where(np.isin(np.arange(len(probs)), keep), probs, 0)
        probs /= probs.sum()
        count, mass = 0, 0.0
        while mass < top_p and count < len(order):
            mass += probs[order[count]]
            count += 1
        probs = np.where(np.isin(np.arange(len(probs)), order[:count]), probs, 0)
        token = int(np.argmax(np.cumsum(probs) / probs.sum() > u))
        ids.append(token)
        if token in stops:
            break
    return ids


PROMPTS = [
    np.array(p, np.int32)
    for p in ([3], [1, 2, 3, 4, 0, 1, 2], [3], [2, 2], [4, 3, 2, 1], [3], [1, 2, 3, 4, 0, 1, 2])
]
KEYS = [("row", i) for i in range(len(PROMPTS))]


def ids_of(samples):
    return [s.ids.tolist() for s in samples]


@CONFIGS
@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 1.3, "top_k": 4, "top_p": 0.9}],
    ids=str,
)
def test_draws_invert_the_conditional_distribution_of_an_unpadded_forward(config, how):
    model = model_of(config, small=True)
    samples = generate(model, Words(), PROMPTS, max_new_tokens=8, seed=3, keys=KEYS, batch_size=4, **how)
    for prompt, key, sample in zip(PROMPTS, KEYS, samples, strict=True):
        uniforms = stream(3, "sample", *key).random(8)
        expected = oracle(model, prompt, uniforms, {5}, **how)
        assert sample.ids.tolist() == expected
        assert sample.finished == (expected[-1] == 5)
        assert sample.ids.dtype == np.int32
    assert len({tuple(i) for i in ids_of(samples)}) > 3  # the test would mean little if all were equal


@CONFIGS
def test_draws_do_not_depend_on_batch_size_order_or_company(config):
    model = model_of(config)
    tokenizer = load_tokenizer(
        ModelSpec(name="t", lr=1, config=config, tokenizer_name_or_path="assets/tokenizer")
    )

    def draw(indices, batch_size):
        chosen = [PROMPTS[i] for i in indices], [KEYS[i] for i in indices]
        out = generate(
            model, tokenizer, chosen[0], max_new_tokens=12, seed=1, keys=chosen[1], batch_size=batch_size
        )
        return dict(zip(indices, ids_of(out), strict=True))

    everything = draw(range(7), 7)
    assert all(draw(range(7), size) == everything for size in (1, 2, 3, 100))
    assert draw([6, 0, 3, 5, 1, 2, 4], 3) == everything
    assert draw([4], 1)[4] == everything[4]
    assert everything[0] != everything[2]  # equal prompts, different keys


def test_frequencies_of_whole_responses_match_their_exact_probabilities():
    model = model_of(GPT2, small=True)
    prompt, count, length = np.array([1, 2]), 4000, 2
    samples = generate(
        model,
        Words(),
        [prompt] * count,
        max_new_tokens=length,
        seed=0,
        keys=[("f", i) for i in range(count)],
        batch_size=1000,
    )
    seen: dict[tuple[int, ...], int] = {}
    for sample in samples:
        seen[tuple(sample.ids.tolist())] = seen.get(tuple(sample.ids.tolist()), 0) + 1
    first = full_distribution(model, prompt)
    exact = {(5,): first[5]}
    for a, b in itertools.product(range(5), range(6)):
        exact[(a, b)] = first[a] * full_distribution(model, [*prompt, a])[b]
    assert sum(exact.values()) == pytest.approx(1)
    assert set(seen) <= set(exact)
    # Pearson's statistic over cells of expectation >= 5; 31 cells, so 70 is beyond the 0.9999 quantile
    large = {k: p for k, p in exact.items() if p * count >= 5}
    assert len(large) > 10
    assert sum((seen.get(k, 0) - p * count) ** 2 / (p * count) for k, p in large.items()) < 70


@CONFIGS
def test_greedy_takes_the_most_probable_token_and_ignores_the_seed(config):
    model = model_of(config, small=True)
    samples = generate(
        model, Words(), PROMPTS, max_new_tokens=6, temperature=0, seed=0, keys=KEYS, batch_size=3
    )
    for prompt, sample in zip(PROMPTS, samples, strict=True):
        ids: list[int] = []
        while len(ids) < 6 and (not ids or ids[-1] != 5):
            ids.append(int(full_distribution(model, [*prompt, *ids]).argmax()))
        assert sample.ids.tolist() == ids
    again = generate(
        model, Words(), PROMPTS, max_new_tokens=6, temperature=0, seed=9, keys=KEYS, batch_size=7
    )
    assert ids_of(again) == ids_of(samples)


def test_a_longer_limit_extends_responses_without_changing_them():
    model = model_of(LLAMA, small=True)
    short = generate(model, Words(), PROMPTS, max_new_tokens=3, seed=1, keys=KEYS, batch_size=4)
    long = generate(model, Words(), PROMPTS, max_new_tokens=20, seed=1, keys=KEYS, batch_size=4)
    assert any(not s.finished for s in short)
    for a, b in zip(short, long, strict=True):
        assert b.ids[: len(a.ids)].tolist() == a.ids.tolist()
        if not a.finished:
            assert len(a.ids) == 3
            assert 5 not in a.ids
        else:
            assert (a.ids == 5).sum() == 1
            assert a.ids[-1] == 5


def test_prompts_may_have_limits_of_their_own():
    model = model_of(LLAMA, small=True)
    limits = [1, 5, 20, 2, 9, 3, 5]
    long = generate(model, Words(), PROMPTS, max_new_tokens=20, seed=1, keys=KEYS, batch_size=4)
    own = generate(model, Words(), PROMPTS, max_new_tokens=limits, seed=1, keys=KEYS, batch_size=4)
    assert ids_of(own) == [ids[:n] for ids, n in zip(ids_of(long), limits, strict=True)]
    assert [s.finished for s in own] == [5 in s.ids for s in own]
    assert any(not s.finished for s in own)


def test_stop_tokens_of_the_generation_config_and_given_ones_end_a_response():
    model = model_of(LLAMA, small=True)

    def ends(**how):
        out = generate(model, Words(), PROMPTS, max_new_tokens=30, seed=2, keys=KEYS, batch_size=7, **how)
        return {int(s.ids[-1]) for s in out if s.finished}

    assert ends() == {5}
    model.generation_config.eos_token_id = [0, 1]
    assert ends() == {0, 1, 5}
    model.generation_config.eos_token_id = 2
    assert ends() <= {2, 5}
    assert ends(stop_ids=[3]) == {3}
    assert ends(stop_ids=[]) == set()


def test_seed_and_key_both_matter():
    model = model_of(LLAMA)

    def draw(seed, key):
        return generate(model, Words(), [PROMPTS[1]], max_new_tokens=8, seed=seed, keys=[key], batch_size=1)[
            0
        ].ids.tolist()

    assert draw(0, ("a",)) == draw(0, ("a",))
    assert draw(0, ("a",)) != draw(1, ("a",))
    assert draw(0, ("a",)) != draw(0, ("b",))


def test_global_generators_and_training_modes_are_as_before():
    model = model_of(GPT2).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global one is what must not move
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    generate(model, Words(), PROMPTS, max_new_tokens=3, seed=0, keys=KEYS, batch_size=2)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert modes == [m.training for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_an_error_inside_leaves_training_modes_as_before():
    model = model_of(GPT2).train()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate(model, Words(), PROMPTS, max_new_tokens=3, seed=0, keys=KEYS, batch_size=2)
    assert model.training


def test_a_lora_model_samples_from_its_adapter():
    plain = model_of(LLAMA)
    adapted = model_of(LLAMA, use_lora=True)

    def draw(model):
        return ids_of(generate(model, Words(), PROMPTS, max_new_tokens=6, seed=0, keys=KEYS, batch_size=4))

    assert draw(adapted) == draw(plain)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_B." in name:
                p.fill_(0.1)
    assert draw(adapted) != draw(plain)


def test_checkpointed_activations_do_not_switch_the_cache_off():
    from engine.models import enable_activation_checkpointing

    model = model_of(LLAMA)
    plain = ids_of(generate(model, Words(), PROMPTS, max_new_tokens=6, seed=0, keys=KEYS, batch_size=4))
    enable_activation_checkpointing(model)
    assert (
        ids_of(generate(model.train(), Words(), PROMPTS, max_new_tokens=6, seed=0, keys=KEYS, batch_size=4))
        == plain
    )


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": 0}, "top_k=0"),
        (
            {"max_new_tokens": 60},
            "max_new_tokens=60: with a prompt of 7 tokens this passes the model's 64 positions; at most 57 fit",
        ),
    ],
)
def test_wrong_settings_are_user_errors(how, message):
    with pytest.raises(UserError, match=message):
        generate(
            model_of(GPT2),
            Words(),
            PROMPTS,
            **({"max_new_tokens": 2, "seed": 0, "keys": KEYS, "batch_size": 2} | how),
        )


def test_keys_must_differ_and_prompts_must_not_be_empty():
    model = model_of(GPT2)
    with pytest.raises(ValueError, match="all different"):
        generate(model, Words(), PROMPTS, max_new_tokens=2, seed=0, keys=[("same",)] * 7, batch_size=2)
    with pytest.raises(ValueError, match="without tokens"):
        generate(model, Words(), [np.array([], int)], max_new_tokens=2, seed=0, keys=[("a",)], batch_size=2)
    assert generate(model, Words(), [], max_new_tokens=2, seed=0, keys=[], batch_size=2) == []


def test_the_largest_uniform_number_never_draws_an_impossible_token():
    largest = torch.tensor([1 - 2.0**-53] * 3, dtype=torch.float64)
    logits = torch.tensor(
        [[0.0, 1.0, -torch.inf, -torch.inf], [3.0, 0.1, 0.2, -torch.inf], [0.0, 0.0, 0.0, 0.0]]
    )
    assert next_tokens(logits, largest, 1.0, 1.0, None).tolist() == [1, 2, 3]
    assert next_tokens(logits, torch.zeros(3, dtype=torch.float64), 1.0, 1.0, None).tolist() == [0, 0, 0]
    assert next_tokens(logits, largest, 1.0, 1.0, 1).tolist() == [1, 0, 0]
    assert next_tokens(logits, largest, 1.0, 1e-9, None).tolist() == [1, 0, 0]
    first_impossible = torch.tensor([[-torch.inf, 0.0, 0.0]])
    assert next_tokens(first_impossible, torch.zeros(1, dtype=torch.float64), 1.0, 1.0, None).tolist() == [1]
