"""Batched policies: log-probs against a hand-rolled softmax, sums to one, gradients, replicates that do not touch."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bandits.policies import MLP, Transformer, sample_categorical, trainable
from bandits.worlds import ContextualBandit, SequenceBandit, WarmStart
from tests.oracles.policy import transformer_token_logps

TINY = Transformer(vocabulary=4, num_tokens=3, layers=2, heads=2, width=8)


def rngs(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(s) for s in seeds]


def rough(params: dict, seed: int = 0) -> dict:
    """Parameters far from the near-uniform initial point, in float64."""
    rng = np.random.default_rng(seed)
    return {
        name: p.double() + torch.from_numpy(rng.normal(0, 0.5, tuple(p.shape))) for name, p in params.items()
    }


@pytest.fixture(scope="module")
def tiny() -> dict:
    return rough(TINY.init(rngs(1, 2), torch.float64))


def test_transformer_log_probs_equal_a_loop_over_positions(tiny):
    prompts = torch.tensor([[2], [0]])
    actions = torch.tensor([[[1, 3, 3]], [[2, 0, 1]]])
    found = TINY.token_logps(tiny, prompts, actions)
    for r in range(2):
        one = {name: p[r].numpy() for name, p in tiny.items()}
        ids = [int(prompts[r, 0]), *actions[r, 0].tolist()]
        assert found[r, 0].numpy() == pytest.approx(
            transformer_token_logps(one, ids, TINY.layers, TINY.heads), abs=1e-10
        )


def test_transformer_sequence_probabilities_sum_to_one_and_match_sampling(tiny):
    actions = torch.tensor(list(itertools.product(range(4), repeat=3))).expand(2, -1, -1)  # all 64 responses
    prompts = torch.tensor([[1], [3]]).expand(2, 64)
    probs = TINY.token_logps(tiny, prompts, actions).sum(-1).exp()
    assert probs.sum(1).numpy() == pytest.approx([1, 1], abs=1e-12)
    num = 20_000
    drawn = TINY.sample(tiny, prompts[:, :1], num, rngs(5, 6)).squeeze(1)  # (2, num, 3)
    index = (drawn * torch.tensor([16, 4, 1])).sum(-1)
    for r in range(2):
        seen = torch.bincount(index[r], minlength=64) / num
        assert (seen - probs[r]).abs().max() < 5 * (0.25 / num) ** 0.5


def test_the_first_token_depends_on_the_prompt_and_no_token_on_itself(tiny):
    prompts, actions = torch.tensor([[1], [1]]), torch.tensor([[[0, 1, 2]], [[0, 1, 2]]])
    before = TINY.next_token_logps(tiny, prompts, actions)
    changed = actions.clone()
    changed[..., 2] = 3
    assert torch.equal(before, TINY.next_token_logps(tiny, prompts, changed))
    assert not torch.allclose(before[..., 0, :], TINY.next_token_logps(tiny, prompts + 1, actions)[..., 0, :])


def test_legacy_log_probs_score_the_prompt_and_see_the_token_they_score(tiny):
    legacy = Transformer(vocabulary=4, num_tokens=3, layers=2, heads=2, width=8, legacy_logps=True)
    prompts, actions = torch.tensor([[1], [1]]), torch.tensor([[[0, 1, 2]], [[0, 1, 2]]])
    assert legacy.token_logps(tiny, prompts, actions).shape == (2, 1, 4)
    every = torch.tensor(list(itertools.product(range(4), repeat=3))).expand(2, -1, -1)
    total = legacy.token_logps(tiny, torch.ones(2, 64, dtype=torch.long), every)[..., 1:].sum(-1).exp().sum(1)
    assert (total - 1).abs().min() > 1e-3  # it is not a probability


def test_gradients_equal_finite_differences(tiny):
    prompts, actions = torch.tensor([[1], [2]]), torch.tensor([[[0, 1, 2]], [[3, 3, 0]]])
    params = trainable(tiny)
    TINY.token_logps(params, prompts, actions).sum().backward()
    rng, step = np.random.default_rng(0), 1e-6
    for name, p in params.items():
        direction = torch.from_numpy(rng.normal(size=tuple(p.shape)))
        ends = []
        for sign in (1, -1):
            moved = {n: q.detach() + (sign * step * direction if n == name else 0) for n, q in params.items()}
            ends.append(TINY.token_logps(moved, prompts, actions).sum())
        assert float((ends[0] - ends[1]) / (2 * step)) == pytest.approx(
            float((p.grad * direction).sum()), rel=1e-5, abs=1e-7
        )


def test_mlp_equals_its_formula_and_starts_uniform():
    mlp = MLP(inputs=5, hidden=(4, 6, 6), outputs=3)
    x = torch.from_numpy(np.random.default_rng(0).random((2, 7, 5)))
    start = mlp(mlp.init(rngs(1, 2), torch.float64), x).softmax(-1)
    assert start.numpy() == pytest.approx(np.full((2, 7, 3), 1 / 3), abs=1e-3)
    params = rough(mlp.init(rngs(1, 2), torch.float64))
    one = {name: p[1].numpy() for name, p in params.items()}
    h = x[1].numpy() @ one["w0"] + one["b0"]
    h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * one["norm_gain"] + one[
        "norm_bias"
    ]
    for i in (1, 2):
        h = np.maximum(h, 0) @ one[f"w{i}"] + one[f"b{i}"]
    assert mlp(params, x)[1].numpy() == pytest.approx(np.maximum(h, 0) @ one["w3"] + one["b3"], abs=1e-10)


def test_replicates_neither_share_gradients_nor_randomness():
    params = trainable(TINY.init(rngs(1, 2)))
    prompts, actions = torch.tensor([[1], [2]]), torch.tensor([[[0, 1, 2]], [[3, 3, 0]]])
    TINY.token_logps(params, prompts, actions)[0].sum().backward()
    assert all(p.grad[1].abs().max() == 0 for p in params.values())
    alone = TINY.init(rngs(2))
    assert all(torch.equal(p.detach()[1], alone[name][0]) for name, p in params.items())
    probs = torch.full((2, 3, 4), 0.25)
    both = sample_categorical(probs, 50, rngs(3, 4))
    assert torch.equal(both[1], sample_categorical(probs[1:], 50, rngs(4))[0])


def test_sampling_never_draws_an_action_without_mass():
    probs = torch.tensor([[[0.0, 0.5, 0.0, 0.5, 0.0]]])
    assert set(sample_categorical(probs, 5000, rngs(0)).unique().tolist()) == {1, 3}
    for uniform, action in ((0.0, 1), (0.5, 3), (1 - 2**-53, 3)):  # also at the edges of the cumulative sum
        edge = SimpleNamespace(random=lambda shape, uniform=uniform: np.full(shape, uniform))
        assert sample_categorical(probs, 1, [edge]).item() == action


def test_imitation_reaches_the_data_policy():
    world = ContextualBandit(5, [0, 1], num_eval=20)
    measured = world.evaluate(world.warm_start(world.draw_prompts(10)))
    assert measured["kl_policy_reference"].max() < 1e-3
    assert measured["reward"].numpy() == pytest.approx([0.37719] * 2, abs=2e-3)


def test_the_reference_of_the_sequence_bandit_has_no_dropout_and_training_has():
    world = SequenceBandit(
        6, [0, 1], Transformer(dropout=0.5, layers=1, heads=1, width=8), WarmStart(steps=2), num_eval=4
    )
    prompts = world.draw_prompts(3)
    params = world.warm_start(prompts)
    actions = world.sample(params, prompts, 2)
    plain = world.token_logps(params, prompts, actions)
    assert torch.equal(world.reference_token_logps(prompts, actions), plain)
    assert not torch.equal(world.token_logps(params, prompts, actions, training=True), plain)


def test_sequence_metrics_start_at_zero_divergence_and_agree_with_sampling():
    world = SequenceBandit(7, [3], Transformer(layers=1, heads=1, width=8), WarmStart(steps=60), num_eval=400)
    params = world.warm_start(world.draw_prompts(2))
    measured = world.evaluate(params)
    assert float(measured["kl_policy_reference"]) == pytest.approx(0, abs=1e-9)
    actions = world.sample(params, world.eval_prompts, 10)
    sampled = world.rewards(world.eval_prompts, actions)  # (1, 400, 10), prompt token among the ten
    assert float(measured["reward"]) == pytest.approx(float(sampled.mean()), abs=0.02)
    other = {
        name: p + 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        for name, p in params.items()
    }
    moved = world.evaluate(other)
    assert float(moved["kl_policy_reference"]) > 0 and float(moved["kl_reference_policy"]) > 0
