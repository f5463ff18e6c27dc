"""A preference problem small enough to enumerate: one prompt, K arms, linear rewards, a truth they cannot express.

Arms t_k = -1 + 2k/(K-1) with features (t, t^2); the truth r*(t) = 1.5 exp(-20 (t - 1/3)^2) + 0.5 sin 9t - 0.3 t^2 gives
g*(i, j) = sigmoid(20 (r*_i - r*_j)); responses are drawn from pi_ref proportional to exp(0.5 cos 3t). The margin of arms i, j is
h = theta . (phi_i - phi_j), so a policy with log-ratio theta . phi and beta = 1 is exactly this model. Everything here is NumPy
float64 and written from the estimating equations, without the losses.

n Cov(estimate) -> H^-1 (V1 + V_Delta + V_g / M + V3) H^-1, with one prompt V3 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


@dataclass(frozen=True)
class Bed:
    """phi (K, 2); law (K,) of responses; truth (K, K) with truth[i, j] = P(i beats j)."""

    phi: np.ndarray
    law: np.ndarray
    truth: np.ndarray
    theta_start: np.ndarray = field(default_factory=lambda: np.zeros(2))

    @property
    def pair_law(self) -> np.ndarray:
        """(K, K) probability of the ordered pair (i, j)."""
        return np.outer(self.law, self.law)

    @property
    def gaps(self) -> np.ndarray:
        """(K, K, 2) phi_i - phi_j."""
        return self.phi[:, None, :] - self.phi[None, :, :]


def bed(num_arms: int = 10) -> Bed:
    """The problem of the module's head."""
    t = -1 + 2 * np.arange(num_arms) / (num_arms - 1)
    reward = 1.5 * np.exp(-20 * (t - 1 / 3) ** 2) + 0.5 * np.sin(9 * t) - 0.3 * t**2
    law = np.exp(0.5 * np.cos(3 * t))
    return Bed(
        np.stack([t, t**2], axis=1), law / law.sum(), sigmoid(20 * (reward[:, None] - reward[None, :]))
    )


def well_specified(theta: tuple[float, float] = (1.0, -1.5), num_arms: int = 10) -> Bed:
    """The same arms and law with a truth that the linear rewards can express."""
    rough = bed(num_arms)
    return Bed(rough.phi, rough.law, sigmoid(rough.gaps @ np.array(theta)))


def newton(gradient, hessian, start: np.ndarray) -> np.ndarray:
    """Root of a (2,) gradient."""
    theta = start
    for _ in range(100):
        move = np.linalg.solve(hessian(theta), gradient(theta))
        theta = theta - move
        if np.abs(move).max() < 1e-12:
            return theta
    raise AssertionError("no convergence")


def target(problem: Bed) -> np.ndarray:
    """theta* of the plain logistic loss: E (sigmoid(h) - g*) (phi_i - phi_j) = 0."""
    p, gaps = problem.pair_law, problem.gaps

    def gradient(theta):
        return np.einsum("ij,ij,ijd->d", p, sigmoid(gaps @ theta) - problem.truth, gaps)

    return newton(gradient, lambda theta: curvature(problem, theta), problem.theta_start)


def curvature(problem: Bed, theta: np.ndarray) -> np.ndarray:
    """H = E sigmoid'(h) (phi_i - phi_j)(phi_i - phi_j)^T, (2, 2)."""
    s = sigmoid(problem.gaps @ theta)
    return np.einsum("ij,ij,ijd,ije->de", problem.pair_law, s * (1 - s), problem.gaps, problem.gaps)


def covariance(weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(2, 2) covariance of ``vectors`` (..., 2) under the probabilities ``weights`` (...)."""
    w, v = weights.reshape(-1), vectors.reshape(-1, vectors.shape[-1])
    centred = v - w @ v
    return np.einsum("n,nd,ne->de", w, centred, centred)


def gradient_covariance(
    problem: Bed, theta: np.ndarray, g: np.ndarray, lam: float, num_aux: float
) -> np.ndarray:
    """(2, 2) covariance of one example's gradient of the logistic VRPO loss at theta, by the decomposition above.

    With label noise V1 = E Var(s | pair), the correction enters through conditional means only:
    V1 + Var(sbar_{g*} - lam sbar_g) + lam^2 Var(sbar_g) / M, where sbar_q = (sigmoid(h) - q) (phi_i - phi_j).
    """
    p, gaps = problem.pair_law, problem.gaps
    label = np.einsum("ij,ij,ijd,ije->de", p, problem.truth * (1 - problem.truth), gaps, gaps)

    def mean_slope(q):
        return (sigmoid(gaps @ theta) - q)[..., None] * gaps

    rest = covariance(p, mean_slope(problem.truth) - lam * mean_slope(g))
    return label + rest + (0.0 if np.isinf(num_aux) else lam**2 / num_aux * covariance(p, mean_slope(g)))


def scaled_error(problem: Bed, g: np.ndarray, lam: float, num_aux: float) -> float:
    """n times the mean squared error of theta, to first order: trace of H^-1 Cov H^-1 at theta*."""
    theta = target(problem)
    inverse = np.linalg.inv(curvature(problem, theta))
    return float(np.trace(inverse @ gradient_covariance(problem, theta, g, lam, num_aux) @ inverse))
