"""A preference problem small enough to enumerate: what variance-reduced estimation should do, exactly, and what it does.

X prompts, K arms, rewards r_theta(x, k) = <theta, phi_xk> that cannot represent the truth. Responses are drawn independently
from mu(. | x), labels from g*(x, i, j). Ye et al. 2025 (arXiv 2504.03784); the variance formulas are derived in docs/bandits.md.
R replicates, P = X K K ordered pairs, F features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bandits.adapter import Pattern
from losses.vrpo import VarianceReduced


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1 + np.tanh(x / 2))


@dataclass(frozen=True)
class Bed:
    """features (X, K, F); sampler mu (X, K); reward r* (X, K); logit (X, K, K) of the probability that the first arm wins."""

    features: np.ndarray
    sampler: np.ndarray
    reward: np.ndarray
    logit: np.ndarray

    @cached_property
    def preference(self) -> np.ndarray:
        """(X, K, K) g*, the probability that the first arm wins."""
        return sigmoid(self.logit)

    @cached_property
    def difference(self) -> np.ndarray:
        """(X, K, K, F) phi_i - phi_j."""
        return self.features[:, :, None] - self.features[:, None]

    @cached_property
    def pair_law(self) -> np.ndarray:
        """(X, K, K) probability of prompt and ordered pair; prompts are equally likely."""
        return pair_law(self.sampler) / len(self.sampler)

    def margin(self, theta: np.ndarray) -> np.ndarray:
        """(F,) -> (X, K, K)."""
        return self.difference @ theta


def pair_law(sampler: np.ndarray) -> np.ndarray:
    """(X, K) -> (X, K, K): two independent draws given the prompt."""
    return sampler[:, :, None] * sampler[:, None, :]


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def single_prompt() -> Bed:
    """Ten arms t_k in [-1, 1], features (t, t^2), a bumpy truth whose best arm is 6: the rewards cannot fit it."""
    t = np.linspace(-1, 1, 10)
    reward = 1.5 * np.exp(-20 * (t - 1 / 3) ** 2) + 0.5 * np.sin(9 * t) - 0.3 * t**2
    return _bed(np.stack((t, t**2), -1)[None], np.cos(3 * t)[None] / 2, reward[None], 20.0)


def five_prompts() -> Bed:
    """Five prompts that move the bump and tilt the sampler, features (t, t^2, c t): there is prompt variance as well."""
    t, centre = np.linspace(-1, 1, 10), np.linspace(-0.6, 0.6, 5)[:, None]
    reward = 1.5 * np.exp(-20 * (t - centre) ** 2) + 0.5 * np.sin(9 * t) - 0.3 * t**2
    features = np.stack(np.broadcast_arrays(t, t**2, centre * t), -1)
    return _bed(features, 0.5 * np.cos(3 * t) + centre * t, reward, 20.0)


def well_specified() -> Bed:
    """The arms of ``single_prompt`` with a truth that the features represent, theta = (1, -1.5)."""
    bed = single_prompt()
    return _bed(bed.features, np.log(bed.sampler), bed.features @ np.array([1.0, -1.5]), 1.0)


def _bed(features: np.ndarray, logits: np.ndarray, reward: np.ndarray, sharpness: float) -> Bed:
    gap = reward[:, :, None] - reward[:, None]
    return Bed(features, _softmax(logits), reward, sharpness * gap)


BEDS = {"single_prompt": single_prompt, "five_prompts": five_prompts, "well_specified": well_specified}


def guess(bed: Bed, kind: str, rng: np.random.Generator) -> np.ndarray:
    """(X, K, K) auxiliary preference model g, always g(i, j) = 1 - g(j, i).

    right: g*; noisy: sigmoid(0.3 logit g* + N(0, 1)), the noise drawn once; half: 1/2; reversed: 1 - g*.
    """
    if kind == "right":
        return bed.preference
    if kind == "half":
        return np.full_like(bed.preference, 0.5)
    if kind == "reversed":
        return 1 - bed.preference
    noise = np.triu(rng.standard_normal(bed.preference.shape), 1)
    noise = noise - noise.swapaxes(1, 2)
    return sigmoid(0.3 * bed.logit + noise)


def wrong_sampler(bed: Bed) -> np.ndarray:
    """(X, K) a law of auxiliary responses that is not mu: every arm alike."""
    return np.full_like(bed.sampler, 1 / bed.sampler.shape[1])


# ------------------------------------------------------------------------------------------------ exact answers


def population(
    bed: Bed, g: np.ndarray | None = None, aux: np.ndarray | None = None, lam: float = 1.0
) -> np.ndarray:
    """(F,) minimiser of the expected loss with g and auxiliary responses from ``aux`` (X, K); default: the plain loss.

    E_mu[l(m, g*)] + lam (E_aux - E_mu)[l(m, g)], logistic: convex in the margins when lam <= 1.
    """
    law, target = bed.pair_law, bed.preference
    weights = [(law, target)]
    if g is not None:
        weights += [(-lam * law, g), (lam * pair_law(bed.sampler if aux is None else aux) / len(law), g)]
    theta = np.zeros(bed.features.shape[-1])
    for _ in range(100):
        p = sigmoid(bed.margin(theta))
        gradient = sum(np.einsum("xij,xijf->f", w * (p - q), bed.difference) for w, q in weights)
        total = sum(w for w, _ in weights)
        hessian = np.einsum("xij,xijf,xijk->fk", total * p * (1 - p), bed.difference, bed.difference)
        step = np.linalg.solve(hessian, gradient)
        theta = theta - step / max(1.0, np.linalg.norm(step))
    return theta


@dataclass(frozen=True)
class Variance:
    """n times the mean squared error of theta, asymptotically exact, by source."""

    label: float
    response: float
    prompt: float

    @property
    def total(self) -> float:
        """All three."""
        return self.label + self.response + self.prompt


def exact_variance(
    bed: Bed, g: np.ndarray | None = None, num_pairs: float = np.inf, lam: float = 1.0
) -> Variance:
    """trace(H^-1 V H^-1) split by source; logistic loss, auxiliary pairs from mu.

    label     E g*(1 - g*) d d'
    response  E Var(s_{g*} - lam s_g | x) + lam^2 E Var(s_g | x) / M,     s_q = (sigmoid(m) - q) d
    prompt    Var E(s_{g*} | x)
    ``g`` None is the plain loss (lam = 0).
    """
    theta = population(bed)
    p, d, law = sigmoid(bed.margin(theta)), bed.difference, bed.pair_law
    outer = lambda w: np.einsum("xij,xijf,xijk->fk", w, d, d)  # noqa: E731
    inverse = np.linalg.inv(outer(law * p * (1 - p)))

    def cost(v: np.ndarray) -> float:
        return float(np.trace(inverse @ v @ inverse))

    def moments(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(F, F) mean over prompts of the covariance given the prompt, and covariance of the prompts' means."""
        given = law * len(law)  # law of the pair given the prompt
        mean = np.einsum("xij,xij,xijf->xf", given, score, d)
        second = np.einsum("xij,xij,xijf,xijk->xfk", given, score**2, d, d)
        between = np.einsum("xf,xk->fk", mean, mean) / len(mean)
        average = mean.mean(0)
        return second.mean(0) - between, between - np.outer(average, average)

    truth = p - bed.preference
    within, between = moments(truth)
    if g is not None:
        within = moments(truth - lam * (p - g))[0] + lam**2 * moments(p - g)[0] / num_pairs
    label = outer(law * bed.preference * (1 - bed.preference))
    return Variance(cost(label), cost(within), cost(between))


def excess_risk(bed: Bed, theta: np.ndarray) -> np.ndarray:
    """(R, F) -> (R,) expected logistic loss above the minimum of the class."""

    def risk(parameters: np.ndarray) -> np.ndarray:
        m = np.einsum("xijf,...f->...xij", bed.difference, parameters)
        loss = np.logaddexp(0, m) - bed.preference * m
        return (bed.pair_law * loss).sum((-1, -2, -3))

    return risk(theta) - risk(population(bed))


def margin_spread(bed: Bed, theta: np.ndarray) -> np.ndarray:
    """(R, F) -> (R,) squared distance of the learned margins from their mean over the replicates, averaged over the law of
    labelled pairs: the variance of the margins, one replicate's part each."""
    centred = theta - theta.mean(0)
    margins = np.einsum("xijf,rf->rxij", bed.difference, centred)
    return (bed.pair_law * margins**2).sum((1, 2, 3))


def policy_values(bed: Bed, theta: np.ndarray, beta: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """(R, F) -> (R,) greedy regret and (R,) true reward of mu exp(r_theta / beta), means over prompts."""
    scores = np.einsum("xkf,rf->rxk", bed.features, theta)
    prompts = np.arange(len(bed.reward))
    greedy = bed.reward[prompts, scores.argmax(-1)]  # (R, X)
    regret = (bed.reward.max(-1) - greedy).mean(-1)
    value = (_softmax(np.log(bed.sampler) + scores / beta) * bed.reward).sum(-1).mean(-1)
    return regret, value


# ------------------------------------------------------------------------------------------------ simulation


@dataclass(frozen=True)
class Counts:
    """What R replicates saw, divided by n: labelled[r, x, i, j] of "i chosen, j rejected" and auxiliary[r, x, i, j] pairs per
    labelled pair and divided by M; both sum to one."""

    labelled: np.ndarray
    auxiliary: np.ndarray


def draw(
    bed: Bed, num: int, replicates: int, num_pairs: int | None, aux: np.ndarray, rng: np.random.Generator
) -> Counts:
    """``num`` labelled pairs per replicate with ``num_pairs`` auxiliary pairs each; None: their exact expectation."""
    wins = bed.pair_law * bed.preference
    losses = bed.pair_law * (1 - bed.preference)
    cells = np.stack((wins, losses)).reshape(-1)
    seen = rng.multinomial(num, cells / cells.sum(), size=replicates).reshape(replicates, 2, *wins.shape)
    labelled = seen[:, 0] + seen[:, 1].swapaxes(-1, -2)
    per_prompt = labelled.sum((-1, -2))  # (R, X)
    law = pair_law(aux).reshape(len(aux), -1)
    if num_pairs is None:
        auxiliary = per_prompt[..., None] * law
    else:
        auxiliary = rng.multinomial(per_prompt * num_pairs, law / law.sum(-1, keepdims=True)) / num_pairs
    return Counts(labelled / num, auxiliary.reshape(labelled.shape) / num)


def _weighted_examples(bed: Bed, counts: Counts, g: np.ndarray) -> tuple[Tensor, ...]:
    """The n labelled and n M auxiliary pairs as 2 P weighted examples: an equal sum, with a constant added.

    A pair (i, j) is an example with an auxiliary pair of one arm with itself, which adds lam log 2; an auxiliary pair is
    an example whose labelled pair is one arm with itself, which adds (1 - lam) log 2. Returns arms (2 P, 4) as indices
    into X K, preferences of the labelled and of the auxiliary pair (2 P,), and weights (R, 2 P).
    """
    x, k = bed.sampler.shape
    prompt, i, j = (a.ravel() for a in np.indices((x, k, k)))
    first, second, nothing = prompt * k + i, prompt * k + j, prompt * k
    labelled = np.stack((first, second, nothing, nothing), -1)
    auxiliary = np.stack((nothing, nothing, first, second), -1)
    flat, half = g.ravel(), np.full(g.size, 0.5)
    r = len(counts.labelled)
    weights = np.concatenate((counts.labelled.reshape(r, -1), counts.auxiliary.reshape(r, -1)), 1)
    arrays = (
        np.concatenate((labelled, auxiliary)),
        np.concatenate((flat, half)),
        np.concatenate((half, flat)),
        weights,
    )
    return tuple(torch.from_numpy(a) for a in arrays)


class Objective:
    """(R, F) theta -> (R,) loss of every replicate, through ``losses.vrpo.VarianceReduced``.

    Scores are the rewards themselves, with beta = 1 and no reference: log pi_ref and log Z of pi = mu exp(r / beta) / Z cancel
    in every margin.
    """

    def __init__(self, bed: Bed, counts: Counts, g: np.ndarray, lam: float, base: str = "dpo") -> None:
        self.features = torch.from_numpy(bed.features).reshape(-1, bed.features.shape[-1])  # (X K, F)
        self.arms, g_data, g_aux, self.weights = _weighted_examples(bed, counts, g)
        self.loss = VarianceReduced(beta=1.0, reference_free=True, base=base, lam=lam)
        r, p = self.weights.shape
        self.pattern = Pattern(("chosen", "rejected", "aux_1", "aux_2"), r * p)
        preference = torch.full((r, p, 4), torch.nan, dtype=torch.float64)
        preference[..., 2] = g_aux
        self.batch = self.pattern.batch(
            scalars={"chosen_preference": g_data.repeat(r)}, response_scalars={"aux_preference": preference}
        )

    def __call__(self, theta: Tensor) -> Tensor:
        scores = theta @ self.features.T  # (R, X K)
        logps = scores[:, self.arms].reshape(-1, 4)
        losses = self.loss(self.pattern.scored(logps), None, self.batch).losses
        return (losses.view(self.weights.shape) * self.weights).sum(1)


def gradient(objective: Objective, theta: Tensor) -> Tensor:
    """(R, F)."""
    at = theta.detach().requires_grad_(True)
    return torch.autograd.grad(objective(at).sum(), at)[0]


def newton(
    objective: Objective, num_features: int, iterations: int = 40, limit: float = 30.0
) -> tuple[Tensor, Tensor]:
    """(R, F) minimisers and (R,) whether each converged; steps are at most 1 long, |theta| at most ``limit``.

    A replicate without a finite minimiser ends at the limit and counts as not converged.
    """
    theta = torch.zeros(objective.weights.shape[0], num_features, dtype=torch.float64)
    for _ in range(iterations):
        at = theta.requires_grad_(True)
        (g,) = torch.autograd.grad(objective(at).sum(), at, create_graph=True)
        rows = [torch.autograd.grad(g[:, f].sum(), at, retain_graph=True)[0] for f in range(num_features)]
        with torch.no_grad():
            hessian = torch.stack(rows, 1) + 1e-9 * torch.eye(num_features, dtype=torch.float64)
            step = torch.linalg.solve(hessian, g)
            step = step / step.norm(dim=1, keepdim=True).clamp(min=1.0)
            theta = theta - step
            theta = theta * (limit / theta.norm(dim=1, keepdim=True)).clamp(max=1.0)
        if step.abs().max() < 1e-10:
            break
    return theta.detach(), step.norm(dim=1) < 1e-6


def descend(objective: Objective, num_features: int, steps: int, lr: float) -> Tensor:
    """(R, F) where gradient descent from theta = 0, the reference policy, ends: for losses that are not convex."""
    theta = torch.zeros(objective.weights.shape[0], num_features, dtype=torch.float64)
    for _ in range(steps):
        theta = theta - lr * gradient(objective, theta)
    return theta
