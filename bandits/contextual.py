"""Rewards 1-9 and the data policy of the contextual bandits of Tajwar et al. 2024 (arXiv 2404.14367), in closed form.

The data policy is a Cauchy(-0.7, 0.4) variable squashed by tanh: on 100 equal bins of [-1, 1] for discrete actions,
as a product of densities for continuous ones. The published code builds the bins from 10,000 unseeded draws; the exact
bin probabilities are used here.
"""

from __future__ import annotations

import numpy as np

from utils import UserError

NUM_ACTIONS = 100
LOCATION, SCALE = -0.7, 0.4
# reward id -> (centre, width) of exp(-((a - centre) / width)^2)
PEAKS = {
    1: (0.7, 0.75),
    2: (0.7, 0.25),
    3: (-0.7, 0.25),
    4: (70.0, 10.0),
    5: (20.0, 10.0),
    6: (70.0, 10.0),
    7: (20.0, 10.0),
    8: (70.0, 20.0),
    9: (70.0, 30.0),
}
CONTINUOUS, DISCRETE, SEQUENCE = (1, 2, 3), (4, 5, 8, 9), (6, 7)
LENGTH = (10, 11, 12)  # see bandits/length.py; the numbers are ours


def check_reward(reward: int, allowed: tuple[int, ...], key: str = "rewards") -> None:
    """Raises UserError when ``reward`` does not belong to this bandit."""
    if reward not in allowed:
        raise UserError(f"{key}: {reward}: this bandit has the rewards {', '.join(map(str, allowed))}")


def reward_table(reward: int) -> np.ndarray:
    """(100,) float64 reward of each action (ids 4, 5, 8, 9) or of each token (ids 6, 7)."""
    check_reward(reward, DISCRETE + SEQUENCE)
    centre, width = PEAKS[reward]
    return np.exp(-(((np.arange(NUM_ACTIONS) - centre) / width) ** 2))


def continuous_reward(reward: int, actions: np.ndarray) -> np.ndarray:
    """(..., d) actions -> (...,) reward of ids 1-3; the distance is that of the whole action vector."""
    check_reward(reward, CONTINUOUS)
    centre, width = PEAKS[reward]
    return np.exp(-(np.square(actions - centre).sum(-1) / width**2))


def _cauchy_cdf(x: np.ndarray) -> np.ndarray:
    return 0.5 + np.arctan((x - LOCATION) / SCALE) / np.pi


def data_policy() -> np.ndarray:
    """(100,) float64 probabilities of the squashed Cauchy's bins: p_k = F(atanh(edge_k+1)) - F(atanh(edge_k))."""
    edges = np.linspace(-1.0, 1.0, NUM_ACTIONS + 1)
    cdf = np.concatenate(([0.0], _cauchy_cdf(np.arctanh(edges[1:-1])), [1.0]))  # the end bins hold the tails
    return np.diff(cdf)


def squashed_cauchy_sample(
    rng: np.random.Generator, shape: tuple[int, ...], limit: float = 0.99
) -> np.ndarray:
    """tanh of Cauchy draws, clamped to +-limit so that the density stays finite."""
    return np.clip(np.tanh(LOCATION + SCALE * rng.standard_cauchy(shape)), -limit, limit)
