"""The group-robust linear bandit: facts, both closed forms, the saddle point, gradient descent, reward errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from bandits.group import GroupArm, closed_form, group_shares, mle_reward, train_closed_form, train_gradient
from bandits.linear import SCENARIOS, HeldOutStates, LinearWorld, Pairs, Scenario, draw_pairs
from utils import UserError

SEEDS = (2021, 2022)
WORLD = LinearWorld("swapped")


@pytest.fixture(scope="module")
def data() -> tuple[Pairs, Pairs, HeldOutStates]:
    scenario = SCENARIOS["uneven_imbalanced"]
    train = draw_pairs(WORLD, scenario.counts(300), True, SEEDS, "train")
    return (
        train,
        draw_pairs(WORLD, (100, 100), True, SEEDS, "validation"),
        HeldOutStates.draw(WORLD, 50, SEEDS),
    )


def closed(data, **changes):
    arm = GroupArm("x", "ipo", 0.1, "robust", "closed_form", iterations=300, step_size=0.01)
    arm = dataclasses.replace(arm, **changes)
    return train_closed_form(arm, *data, SEEDS, 50)


def group_losses(theta: torch.Tensor, pairs: Pairs, beta: float = 0.1) -> torch.Tensor:
    h = torch.einsum("rnf,rf->rn", pairs.difference, theta)
    return pairs.group_means((h - 1 / (2 * beta)) ** 2)


def test_features_are_those_of_the_formula():
    x = np.array([0.3, 0.8])
    base, swapped, flipped = (
        LinearWorld(f).phi(x, g) for f, g in (("same", 1), ("swapped", 1), ("flipped", 1))
    )
    for a in range(8):
        s = 1 + a / 8
        c, n = np.cos(np.pi * x), np.sin(np.pi * x)
        assert base[a] == pytest.approx([s * c[0], n[0] / s, s * c[1], n[1] / s])
        assert swapped[a] == pytest.approx([n[0] / s, s * c[0], n[1] / s, s * c[1]])
        assert flipped[a] == pytest.approx([s * n[0], c[0] / s, s * n[1], c[1] / s])
    assert np.array_equal(LinearWorld("flipped").phi(x, 0), base)


def test_swapped_groups_have_one_reward_function_and_other_maps_do_not():
    states = np.random.default_rng(0).random((20, 2))
    rewards = {f: [LinearWorld(f).rewards(states, g) for g in (0, 1)] for f in ("same", "swapped", "flipped")}
    assert rewards["swapped"][0] == pytest.approx(rewards["swapped"][1])
    assert not np.allclose(*rewards["same"]) and not np.allclose(*rewards["flipped"])


def test_pairs_have_the_counts_gaps_and_labels_of_their_scenario(data):
    train = data[0]
    assert train.counts == (60, 240) and train.group.tolist() == [0] * 60 + [1] * 240
    gap = (train.chosen - train.rejected).abs()
    assert (gap[:, :60] == 1).all() and (gap[:, 60:] == 4).all()
    truth = torch.from_numpy(np.stack([WORLD.theta(0), WORLD.theta(1)]))[train.group]
    assert ((train.difference * truth).sum(-1) >= 0).all()  # the larger reward is chosen
    even = draw_pairs(WORLD, (150, 150), False, SEEDS, "train")
    assert (even.chosen != even.rejected).all() and set(
        (even.chosen - even.rejected).abs().unique().tolist()
    ) == set(range(1, 8))
    assert even.chosen.min() >= 0 and even.chosen.max() <= 7


def test_bradley_terry_labels_follow_the_reward_gap():
    noisy = draw_pairs(WORLD, (4000, 4000), False, (0,), "train", certain=(1.0, 0.0))
    truth = torch.from_numpy(np.stack([WORLD.theta(0), WORLD.theta(1)]))[noisy.group]
    gap = (noisy.difference * truth).sum(-1)[0]
    assert (gap[:4000] >= 0).all()
    size = gap[4000:].abs()
    expected = torch.sigmoid(size)
    wins = (gap[4000:] > 0).double()
    assert abs(float((wins - expected).mean())) < 5 * 0.5 / 4000**0.5


def test_shares_must_sum_to_one():
    with pytest.raises(UserError, match="shares"):
        Scenario("x", (0.5, 0.6), False)


def test_ipo_closed_form_is_the_weighted_least_squares_solution(data):
    train, alpha = data[0], torch.tensor([[0.3, 0.7], [0.9, 0.1]], dtype=torch.float64)
    found = closed_form(alpha, train, 0.1, 0.0)
    for r in range(2):
        w = np.sqrt([float(alpha[r, g]) / train.counts[g] for g in train.group])
        s = train.difference[r].numpy()
        expected = np.linalg.lstsq(w[:, None] * s, w * 5.0, rcond=None)[0]
        assert found[r].numpy() == pytest.approx(expected, rel=1e-8)


def test_gradient_descent_converges_to_the_closed_form(data):
    half = torch.full((2, 2), 0.5, dtype=torch.float64)
    arm = GroupArm("x", "ipo", 0.1, "importance", iterations=150, lr=5.0, ridge=0.015)
    found = train_gradient(arm, *data, SEEDS, 150)
    assert torch.allclose(found.theta, closed_form(half, data[0], 0.1, 0.015), atol=1e-5)


def test_robust_ipo_reaches_the_saddle_point(data):
    found = closed(data)
    for r in range(2):
        s = data[0].difference[r]

        def losses(theta, s=s):
            h = s.numpy() @ theta
            return np.array([((part - 5) ** 2).mean() for part in np.split(h, [60])])

        best = minimize(
            lambda z: z[-1],
            np.append(found.theta[r].numpy() * 0.9, 30.0),
            constraints={"type": "ineq", "fun": lambda z: z[-1] - losses(z[:-1])},
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert float(found.metrics["train_loss/worst_group"][-1, r]) == pytest.approx(best.x[-1], abs=1e-3)
    means = group_losses(found.theta, data[0])
    assert torch.allclose(means[:, 0], means[:, 1], atol=1e-3)  # an interior equilibrium equalises the groups


def test_both_closed_form_weightings_reach_the_same_parameters_with_other_weights(data):
    per_mean, per_example = closed(data), closed(data, closed_form_weights="example")
    assert torch.allclose(per_mean.theta, per_example.theta, atol=1e-4)
    a, b = (c.metrics["weights/group_0"][-1] for c in (per_mean, per_example))
    assert ((b - a) > 0.05).all()
    # the same effective weights on examples: alpha_g / N_g up to a factor
    assert torch.allclose(b / (1 - b), a / 60 / ((1 - a) / 240), rtol=1e-3)


def test_dividing_the_group_loss_twice_equalises_the_wrong_thing(data):
    found = closed(data, group_loss="divided_twice", step_size=1.0)
    means = group_losses(found.theta, data[0])
    assert torch.allclose(means[:, 0] / 60, means[:, 1] / 240, rtol=1e-3)


def test_robust_gradient_descent_agrees_with_the_closed_form_iteration(data):
    arm = GroupArm("x", "ipo", 0.1, "robust", iterations=400, lr=5.0, step_size=0.01, ridge=0.03)
    assert torch.allclose(
        train_gradient(arm, *data, SEEDS, 400).theta,
        closed(data, ridge=0.03, iterations=400).theta,
        atol=2e-3,
    )


def test_chi_zero_is_importance_sampling(data):
    importance = closed(data, weighting="importance", iterations=1)
    assert torch.allclose(closed(data, chi=0.0).theta, importance.theta)
    assert not torch.allclose(closed(data, chi=0.5).theta, importance.theta, atol=0.1)


def test_log_probs_and_linear_scores_train_alike(data):
    arms = [
        GroupArm("x", "dpo", 1.0, "robust", iterations=20, step_size=0.5, logps=kind)
        for kind in ("linear", "log")
    ]
    first, second = (train_gradient(arm, *data, SEEDS, 20) for arm in arms)
    assert torch.allclose(first.theta, second.theta, atol=1e-9)


def test_dpo_converges_to_the_maximum_likelihood_reward_over_beta(data):
    reward = mle_reward(data[0], ridge=0.02)
    arm = GroupArm(
        "x", "dpo", 2.0, "uniform", iterations=150, lr=4.0, ridge=0.04
    )  # beta^2 times the ridge / 2 on beta theta
    assert torch.allclose(2.0 * train_gradient(arm, *data, SEEDS, 150).theta, reward, atol=1e-6)


def test_the_true_parameters_make_no_reward_error_and_kl_is_that_of_the_softmax(data):
    test = data[2]
    theta = torch.from_numpy(WORLD.theta(0)).expand(2, -1)
    measured = test.of_policy(theta)
    assert measured["reward_error"][:, 0].abs().max() < 1e-12 and (measured["reward_error"][:, 1] > 0.1).all()
    assert torch.allclose(
        measured["reward_error_relative"], measured["reward_error"] / test.rewards.max(-1).values.mean(-1)
    )
    uniform = test.of_policy(torch.zeros_like(theta))
    assert uniform["kl"].abs().max() < 1e-12
    assert torch.allclose(
        uniform["reward_error_sampled"], (test.rewards.max(-1).values - test.rewards.mean(-1)).mean(-1)
    )


def test_worst_and_mean_are_over_the_groups(data):
    curves = closed(data, iterations=1)
    losses, test = group_losses(curves.theta, data[1]), data[2].of_policy(curves.theta)
    for name, values in {"val_loss": losses, "reward_error": test["reward_error"], "kl": test["kl"]}.items():
        assert (values[:, 0] - values[:, 1]).abs().min() > 1e-3
        worst, mean = (curves.metrics[f"{name}/{x}_group"][-1] for x in ("worst", "mean"))
        assert worst.tolist() == pytest.approx([max(row) for row in values.tolist()])
        assert mean.tolist() == pytest.approx([sum(row) / 2 for row in values.tolist()])


def test_uniform_weights_are_the_shares_of_the_data(data):
    assert group_shares(GroupArm("x", "dpo", 1.0).weights((60, 240), 2)).tolist() == [[0.2, 0.8]] * 2
    assert group_shares(GroupArm("x", "dpo", 1.0, "robust").weights((60, 240), 1)).numpy() == pytest.approx(
        np.array([[0.5, 0.5]])
    )


def test_closed_form_dpo_is_refused():
    with pytest.raises(UserError, match="closed_form"):
        GroupArm("x", "dpo", 1.0, solver="closed_form")
