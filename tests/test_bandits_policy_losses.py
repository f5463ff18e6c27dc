"""REINFORCE, PPO, reward-weighted regression and best-of-n with negatives against loops, finite differences and lemmas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bandits.adapter import Pattern
from bandits.negatives import BestOfNNegative
from losses.policy import PPO, Reinforce, RewardWeighted
from losses.types import Loss
from tests.oracles import policy as oracle
from utils import UserError

RNG = np.random.default_rng(0)
B, T = 6, 3
TOKENS = torch.from_numpy(np.log(RNG.uniform(0.05, 0.6, (B, 1, T))))
OLD = TOKENS + torch.from_numpy(RNG.normal(0, 0.4, (B, 1, T)))  # ratios on both sides of the clip
REFERENCE = torch.from_numpy(np.log(RNG.uniform(0.05, 0.6, (B, 1, T))))
ADVANTAGE = torch.from_numpy(RNG.normal(0, 1, B))
REWARD = torch.from_numpy(RNG.uniform(0, 1, B))
SINGLE = Pattern(("sample",), B)


def call(loss: Loss, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """(B,) losses of the samples above."""
    batch = SINGLE.batch(
        scalars={"advantage": ADVANTAGE, "reward": REWARD, "old_logps": OLD.sum((1, 2))},
        token_scalars={"old_logps": OLD},
    )
    policy = SINGLE.scored(tokens.sum(-1), tokens)
    return loss(policy, SINGLE.scored(REFERENCE.sum(-1)), batch).losses


def total(x: torch.Tensor, i: int) -> float:
    return float(x[i].sum())


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_reinforce_equals_its_formula(kl):
    found = call(Reinforce(kl_coef=kl))
    expected = [
        oracle.reinforce(total(TOKENS, i), float(ADVANTAGE[i]), total(REFERENCE, i), kl) for i in range(B)
    ]
    assert found.numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_ppo_equals_its_formula(level, kl):
    found = call(PPO(clip=0.2, level=level, kl_coef=kl))
    for i in range(B):
        advantage = float(ADVANTAGE[i]) - kl * (total(OLD, i) - total(REFERENCE, i))
        new, old = TOKENS[i, 0].tolist(), OLD[i, 0].tolist()
        if level == "sequence":
            new, old = [sum(new)], [sum(old)]
        assert float(found[i]) == pytest.approx(oracle.ppo(new, old, advantage, 0.2), abs=1e-12)


def test_the_ppo_cases_reach_both_sides_of_the_clip():
    ratio = (TOKENS - OLD).exp()
    assert (ratio > 1.2).any() and (ratio < 0.8).any() and ((ratio > 0.8) & (ratio < 1.2)).any()


@pytest.mark.parametrize("bound", [None, 5.0])
def test_reward_weighted_regression_equals_its_formula(bound):
    found = call(RewardWeighted(temperature=0.3, max_weight=bound))
    expected = [oracle.reward_weighted(total(TOKENS, i), float(REWARD[i]), 0.3, bound) for i in range(B)]
    assert found.numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", [Reinforce(), PPO(), PPO(level="sequence"), RewardWeighted(0.3)])
def test_gradients_equal_finite_differences(loss):
    tokens = TOKENS.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: call(loss, x), (tokens,), eps=1e-7, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_ppo_at_the_sampling_policy_has_the_gradient_of_reinforce(level):
    gradients = []
    for loss in (PPO(level=level), Reinforce()):
        tokens = OLD.clone().requires_grad_(True)
        call(loss, tokens).sum().backward()
        gradients.append(tokens.grad)
    assert torch.allclose(*gradients, atol=1e-12)


def test_the_penalty_of_reinforce_is_an_unbiased_gradient_of_the_kl():
    logits = torch.tensor([0.3, -0.5, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([0.1, 0.4, -0.2, 0.3], dtype=torch.float64).log_softmax(0)
    reward = torch.tensor([1.0, 0.2, -0.4, 0.7], dtype=torch.float64)
    logps = logits.log_softmax(0)
    objective = (logps.exp() * (reward - 0.5 * (logps - base))).sum()
    (exact,) = torch.autograd.grad(-objective, logits)
    pattern = Pattern(("sample",), 4)
    logps = logits.log_softmax(0)
    out = Reinforce(kl_coef=0.5)(
        pattern.scored(logps[:, None]),
        pattern.scored(base[:, None]),
        pattern.batch(scalars={"advantage": reward}),
    )
    (found,) = torch.autograd.grad(
        (out.losses * logps.detach().exp()).sum(), logits
    )  # the expectation, enumerated
    assert torch.allclose(found, exact, atol=1e-12)


def test_the_published_penalty_has_no_gradient_on_average_over_fresh_samples():
    """kl_coef (log pi - log pi_ref) added to the loss: E_pi grad log pi = 0, so only reused samples feel it."""
    logits = torch.tensor([0.3, -0.5, 1.1, 0.0], dtype=torch.float64, requires_grad=True)
    base = torch.tensor([0.1, 0.4, -0.2, 0.3], dtype=torch.float64).log_softmax(0)
    logps = logits.log_softmax(0)
    (direct,) = torch.autograd.grad((logps.detach().exp() * (logps - base)).sum(), logits, retain_graph=True)
    (kl,) = torch.autograd.grad((logps.exp() * (logps - base)).sum(), logits)
    assert direct.abs().max() < 1e-12 and kl.abs().max() > 0.05


BEST = torch.from_numpy(np.log(RNG.uniform(0.2, 0.6, (4, 1))))
OTHERS = torch.from_numpy(np.log(RNG.uniform(0.001, 0.5, (4, 3))))
WORSE = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 0]])
MANY = Pattern(("chosen", "rejected", "rejected", "rejected"), 4)


def negative(loss: BestOfNNegative, best: torch.Tensor = BEST, others: torch.Tensor = OTHERS) -> torch.Tensor:
    batch = MANY.batch(response_scalars={"worse": torch.cat((torch.zeros(4, 1), WORSE), 1)})
    reference = MANY.scored(torch.cat((BEST, OTHERS), 1) - 1.0)
    return loss(MANY.scored(torch.cat((best, others), 1)), reference, batch).losses


@pytest.mark.parametrize("push", ["sum", "average", "complement"])
@pytest.mark.parametrize("guard", [0.0, 0.2])
def test_best_of_n_with_negatives_equals_its_formula(push, guard):
    found = negative(BestOfNNegative(0.7, push, guard))
    for i in range(4):
        expected = oracle.best_of_n_negative(
            float(BEST[i]), OTHERS[i].tolist(), WORSE[i].tolist(), 0.7, push, guard
        )
        assert float(found[i]) == pytest.approx(expected, abs=1e-9)


def test_the_complement_pushes_a_near_certain_response_and_is_bounded_at_one():
    others = torch.tensor([[0.99, 0.5, 0.5]] * 4, dtype=torch.float64).log()
    loss = BestOfNNegative(1.0, "complement")
    assert float(negative(loss, others=others)[0] + BEST[0]) == pytest.approx(-np.log(0.01 * 0.5 * 0.5))
    bounded = negative(loss, others=torch.zeros(4, 3, dtype=torch.float64))
    assert float(bounded[0] + BEST[0]) == pytest.approx(3 * 6 * np.log(10), rel=1e-5)


@pytest.mark.parametrize("push", ["sum", "average", "complement"])
def test_the_constrained_variants_have_the_gradient_of_the_plain_ones(push):
    gradients = []
    for constrained in (False, True):
        others = OTHERS.clone().requires_grad_(True)
        negative(BestOfNNegative(0.7, push, constrained=constrained), others=others).sum().backward()
        gradients.append(others.grad)
    assert torch.equal(*gradients)
    assert not torch.allclose(
        negative(BestOfNNegative(0.7, push)), negative(BestOfNNegative(0.7, push, constrained=True))
    )


def test_gradients_of_the_negatives_equal_finite_differences():
    best, others = BEST.clone().requires_grad_(True), OTHERS.clone().requires_grad_(True)
    for push in ("sum", "average", "complement"):
        loss = BestOfNNegative(0.7, push)
        assert torch.autograd.gradcheck(
            lambda b, o, loss=loss: negative(loss, b, o), (best, others), atol=1e-6
        )


@pytest.mark.parametrize("coef", [0.1, 1.0, 5.0])
def test_one_step_with_a_negative_widens_the_margin_by_eta_c_times_pi_w_plus_one_minus_pi_l(coef):
    """Lemma 6.2 of Tajwar et al. 2024 on a softmax, where one gradient step can be written out."""
    eta, (w, lost), pattern = 0.3, (1, 4), Pattern(("chosen", "rejected"), 1)
    start = torch.from_numpy(np.random.default_rng(3).normal(0, 1, 6))
    batch = pattern.batch(response_scalars={"worse": torch.tensor([[0.0, 1.0]])})
    margins = []
    for c in (0.0, coef):
        logits = start.clone().requires_grad_(True)
        logps = logits.log_softmax(0)[[w, lost]]
        BestOfNNegative(c)(pattern.scored(logps[None]), None, batch).losses.sum().backward()
        after = (logits.detach() - eta * logits.grad).log_softmax(0)
        margins.append(float(after[w] - after[lost]))
    p = start.softmax(0)
    assert margins[1] - margins[0] == pytest.approx(eta * coef * float(p[w] + 1 - p[lost]), rel=1e-9)
    assert margins[1] > margins[0]


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: Reinforce(kl_coef=-1), "kl_coef"),
        (lambda: PPO(clip=0), "clip"),
        (lambda: PPO(level="word"), "level"),
        (lambda: RewardWeighted(0.0), "temperature"),
        (lambda: RewardWeighted(1.0, max_weight=-1), "max_weight"),
        (lambda: BestOfNNegative(-1), "coef"),
        (lambda: BestOfNNegative(1, "most"), "push"),
        (lambda: BestOfNNegative(1, guard=1.0), "guard"),
    ],
)
def test_values_out_of_range_are_refused_by_name(make, key):
    with pytest.raises(UserError, match=key):
        make()


def test_needs_name_what_is_read():
    assert Reinforce().needs.reference == () and Reinforce(0.1).needs.reference == ("sample",)
    assert PPO().needs.tokens and not PPO(level="sequence").needs.tokens
    assert "old_logps" in PPO(level="sequence").needs.scalars
    assert RewardWeighted(1.0).needs.scalars == ("reward",)
    assert all(isinstance(x, Loss) for x in (Reinforce(), PPO(), RewardWeighted(1.0), BestOfNNegative(1.0)))
