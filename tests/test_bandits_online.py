"""From samples to batches, and the training loop: pairs, advantages, reuse, minibatches, independence of replicates."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bandits.methods import Arm, RunningMoments, advantages, select
from bandits.online import Samples, clip_gradients, draw, grad_norms, log_ratios, step_loss, train
from bandits.policies import Transformer, trainable
from bandits.worlds import ContextualBandit, SequenceBandit, WarmStart, generators
from utils import UserError

REWARDS = torch.tensor(
    [[[0.1, 0.9, 0.4], [0.5, 0.5, 0.2]], [[0.3, 0.2, 0.2], [0.0, 1.0, 0.6]]], dtype=torch.float64
)
OLD = torch.zeros(2, 2, 3, 1)


def picked(arm: Arm) -> dict[tuple[int, ...], float]:
    """Responses of every example -> its weight."""
    chosen = select(arm, REWARDS, OLD, RunningMoments())
    return dict(zip(map(tuple, chosen.pick.tolist()), chosen.weight.tolist(), strict=True))


def test_all_pairs_are_made_with_the_larger_reward_chosen_and_ties_half_labelled():
    chosen = select(Arm("x", "ipo"), REWARDS, OLD, RunningMoments())
    pairs = [tuple(p) for p in chosen.pick.tolist()]
    assert pairs[:3] == [(1, 0), (2, 0), (1, 2)]
    flat, label = REWARDS.flatten(), chosen.batch.scalars["p_chosen"]
    for (w, lost), p in zip(pairs, label.tolist(), strict=True):
        assert flat[w] >= flat[lost] and p == (0.5 if flat[w] == flat[lost] else 1.0)
    assert len(pairs) == 12 and chosen.weight.sum() == pytest.approx(2)


def test_the_threshold_drops_pairs_and_a_replicate_without_pairs_takes_no_step():
    assert set(picked(Arm("x", "dpo", threshold=0.45))) == {(1, 0), (1, 2), (10, 9), (11, 9)}
    chosen = select(Arm("x", "dpo", threshold=0.95), REWARDS, OLD, RunningMoments())
    assert chosen.replicate.tolist() == [1] and torch.isfinite(chosen.weight).all()


def test_best_of_n_takes_the_first_of_the_best():
    assert list(picked(Arm("x", "best_of_n"))) == [(1,), (3,), (6,), (10,)]


def test_negatives_are_the_other_samples_and_ties_are_not_worse():
    chosen = select(Arm("x", "best_of_n_negative", negatives="sum"), REWARDS, OLD, RunningMoments())
    assert chosen.pick.tolist() == [[1, 0, 2], [3, 4, 5], [6, 7, 8], [10, 9, 11]]
    assert chosen.batch.response_scalars["worse"].view(4, 3)[1].tolist() == [0, 0, 1]
    worst = select(Arm("x", "best_of_n_negative", negatives="worst"), REWARDS, OLD, RunningMoments())
    assert worst.pick.tolist() == [[1, 0], [3, 5], [6, 7], [10, 9]]


def test_ppo_is_given_the_log_probs_of_the_sampling_policy():
    old = torch.arange(24.0).view(2, 2, 3, 2)
    chosen = select(Arm("x", "ppo"), REWARDS, old, RunningMoments())
    assert chosen.batch.token_scalars["old_logps"].tolist() == old.flatten().tolist()
    assert chosen.batch.scalars["old_logps"].tolist() == old.sum(-1).flatten().tolist()


@pytest.mark.parametrize("kind", ["prompt_mean", "prompt_std", "leave_one_out", "batch_mean"])
def test_advantages_have_mean_zero_where_they_should(kind):
    found = advantages(REWARDS, kind, False, RunningMoments())
    axis = (1, 2) if kind == "batch_mean" else -1
    assert found.mean(axis).abs().max() < 1e-12
    if kind == "prompt_std":
        assert found.square().mean(-1) == pytest.approx(torch.ones(2, 2, dtype=torch.float64))
    if kind == "leave_one_out":
        assert float(found[0, 0, 0]) == pytest.approx(0.1 - (0.9 + 0.4) / 2)


def test_equal_rewards_give_no_advantage_and_positive_only_pushes_nothing_down():
    same = torch.full((1, 1, 4), 0.3, dtype=torch.float64)
    assert advantages(same, "prompt_std", False, RunningMoments()).abs().max() == 0
    assert advantages(REWARDS, "prompt_std", True, RunningMoments()).amin((1, 2)).tolist() == [0, 0]


def test_running_moments_count_every_sample_once_across_epochs():
    rng = np.random.default_rng(0)
    stream, moments = rng.random((1, 12)), RunningMoments()
    found = [moments.normalise(torch.from_numpy(part)) for part in np.split(stream, 3, axis=1)]
    for i, value in enumerate(torch.cat(found, 1)[0].tolist()):
        seen = stream[0, : i + 1]
        expected = 0.0 if i == 0 else (seen[-1] - seen.mean()) / seen.std()
        assert value == pytest.approx(expected, abs=1e-9)


def test_impossible_arms_are_refused_by_name():
    with pytest.raises(UserError, match="samples=1"):
        Arm("x", "dpo", samples=1)
    with pytest.raises(UserError, match="minibatches=3"):
        Arm("x", "dpo", minibatches=3, prompts=10)
    with pytest.raises(UserError, match="epochs=0"):
        Arm("x", "dpo", epochs=0)


def run(seeds: list[int], arm: Arm, eval_every: int = 5):
    world = ContextualBandit(5, seeds, WarmStart(steps=40), num_eval=10)
    prompts = world.draw_prompts(arm.prompts)
    return train(world, arm, world.warm_start(prompts), prompts, eval_every)


@pytest.fixture(scope="module")
def methods() -> dict:
    """Final rewards of 20 on-policy steps of every method."""
    names = ("best_of_n", "best_of_n_negative", "dpo", "ipo", "rwr", "reinforce", "ppo")
    arms = {m: Arm(m, m, 0.003, epochs=2, reuse=10, prompts=4) for m in names}
    return {name: run([0, 1], arm, 20) for name, arm in arms.items()}


def test_every_method_raises_the_reward_on_policy(methods):
    for name, curves in methods.items():
        assert (curves.last("reward") > curves.metrics["reward"][0] + 0.02).all(), name
        assert curves.steps == [0, 20] and curves.queries == [40, 80]


def test_a_seed_has_the_same_prompts_start_and_samples_alone_and_beside_others():
    """Only rounding differs (the batched matrix product), which Adam's sign-like first steps then amplify."""
    drawn = []
    for seeds in ([7], [5, 7]):
        world = ContextualBandit(5, seeds, WarmStart(steps=1), num_eval=10)
        prompts = world.draw_prompts(3)
        start = world.network.init(generators(seeds, "bandit/init"))
        actions = world.first_actions(world.warm_start(prompts), prompts, 4)
        drawn.append([x[-1] for x in (prompts, start["w0"], start["w3"], actions, world.eval_prompts)])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_minibatches_take_that_many_steps_per_pass_and_fresh_prompts_differ():
    arm = Arm("x", "best_of_n", 0.003, epochs=2, reuse=2, prompts=4, minibatches=2)
    curves = run([0], arm, 1)
    assert curves.steps == list(range(9)) and arm.steps == 8 and arm.regime == "on-policy"
    other = run([0], dataclasses.replace(arm, fresh_prompts=True), 1)
    assert torch.equal(curves.metrics["reward"][:5], other.metrics["reward"][:5])
    assert not torch.equal(curves.metrics["train_reward"][-1], other.metrics["train_reward"][-1])


def test_log_ratios_are_those_of_the_best_sample_and_of_the_others():
    h = torch.arange(12.0).view(2, 2, 3, 1) ** 2
    world = SimpleNamespace(token_logps=lambda params, prompts, actions: h - 1.0)
    data = Samples(torch.zeros(2, 2), torch.zeros(2, 2, 3, 1), REWARDS, OLD, OLD - 1.0)
    found = log_ratios(world, {}, data)
    # the best: the second and the first of replicate 0's prompts, the first and the second of replicate 1's
    assert found["log_ratio/chosen"].tolist() == [(1 + 9) / 2, (36 + 100) / 2]
    assert found["log_ratio/rejected"].tolist() == [(2 + 20.5) / 2, (56.5 + 101) / 2]


def test_log_ratios_start_at_zero_and_the_margin_is_their_difference():
    curves = run([0, 1], Arm("x", "ipo", 0.003, reuse=10, prompts=4), 10)
    start = curves.metrics["log_ratio/chosen"][0]
    assert start.abs().max() < 0.2  # the imitation policy is the reference up to its own error
    gap = curves.metrics["log_ratio/chosen"] - curves.metrics["log_ratio/rejected"]
    assert torch.allclose(gap, curves.metrics["log_ratio/margin"], atol=1e-6)
    assert (curves.last("log_ratio/margin") > 1).all()


def test_the_loss_of_a_step_is_the_mean_over_the_replicate_s_own_pairs():
    world = ContextualBandit(5, [0, 1], WarmStart(3), num_eval=2)
    prompts = world.draw_prompts(3)
    start = world.warm_start(prompts)
    data = draw(world, start, prompts, 4, first=True)
    arm = Arm("x", "ipo", margin=2.0, threshold=0.3)
    chosen = select(arm, data.rewards, data.old, RunningMoments())
    counts = chosen.replicate.bincount().tolist()
    assert counts[0] != counts[1] and min(counts) > 1
    found = step_loss(world, trainable(start), data, chosen, arm.loss())
    h = (world.token_logps(start, prompts, data.actions) - data.reference).squeeze(-1)  # (R, S, N)
    for r, expected in enumerate(found.tolist()):
        pairs = [(s, i, j) for s in range(3) for i in range(4) for j in range(4)]
        kept = [p for p in pairs if data.rewards[r, p[0], p[1]] - data.rewards[r, p[0], p[2]] >= 0.3]
        losses = [float((h[r, s, i] - h[r, s, j] - 2.0) ** 2) for s, i, j in kept]
        assert len(losses) == counts[r] and expected == pytest.approx(np.mean(losses), rel=1e-5)


def test_gradient_clipping_acts_per_replicate():
    params = {"a": torch.zeros(2, 3, requires_grad=True), "b": torch.zeros(2, 2, 2, requires_grad=True)}
    params["a"].grad = torch.tensor([[3.0, 0, 0], [0.3, 0, 0]])
    params["b"].grad = torch.zeros(2, 2, 2)
    params["b"].grad[0, 0, 0], params["b"].grad[1, 0, 0] = 4.0, 0.4
    assert grad_norms(params).tolist() == pytest.approx([5, 0.5])
    clip_gradients(params, 1.0)
    assert grad_norms(params).tolist() == pytest.approx([1, 0.5])


def test_unshifted_log_probs_of_the_best_rise_while_the_right_ones_fall():
    """What the published transformer code optimises is not the likelihood: imitating the best of n by it lowers the likelihood."""
    seeds, arm = [0, 1], Arm("x", "best_of_n", 0.001)
    world = SequenceBandit(6, seeds, Transformer(legacy_logps=True), num_eval=2)
    prompts = world.draw_prompts(10)
    start = world.warm_start(prompts)
    params, data = trainable(start), draw(world, start, prompts, 10, first=True)
    chosen = select(arm, data.rewards, data.old, RunningMoments())
    optimizer = torch.optim.Adam(list(params.values()), lr=arm.lr)
    for _ in range(100):
        optimizer.zero_grad()
        step_loss(world, params, data, chosen, arm.loss()).sum().backward()
        optimizer.step()
    pick = data.rewards.argmax(-1)[..., None, None].expand(-1, -1, 1, 9)
    best = data.actions.gather(2, pick).squeeze(2)  # (R, S, T)
    gain = {}
    for legacy in (True, False):
        network = Transformer(legacy_logps=legacy)
        with torch.no_grad():
            after, before = (network.token_logps(x, prompts, best).sum(-1).mean(1) for x in (params, start))
        gain[legacy] = after - before
    assert (gain[True] > 10).all() and (gain[False] < -0.5).all()


def test_a_tiny_difference_at_the_start_grows_so_means_over_seeds_are_compared():
    ends = []
    for shift in (0.0, 1e-6):
        world = ContextualBandit(4, [0, 1, 2], WarmStart(steps=40), num_eval=10)
        prompts = world.draw_prompts(5)
        start = world.warm_start(prompts)
        start["b3"] = start["b3"] + shift * torch.linspace(-1, 1, 100)
        curves = train(world, Arm("x", "ipo", 0.01, reuse=60, prompts=5), start, prompts, 60)
        ends.append(curves.metrics["reward"])
    gap = (ends[0] - ends[1]).abs()
    assert 0 < gap[0].max() < 1e-6 and gap[1].max() > 30 * gap[0].max()
