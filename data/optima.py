"""Exact answers in an enumerable world (data/worlds.py): population optima, the group saddle point, rewards, regret, win rates.

A pairwise loss sees a policy through its scores s(x, y) = log pi(y|x) - log pi_ref(y|x), up to a constant per prompt, and any
scores are those of one distribution on the world's responses, pi ~ pi_ref exp(s). So the minimum over all policies is the
minimum over s, which is convex for DPO, IPO and hinge:

    L_g(s) = sum over prompt and ordered pair of pair_law * [q link(h) + (1 - q) link(-h)],   h = s(y1) - s(y2)

with q what the loss makes of the label probability. Known solutions, with which the tests compare:

    DPO   Bradley-Terry labels: s = r / beta (Rafailov et al. 2023, arXiv 2305.18290, eq. 4), whatever the pair law
    IPO   s(y) = (P(y beats the sampler) - 1/2) / beta (Azar et al. 2023, arXiv 2310.12036, theorem 1 and eq. 17)

The group-robust objective min_s max_g L_g(s) (Ramesh et al. 2024, arXiv 2405.20304, eq. 6) is min t with L_g(s) <= t; its
multipliers are the group weights at the saddle point.

G groups, X prompts, N responses. Scores have mean zero for every prompt. Smooth losses: Newton, for the saddle point on the
dual, whose gap is returned. Hinge: linear programs; their minimisers need not be unique.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix

from data.worlds import World, sigmoid
from utils import UserError

SMOOTH = ("dpo", "ipo")


@dataclass(frozen=True)
class Objective:
    """A pairwise loss as its paper writes it, in NumPy, apart from losses/ on purpose.

    loss             dpo: log(1 + exp(-beta h)) | ipo: (h - 1/(2 beta))^2 | hinge: max(0, 1 - beta h)
    label_smoothing  eps: q = (1 - eps) p + eps (1 - p)
    flip_rate        eps: q = (p - eps) / (1 - 2 eps), the flip-robust correction
    adj              (G,) or one number added to the group losses, in their units

    VRPO has the optimum of its base, and group-robust losses that of ``minimax_optimum``.
    """

    loss: str
    beta: float
    label_smoothing: float = 0.0
    flip_rate: float = 0.0
    adj: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        if self.loss not in (*SMOOTH, "hinge"):
            raise UserError(
                f"loss={self.loss}: its population problem is not convex in the scores, so no exact optimum is known; "
                "dpo, ipo and hinge have one"
            )
        if not self.beta > 0:
            raise UserError(f"beta={self.beta}: must be > 0")

    def label(self, p: np.ndarray) -> np.ndarray:
        """q from p."""
        p = self.label_smoothing + (1 - 2 * self.label_smoothing) * p
        return (p - self.flip_rate) / (1 - 2 * self.flip_rate)

    def link(self, h: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, first and second derivative at the margins h."""
        b = self.beta
        if self.loss == "dpo":
            p = sigmoid(-b * h)
            return np.logaddexp(0, -b * h), -b * p, b * b * p * (1 - p)
        if self.loss == "ipo":
            gap = h - 1 / (2 * b)
            return gap**2, 2 * gap, np.full_like(h, 2.0)
        gap = 1 - b * h
        return np.maximum(gap, 0), np.where(gap > 0, -b, 0.0), np.zeros_like(h)

    def adjustment(self, num_groups: int) -> np.ndarray:
        """(G,)."""
        return np.broadcast_to(np.asarray(self.adj, dtype=np.float64), (num_groups,))


@dataclass(frozen=True)
class Optimum:
    """scores (X, N); losses (G,), adj not included; weights (G,) of the groups' losses in the objective; value of the
    objective; gap: how far the value can be from the true one (0 where the solver stops at rounding)."""

    scores: np.ndarray
    losses: np.ndarray
    weights: np.ndarray
    value: float
    gap: float


# ---------------------------------------------------------------------------------------------- losses of scores


def group_losses(world: World, objective: Objective, scores: np.ndarray) -> np.ndarray:
    """(G,) population losses of (X, N) scores; of a policy: scores = log pi - log pi_ref."""
    return _derivatives(world, objective, scores)[0]


def _derivatives(
    world: World, objective: Objective, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per group: loss (G,), gradient (G, X, N) and Hessian (G, X, N, N); prompts do not interact."""
    h = scores[:, :, None] - scores[:, None, :]
    q, law = objective.label(world.preference), world.pair_law
    (up, up1, up2), (down, down1, down2) = objective.link(h), objective.link(-h)
    losses = (law * (q * up + (1 - q) * down)).sum((1, 2, 3))
    # d/dh of a pair's term is antisymmetric under swapping the pair, its second derivative symmetric
    gradient = 2 * (law * (q * up1 - (1 - q) * down1)).sum(-1)
    curvature = 2 * law * (q * up2 + (1 - q) * down2)
    n = scores.shape[1]
    hessian = curvature.sum(-1)[..., None] * np.eye(n) - curvature
    return losses, gradient, hessian


def _dense(blocks: np.ndarray) -> np.ndarray:
    """(X, N, N) -> (X N, X N) block-diagonal."""
    x, n, _ = blocks.shape
    out = np.zeros((x, n, x, n))
    out[np.arange(x), :, np.arange(x), :] = blocks
    return out.reshape(x * n, x * n)


def _newton(
    start: np.ndarray, evaluate: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Minimise a convex function by damped Newton steps; ``evaluate`` gives value (inf outside), gradient, Hessian.

    Raises UserError where the minimum is not attained.
    """
    z, polished = start, 0
    value, gradient, hessian = evaluate(z)
    for _ in range(200):
        step = np.linalg.solve(hessian, -gradient)
        decrement = -float(gradient @ step)
        floor = decrement < 1e-13 * max(
            1.0, abs(value)
        )  # where rounding hides progress whole steps are taken
        size = 1.0
        found = evaluate(z + step)
        while not (found[0] <= value - 0.1 * size * decrement or (floor and np.isfinite(found[0]))):
            size /= 2
            found = evaluate(z + size * step)
        z, (value, gradient, hessian) = z + size * step, found
        polished += floor
        if polished == 3:
            return z
        if np.abs(z).max() > 1e6:
            break
    raise UserError("there is no finite optimum: some labels are certain after the loss's label correction")


# ---------------------------------------------------------------------------------------------- optima


def optimum(world: World, objective: Objective, weights: np.ndarray | None = None) -> Optimum:
    """The minimiser over all policies of sum_g weights_g L_g; weights default to the groups' sizes (weighting=uniform).

    Raises UserError where no finite minimiser exists.
    """
    w = world.sizes if weights is None else np.asarray(weights, dtype=np.float64) / np.sum(weights)
    if objective.loss == "hinge":
        return _hinge(world, objective, w)
    scores = _minimise(world, objective, w, np.zeros(world.sampler.shape))
    losses = group_losses(world, objective, scores)
    return Optimum(scores, losses, w, float(w @ (losses + objective.adjustment(len(w)))), 0.0)


def _minimise(world: World, objective: Objective, w: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(X, N) the minimiser of a smooth objective."""
    pin = np.ones((start.shape[1], start.shape[1]))

    def evaluate(z: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        losses, gradient, hessian = _derivatives(world, objective, z.reshape(start.shape))
        # the constant of each prompt, which no margin sees, is pinned
        curved = _dense(np.tensordot(w, hessian, 1) + pin)
        return float(w @ losses), np.tensordot(w, gradient, 1).ravel(), curved

    z = _newton(start.ravel(), evaluate).reshape(start.shape)
    return z - z.mean(-1, keepdims=True)


def minimax_optimum(world: World, objective: Objective) -> Optimum:
    """The saddle point of min over policies, max over group weights a, of sum_g a_g (L_g + adj_g).

    Maximises the concave dual D(a) = min_s sum_g a_g (L_g(s) + adj_g), whose gradient is L + adj at the minimiser and whose
    Hessian is -J H^-1 J' (J: gradients of the L_g, H: Hessian of their weighted sum), with a vanishing barrier mu sum log a.
    """
    groups, (x, n) = len(world.groups), world.sampler.shape
    if objective.loss == "hinge":
        return _hinge(world, objective, None)
    adj = objective.adjustment(groups)
    if groups == 1:
        return optimum(world, objective)
    # orthonormal directions in which the weights' sum stays one
    basis = np.linalg.svd(np.ones((1, groups)))[2][1:].T
    scores = np.zeros((x, n))
    alpha = np.full(groups, 1 / groups)

    for mu in 10.0 ** -np.arange(1, 12):

        def evaluate(
            z: np.ndarray, mu: float = mu, middle: np.ndarray = alpha, start: np.ndarray = scores
        ) -> tuple[float, np.ndarray, np.ndarray]:
            a = middle + basis @ z
            if a.min() <= 0:
                return np.inf, z, np.eye(len(z))
            s = _minimise(world, objective, a, start)
            losses, gradient, hessian = _derivatives(world, objective, s)
            j = gradient.reshape(groups, -1)
            h = _dense(np.tensordot(a, hessian, 1) + np.ones((n, n)))
            curved = j @ np.linalg.solve(h, j.T) + np.diag(mu / a**2)
            slope = -(losses + adj) - mu / a
            value = -float(a @ (losses + adj)) - mu * float(np.log(a).sum())
            return value, basis.T @ slope, basis.T @ curved @ basis

        alpha = alpha + basis @ _newton(np.zeros(groups - 1), evaluate)
        scores = _minimise(world, objective, alpha, scores)
    losses = group_losses(world, objective, scores)
    value = float((losses + adj).max())
    return Optimum(scores, losses, alpha, value, value - float(alpha @ (losses + adj)))


def _hinge(world: World, objective: Objective, weights: np.ndarray | None) -> Optimum:
    """The linear program in (s, slacks, t): with weights min sum_g w_g L_g, without min t, L_g + adj_g <= t."""
    g, x, n = world.rewards.shape
    robust = weights is None
    q = objective.label(world.preference)
    if q.min() < 0 or q.max() > 1:
        raise UserError("hinge: the label correction leaves [0, 1], and the population problem is not convex")
    prompt, first, second = np.nonzero(world.pair_law)
    count = len(prompt)
    slack = x * n + np.arange(count)
    each = np.arange(count)
    # slack >= 1 - beta h and slack >= 0, one slack per ordered pair: it is link(h), and the swapped pair's link(-h)
    rows = np.concatenate([each, each, each])
    columns = np.concatenate([prompt * n + first, prompt * n + second, slack])
    values = np.concatenate(
        [np.full(count, -objective.beta), np.full(count, objective.beta), -np.ones(count)]
    )
    margins = coo_matrix((values, (rows, columns)), shape=(count, x * n + count + 1))
    per_group = np.zeros((g, x * n + count + 1))
    per_group[:, slack] = 2 * (world.pair_law * q)[:, prompt, first, second]
    adj = objective.adjustment(g)
    bounds = [(None, None)] * (x * n) + [(0, None)] * count + [(None, None)]
    if weights is not None:
        found = linprog(weights @ per_group, margins, -np.ones(count), bounds=bounds)
    else:
        per_group[:, -1] = -1.0  # L_g - t <= -adj_g
        cost = np.zeros(x * n + count + 1)
        cost[-1] = 1.0
        both = np.vstack([margins.toarray(), per_group])
        found = linprog(cost, both, np.concatenate([-np.ones(count), -adj]), bounds=bounds)
        weights = -found.ineqlin.marginals[count:]
    scores = found.x[: x * n].reshape(x, n)
    scores = scores - scores.mean(-1, keepdims=True)
    losses = group_losses(world, objective, scores)
    value = float((losses + adj).max() if robust else weights @ (losses + adj))
    return Optimum(scores, losses, weights, value, 0.0)


# ---------------------------------------------------------------------------------------------- policies


def policy(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(X, N) log-probs of pi ~ pi_ref exp(scores), from (X, N) reference log-probs on the world's responses."""
    z = reference + scores
    top = z.max(-1, keepdims=True)
    return z - top - np.log(np.exp(z - top).sum(-1, keepdims=True))


def kl_optimum(world: World, beta: float, reference: np.ndarray) -> np.ndarray:
    """(G, X, N) log-probs of each group's maximiser of E r_g - beta KL(pi || pi_ref): pi_ref exp(r_g / beta), normalised."""
    return np.stack([policy(reference, r / beta) for r in world.rewards])


def expected_reward(world: World, logps: np.ndarray) -> np.ndarray:
    """(G,) E r_g under (X, N) log-probs, mean over prompts."""
    return (np.exp(logps) * world.rewards).sum(-1).mean(-1)


def regularised_reward(world: World, logps: np.ndarray, beta: float, reference: np.ndarray) -> np.ndarray:
    """(G,) E r_g - beta KL(pi || pi_ref), mean over prompts."""
    kl = (np.exp(logps) * (logps - reference)).sum(-1).mean()
    return expected_reward(world, logps) - beta * kl


def regret(world: World, logps: np.ndarray, beta: float, reference: np.ndarray) -> np.ndarray:
    """(G,) how much each group's regularised reward is below its maximum, in units of reward; = beta KL(pi || kl_optimum).

    The maximum is beta log sum_y pi_ref exp(r_g / beta).
    """
    z = reference + world.rewards / beta
    top = z.max(-1, keepdims=True)
    best = beta * (top[..., 0] + np.log(np.exp(z - top).sum(-1))).mean(-1)
    return best - regularised_reward(world, logps, beta, reference)


def win_rate(world: World, logps: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(G,) P(a response of the policy is preferred to one of ``other``) by each group's labels; equal ones count 1/2."""
    return np.einsum("xi,gxij,xj->g", np.exp(logps), world.preference, np.exp(other)) / len(world.prompts)
