"""The contextual bandit's facts in closed form, and the population answers against sampling, gradients and long runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bandits import contextual, oracles
from bandits.adapter import Pattern
from bandits.continuous import ContinuousBandit
from bandits.methods import Arm, RunningMoments, select
from bandits.policies import sample_categorical
from bandits.worlds import ContextualBandit, WarmStart, generators
from utils import UserError

MU = contextual.data_policy()


def test_the_data_policy_has_the_probabilities_of_the_binned_squashed_cauchy():
    assert MU.sum() == pytest.approx(1, abs=1e-12)
    assert MU[0] == pytest.approx(0.078094, abs=1e-6) and MU[99] == pytest.approx(0.042226, abs=1e-6)
    assert MU[20] == pytest.approx(0.02433, abs=1e-5) and MU[70] == pytest.approx(0.00211, abs=1e-5)
    assert MU[1:-1].argmax() + 1 == 16 and MU[16] == pytest.approx(0.02681, abs=1e-5)
    assert MU[60:81].sum() == pytest.approx(0.0457, abs=5e-5) and MU[10:31].sum() == pytest.approx(
        0.4542, abs=5e-5
    )
    assert -(MU * np.log(MU)).sum() == pytest.approx(4.11735, abs=1e-5)


def test_the_data_policy_is_the_histogram_of_its_own_samples():
    rng = np.random.default_rng(0)
    draws = contextual.squashed_cauchy_sample(rng, (200_000,), limit=1 - 1e-12)
    seen = np.histogram(draws, bins=np.linspace(-1, 1, 101))[0] / draws.size
    assert np.abs(seen - MU).max() < 5 * np.sqrt(MU.max() / draws.size)


def test_the_squashed_cauchy_density_integrates_to_its_bins():
    world, edges = ContinuousBandit(2, [0], dims=1, num_eval=1), np.linspace(-1, 1, 101)
    for k in (16, 20, 50):
        at = torch.linspace(edges[k], edges[k + 1], 2001, dtype=torch.float64)
        density = world.data_log_density(at[:, None]).exp()
        assert float(torch.trapezoid(density, at)) == pytest.approx(MU[k], rel=1e-5)


@pytest.mark.parametrize("latent", ["gaussian", "cauchy"])
def test_the_continuous_policy_is_a_density_and_a_cauchy_one_can_be_the_data_policy(latent):
    world = ContinuousBandit(2, [0], dims=1, latent=latent, num_eval=3)
    params = {name: p.double() for name, p in world.network.init(generators([0], "x")).items()}
    params["b3"] = torch.tensor([[-0.7, np.log(0.4)]], dtype=torch.float64)  # location and log-scale
    params["w3"] = torch.zeros_like(params["w3"])
    contexts = world.eval_prompts.double()
    # substitute a = tanh(u): the density of the action times da/du integrates to one over u
    u = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    actions = torch.tanh(u)
    density = world.log_density(params, contexts, actions.expand(1, 3, -1).unsqueeze(-1)).exp() * (
        1 - actions**2
    )
    mass = 1.0 if latent == "gaussian" else float(np.arctan(8.7 / 0.4) + np.arctan(7.3 / 0.4)) / np.pi
    assert torch.trapezoid(density, u)[0].numpy() == pytest.approx([mass] * 3, abs=1e-4)
    if latent == "cauchy":
        inside = torch.linspace(-0.98, 0.98, 50, dtype=torch.float64).expand(1, 3, -1).unsqueeze(-1)
        assert torch.allclose(world.log_density(params, contexts, inside), world.data_log_density(inside))


@pytest.mark.parametrize("location", [0.3, 6.0])
def test_the_divergence_of_a_continuous_policy_is_its_integral_also_beyond_the_clamp(location):
    world = ContinuousBandit(2, [0], dims=1, num_eval=20, num_draws=4000)
    params = {name: p.double() for name, p in world.network.init(generators([0], "x")).items()}
    params["b3"] = torch.tensor([[location, np.log(0.02)]], dtype=torch.float64)
    params["w3"] = torch.zeros_like(params["w3"])
    world.eval_prompts, world.eval_noise = world.eval_prompts.double(), world.eval_noise.double()
    u = np.linspace(location - 0.2, location + 0.2, 4001)
    q = np.exp(-0.5 * ((u - location) / 0.02) ** 2) / (0.02 * np.sqrt(2 * np.pi))
    p = 1 / (np.pi * 0.4 * (1 + ((u + 0.7) / 0.4) ** 2))
    measured = world.evaluate(params)
    assert float(measured["kl_policy_reference"]) == pytest.approx(
        np.trapezoid(q * np.log(q / p), u), abs=0.02
    )
    entropy = -np.trapezoid(q * (np.log(q) - np.log(1 / np.cosh(u) ** 2)), u)
    assert float(measured["entropy"]) == pytest.approx(entropy, abs=0.02)


def test_continuous_imitation_lowers_the_divergence_and_samples_match_the_density():
    world = ContinuousBandit(3, [0, 1], dims=1, latent="cauchy", warm=WarmStart(60), num_eval=20)
    start = world.network.init(generators([0, 1], "bandit/init"))
    prompts = world.draw_prompts(5)
    params = world.warm_start(prompts)
    before, after = (world.evaluate(x)["kl_reference_policy"] for x in (start, params))
    assert (after < 0.2 * before).all()
    drawn = world.sample(params, prompts, 4000)[0, 0, :, 0]
    location, scale = (x[0, 0, 0, 0] for x in world.location_scale(params, prompts))
    below = (drawn < torch.tanh(location + scale)).double().mean()
    assert float(below) == pytest.approx(
        0.75, abs=0.04
    )  # a Cauchy variable lies below location + scale three times in four


def test_exact_metrics_of_the_contextual_bandit_equal_sums_over_actions():
    world = ContextualBandit(4, [0], WarmStart(3), num_eval=3)
    params = world.warm_start(world.draw_prompts(2))
    params["b3"] += torch.from_numpy(np.random.default_rng(0).normal(0, 1, (1, 100))).float()
    measured, table = world.evaluate(params), contextual.reward_table(4)
    p = world.action_logps(params, world.eval_prompts)[0].double().exp().numpy()
    expected = {
        "reward": [sum(q[a] * table[a] for a in range(100)) for q in p],
        "entropy": [-sum(x * np.log(x) for x in q) for q in p],
        "kl_policy_reference": [sum(q[a] * np.log(q[a] / MU[a]) for a in range(100)) for q in p],
        "kl_reference_policy": [sum(MU[a] * np.log(MU[a] / q[a]) for a in range(100)) for q in p],
    }
    for name, values in expected.items():
        assert float(measured[name]) == pytest.approx(np.mean(values), rel=1e-5), name


@pytest.mark.parametrize(
    ("reward", "mean", "best"),
    [(4, 0.03905, 0.3135), (5, 0.37719, 0.9401), (8, 0.09547, None), (9, 0.18756, None)],
)
def test_expected_rewards_of_the_data_policy_and_of_its_best_of_ten(reward, mean, best):
    table = contextual.reward_table(reward)
    assert MU @ table == pytest.approx(mean, abs=1e-5)
    if best is not None:
        assert oracles.best_of_n(MU, table, 10) @ table == pytest.approx(best, abs=1e-4)


def test_continuous_rewards_use_the_distance_of_the_whole_vector():
    action = np.full(3, 0.7) + np.array([0.0, 0.1, -0.2])
    assert contextual.continuous_reward(1, action) == pytest.approx(np.exp(-0.05 / 0.75**2))
    assert contextual.continuous_reward(2, action) == pytest.approx(np.exp(-0.05 / 0.25**2))
    assert contextual.continuous_reward(3, -action) == pytest.approx(np.exp(-0.05 / 0.25**2))


def test_a_reward_of_another_bandit_is_refused():
    with pytest.raises(UserError, match="4, 5, 8, 9"):
        contextual.check_reward(6, contextual.DISCRETE)


def test_best_of_n_is_the_law_of_the_selected_samples():
    table, num = contextual.reward_table(4), 20_000
    rng = np.random.default_rng(1)
    law = MU
    for rounds in (1, 2):  # the second round samples from what the first one converged to: best of n^2
        actions = sample_categorical(torch.from_numpy(law).expand(1, num, -1), 10, [rng])
        chosen = select(
            Arm("x", "best_of_n"),
            torch.from_numpy(table)[actions],
            torch.zeros(*actions.shape, 1),
            RunningMoments(),
        )
        seen = np.bincount(actions.flatten()[chosen.pick.flatten()].numpy(), minlength=100) / num
        law = oracles.best_of_n(MU, table, 10**rounds)
        assert np.abs(seen - law).max() < 5 * np.sqrt(law.max() / num)
        assert abs(seen @ table - law @ table) < 0.01


def test_best_of_one_is_the_sampling_law_and_ties_are_shared():
    reward = np.array([1.0, 2.0, 2.0, 0.0])
    mu = np.array([0.4, 0.1, 0.3, 0.2])
    assert oracles.best_of_n(mu, reward, 1) == pytest.approx(mu)
    twice = oracles.best_of_n(mu, reward, 2)
    assert twice == pytest.approx([0.6**2 - 0.2**2, (1 - 0.6**2) / 4, 3 * (1 - 0.6**2) / 4, 0.2**2])


def _long_run(objective, num_actions: int) -> np.ndarray:
    """(A,) probabilities where minimising ``objective`` of the (A,) log-probs ends, from the uniform policy."""
    logits = torch.zeros(num_actions, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = objective(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().softmax(0).numpy()


def _all_pairs(reward: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (x.ravel() for x in np.indices((len(reward), len(reward))))
    win = (reward[a] > reward[b]) + 0.5 * (reward[a] == reward[b])
    return torch.from_numpy(np.stack((a, b), 1)), torch.from_numpy(win)


@pytest.mark.parametrize("margin", [1.0, 10.0])
def test_the_ipo_fixed_point_is_where_a_long_run_of_the_loss_ends(margin):
    reward = contextual.reward_table(4)[::5]
    mu = MU[::5] / MU[::5].sum()
    reference = np.roll(mu, 3)
    pick, label = _all_pairs(reward)
    pattern = Pattern(("chosen", "rejected"), len(pick))
    batch, loss = pattern.batch(scalars={"p_chosen": label}), Arm("x", "ipo", margin=margin).loss()
    weight = torch.from_numpy(np.outer(mu, mu).ravel())
    base = torch.from_numpy(np.log(reference))

    def objective(logps):
        return (loss(pattern.scored(logps[pick]), pattern.scored(base[pick]), batch).losses * weight).sum()

    expected = oracles.ipo_fixed_point(reference, mu, reward, margin)
    assert _long_run(objective, len(mu)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("reward", [4, 5])
def test_rounds_of_best_of_n_end_at_the_law_of_the_best_of_n_to_the_power_of_the_rounds(reward):
    table, rng, num, law = contextual.reward_table(reward), np.random.default_rng(2), 20_000, MU
    for rounds in (
        1,
        2,
    ):  # every round imitates, to convergence, the selection among samples of the round before
        actions = sample_categorical(torch.from_numpy(law).expand(1, num, -1), 10, [rng])
        rewards = torch.from_numpy(table)[actions]
        chosen = select(Arm("x", "best_of_n"), rewards, torch.zeros(*actions.shape, 1), RunningMoments())
        picked, loss = actions.flatten()[chosen.pick], Arm("x", "best_of_n").loss()

        def objective(logps, picked=picked, chosen=chosen, loss=loss):
            losses = loss(chosen.pattern.scored(logps[picked]), None, chosen.batch).losses
            return (losses * chosen.weight).sum()

        law = _long_run(objective, 100)
        expected = oracles.best_of_n(MU, table, 10**rounds)
        assert np.abs(law - expected).max() < 5 * np.sqrt(expected.max() / num)
        assert abs(law @ table - expected @ table) < 0.01


def test_rounds_of_rwr_end_at_the_fixed_point_of_as_many_rounds():
    table, tau = contextual.reward_table(4), 0.2
    pattern = Pattern(("sample",), 100)
    batch = pattern.batch(scalars={"reward": torch.from_numpy(table)})
    loss = Arm("x", "rwr", temperature=tau).loss()
    law = MU
    for rounds in (1, 2, 3):

        def objective(logps, law=law):
            losses = loss(pattern.scored(logps[:, None]), None, batch).losses
            return (losses * torch.from_numpy(law)).sum()

        law = _long_run(objective, 100)
        assert law == pytest.approx(oracles.rwr_fixed_point(MU, table, tau, rounds), abs=1e-5)
