"""Exact answers with infinitely many samples, for a tabular policy over A actions.

Tables are (..., A) float64: ``mu`` the sampling law, ``reference`` the reference policy, ``reward`` the reward of each
action. Equal rewards are one level; a tie inside best-of-n falls on each action in proportion to mu.
"""

from __future__ import annotations

import numpy as np


def best_of_n(mu: np.ndarray, reward: np.ndarray, n: float) -> np.ndarray:
    """Law of the best of n samples: a level of cumulative mass C gets C^n - C_prev^n, shared in proportion to mu.

    k on-policy rounds to convergence are ``best_of_n(mu, reward, n**k)``.
    """
    levels, level_of = np.unique(reward, return_inverse=True)
    mass = np.bincount(level_of, weights=mu, minlength=len(levels))
    cumulative = np.minimum(np.cumsum(mass), 1.0)
    cumulative[-1] = 1.0
    best = np.diff(cumulative**n, prepend=0.0)
    share = np.divide(best, mass, out=np.zeros_like(best), where=mass > 0)
    return mu * share[level_of]


def preference_over(mu: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """P(a preferred to b) for b ~ mu, when the larger reward wins and a tie counts one half."""
    wins = (reward[:, None] > reward[None, :]) + 0.5 * (reward[:, None] == reward[None, :])
    return wins @ mu


def ipo_fixed_point(reference: np.ndarray, mu: np.ndarray, reward: np.ndarray, margin: float) -> np.ndarray:
    """Minimiser of E_{a,b ~ mu} (h_winner - h_loser - margin)^2: proportional to reference * exp(2 margin P(a > mu)).

    ``margin`` is the target margin, called beta in the bandit code of Tajwar et al.; IPO's own beta (tau) is
    1 / (2 margin). Ties carry half a label each way.
    """
    return normalise(np.log(reference) + 2 * margin * preference_over(mu, reward))


def rwr_fixed_point(mu: np.ndarray, reward: np.ndarray, temperature: float, rounds: int = 1) -> np.ndarray:
    """Reward-weighted regression, each of ``rounds`` on-policy rounds to convergence: mu * exp(rounds r / tau)."""
    return normalise(np.log(mu) + rounds * reward / temperature)


def normalise(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)
