"""The enumerable VRPO bed: published exact values, unbiasedness and variance through the real loss, simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bandits import tabular
from bandits.adapter import Pattern
from losses.vrpo import VarianceReduced

BED = tabular.single_prompt()
RIGHT = BED.preference
LOSS = VarianceReduced(beta=1.0, reference_free=True)


def test_the_plain_loss_has_the_published_minimiser_and_variance():
    assert tabular.population(BED) == pytest.approx([1.4464, -2.1060], abs=1e-4)
    exact = tabular.exact_variance(BED)
    assert (exact.total, exact.label, exact.response) == pytest.approx((52.08, 12.65, 39.43), abs=5e-3)
    assert exact.prompt == pytest.approx(0, abs=1e-9)
    assert BED.reward.argmax() == 6 and tabular.policy_values(BED, tabular.population(BED)[None])[0] == 0


@pytest.mark.parametrize(
    ("kind", "pairs", "lam", "expected"),
    [
        ("right", 1, 1, 52.08),
        ("right", 4, 1, 22.51),
        ("right", 16, 1, 15.12),
        ("right", np.inf, 1, 12.65),
        ("half", 1, 1, 200.7),
        ("half", np.inf, 1, 129.7),
        ("reversed", 1, 1, 817.3),
        ("reversed", np.inf, 1, 480.7),
        ("right", 1, 0.5, 32.37),
        ("right", 1, 0.8, 39.46),
        ("right", 4, 0.5, 24.97),
        ("right", 4, 0.8, 20.54),
        ("right", 1, 0, 52.08),
    ],
)
def test_exact_variance_of_every_estimator(kind, pairs, lam, expected):
    g = tabular.guess(BED, kind, np.random.default_rng(0))
    assert tabular.exact_variance(BED, g, pairs, lam).total == pytest.approx(expected, rel=4e-4)


def test_a_correct_class_has_no_response_variance_and_several_prompts_add_theirs():
    assert tabular.exact_variance(tabular.well_specified()).response == pytest.approx(0, abs=1e-20)
    bed = tabular.five_prompts()
    plain = tabular.exact_variance(bed)
    assert plain.prompt > 1 and plain.response > 1
    right = tabular.exact_variance(bed, bed.preference, np.inf)
    assert (right.label, right.prompt) == pytest.approx((plain.label, plain.prompt))
    assert right.response == pytest.approx(0, abs=1e-9)


def _enumerated_gradients(g: np.ndarray, lam: float, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability and gradient of every outcome (pair, label, one auxiliary pair), through the loss class.

    Four arms, so that all 4^4 * 2 outcomes are written out.
    """
    arms = [0, 3, 6, 9]
    phi = torch.from_numpy(BED.features[0][arms])
    law = BED.sampler[0][arms] / BED.sampler[0][arms].sum()
    outcomes = list(itertools.product(range(4), range(4), range(4), range(4), (0, 1)))
    pick, probs, g_data, g_aux = [], [], [], []
    for i, j, k, m, z in outcomes:
        truth = RIGHT[0, arms[i], arms[j]]
        probs.append(law[i] * law[j] * law[k] * law[m] * (truth if z else 1 - truth))
        w, lost = (i, j) if z else (j, i)
        pick.append((w, lost, k, m))
        g_data.append(g[0, arms[w], arms[lost]])
        g_aux.append(g[0, arms[k], arms[m]])
    n = len(outcomes)
    pattern = Pattern(("chosen", "rejected", "aux_1", "aux_2"), n)
    preference = torch.full((n, 4), torch.nan, dtype=torch.float64)
    preference[:, 2] = torch.tensor(g_aux)
    batch = pattern.batch(
        scalars={"chosen_preference": torch.tensor(g_data)}, response_scalars={"aux_preference": preference}
    )
    at = (
        torch.from_numpy(theta).expand(n, -1).clone().requires_grad_(True)
    )  # a copy per outcome: per-example gradients
    scores = torch.einsum("npf,nf->np", phi[torch.tensor(pick)], at)
    loss = VarianceReduced(beta=1.0, reference_free=True, lam=lam)
    loss(pattern.scored(scores), None, batch).losses.sum().backward()
    return np.array(probs), at.grad.numpy()


def test_the_gradient_is_unbiased_for_every_auxiliary_model_and_weight():
    theta = np.array([0.7, -0.4])
    found = []
    for kind, lam in itertools.product(("right", "half", "reversed", "noisy"), (0.0, 0.5, 1.0)):
        probs, gradients = _enumerated_gradients(
            tabular.guess(BED, kind, np.random.default_rng(1)), lam, theta
        )
        assert probs.sum() == pytest.approx(1)
        found.append(probs @ gradients)
    assert np.array(found) == pytest.approx(np.tile(found[0], (len(found), 1)), abs=1e-12)


def test_the_per_example_gradient_variance_equals_plain_with_a_right_g_and_rises_with_a_wrong_one():
    theta = np.array([0.7, -0.4])

    def spread(kind: str, lam: float) -> float:
        probs, gradients = _enumerated_gradients(
            tabular.guess(BED, kind, np.random.default_rng(1)), lam, theta
        )
        mean = probs @ gradients
        return float(probs @ ((gradients - mean) ** 2).sum(1))

    plain = spread("right", 0.0)
    assert spread("right", 1.0) == pytest.approx(plain, rel=1e-9)
    assert spread("right", 0.5) < 0.99 * plain
    assert spread("half", 1.0) > 1.1 * plain and spread("reversed", 1.0) > spread("half", 1.0)


def test_counted_examples_give_the_loss_of_the_listed_ones():
    rng = np.random.default_rng(0)
    n, m, g = 12, 3, tabular.guess(BED, "noisy", rng)
    winner, loser = rng.integers(0, 10, (2, n))
    first, second = rng.integers(0, 10, (2, n, m))
    labelled, auxiliary = np.zeros((1, 1, 10, 10)), np.zeros((1, 1, 10, 10))
    np.add.at(labelled[0, 0], (winner, loser), 1 / n)
    np.add.at(auxiliary[0, 0], (first.ravel(), second.ravel()), 1 / (n * m))
    objective = tabular.Objective(BED, tabular.Counts(labelled, auxiliary), g, 0.8)

    pattern = Pattern(("chosen", "rejected") + ("aux_1", "aux_2") * m, n)
    pairs = np.stack((first, second), -1).reshape(n, 2 * m)
    pick = torch.from_numpy(np.concatenate((np.stack((winner, loser), 1), pairs), 1))
    preference = torch.full((n, 2 + 2 * m), torch.nan, dtype=torch.float64)
    preference[:, 2::2] = torch.from_numpy(g[0, first, second])
    batch = pattern.batch(
        {"chosen_preference": torch.from_numpy(g[0, winner, loser])}, {"aux_preference": preference}
    )
    loss = VarianceReduced(beta=1.0, reference_free=True, lam=0.8)
    values = []
    for theta in ([0.0, 0.0], [0.5, -1.0], [2.0, 1.0]):
        scores = torch.from_numpy(BED.features[0] @ np.array(theta))
        listed = loss(pattern.scored(scores[pick]), None, batch).losses.mean()
        values.append(float(objective(torch.tensor([theta], dtype=torch.float64))[0] - listed))
    assert values == pytest.approx([np.log(2)] * 3, abs=1e-12)  # only the announced constants differ


def test_rewards_as_scores_give_the_margins_of_the_policy_they_define():
    theta, beta = np.array([0.8, -1.1]), 0.5
    scores = torch.from_numpy(BED.features[0] @ theta)
    base = torch.from_numpy(np.log(BED.sampler[0]))
    policy = (base + scores / beta).log_softmax(0)
    pattern, pick = Pattern(("chosen", "rejected"), 3), torch.tensor([[0, 5], [6, 2], [9, 9]])
    full = VarianceReduced(beta=beta)(
        pattern.scored(policy[pick]), pattern.scored(base[pick]), pattern.batch()
    )
    short = LOSS(pattern.scored(scores[pick]), None, pattern.batch())
    assert torch.allclose(full.losses, short.losses)


def fit(
    kind: str,
    pairs: int | None,
    num: int = 800,
    replicates: int = 300,
    lam: float = 1.0,
    bed: tabular.Bed = BED,
    aux=None,
):
    rng = np.random.default_rng(5)
    counts = tabular.draw(bed, num, replicates, pairs, bed.sampler if aux is None else aux, rng)
    g = tabular.guess(bed, kind, np.random.default_rng(1))
    theta, converged = tabular.newton(tabular.Objective(bed, counts, g, lam), bed.features.shape[-1])
    assert converged.all()
    return theta.numpy()


def n_mse(theta: np.ndarray, num: int = 800) -> float:
    return num * float(np.square(theta - tabular.population(BED)).sum(1).mean())


@pytest.fixture(scope="module")
def plain() -> np.ndarray:
    return fit("right", 1, lam=0.0)


def test_simulated_variance_ratios_are_the_exact_ones(plain):
    """Bounds from the seed spread over ten seeds: 1.01 +- 0.06, 2.37 +- 0.18, 4.28 +- 0.35."""
    base = n_mse(plain)
    assert 0.85 < base / n_mse(fit("right", 1)) < 1.2
    assert base / n_mse(fit("right", 4)) > 1.9
    assert base / n_mse(fit("right", None)) > 3.3


def test_the_primary_model_as_its_own_auxiliary_changes_nothing(plain):
    """At the plain estimate, g = sigmoid(margin) makes the correction's gradient vanish."""
    counts = tabular.draw(BED, 800, 300, 1, BED.sampler, np.random.default_rng(5))
    theta = torch.from_numpy(plain)
    for r in range(3):
        own = tabular.sigmoid(BED.margin(plain[r]))
        one = tabular.Counts(counts.labelled[r : r + 1], counts.auxiliary[r : r + 1])
        assert tabular.gradient(tabular.Objective(BED, one, own, 1.0), theta[r : r + 1]).abs().max() < 1e-8


def test_either_right_nuisance_centres_the_estimate_and_two_wrong_ones_do_not():
    bed, truth = tabular.well_specified(), np.array([1.0, -1.5])
    uniform = tabular.wrong_sampler(bed)
    cases = {
        ("right", "right"): None,
        ("right", "wrong"): uniform,
        ("half", "right"): None,
        ("half", "wrong"): uniform,
    }
    for (kind, sampler), aux in cases.items():
        errors = fit(kind, 4, num=4000, replicates=100, bed=bed, aux=aux) - truth
        bias, se = errors.mean(0), errors.std(0, ddof=1) / 10
        limit = tabular.population(bed, tabular.guess(bed, kind, np.random.default_rng(1)), aux)
        assert (np.abs(bias - (limit - truth)) < 4 * se + 0.01).all()
        wrong = kind == "half" and sampler == "wrong"
        assert (np.abs(limit - truth).max() > 0.3) if wrong else (limit == pytest.approx(truth, abs=1e-8))


def test_a_right_model_does_not_mend_a_wrong_sampler_when_the_class_is_wrong():
    limit = tabular.population(BED, RIGHT, tabular.wrong_sampler(BED))
    assert np.abs(limit - tabular.population(BED)).max() > 0.1


def test_drawn_counts_are_a_law_and_follow_the_prompts():
    bed = tabular.five_prompts()
    counts = tabular.draw(bed, 50, 4, 3, bed.sampler, np.random.default_rng(0))
    assert counts.labelled.sum((1, 2, 3)) == pytest.approx(np.ones(4))
    assert counts.auxiliary.sum((2, 3)) == pytest.approx(counts.labelled.sum((2, 3)))
    enumerated = tabular.draw(bed, 50, 4, None, bed.sampler, np.random.default_rng(0))
    assert enumerated.auxiliary.sum((2, 3)) == pytest.approx(enumerated.labelled.sum((2, 3)))
