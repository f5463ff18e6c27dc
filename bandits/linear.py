"""The two-group linear bandit of Ramesh et al. 2024 (arXiv 2405.20304, App. D.1), all replicates at once.

States x ~ U[0, 1]^d, actions a = 0..7 with size s = 1 + a / 8, features of dimension F = 2 d, rewards linear in them with a
different parameter per group. R replicates, N pairs, G = 2 groups, A actions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import utils
from utils import UserError

NUM_GROUPS = 2
FeatureMap = Literal["same", "swapped", "flipped"]


@dataclass(frozen=True)
class Scenario:
    """How much data each group gives, and how hard its pairs are.

    shares   of the training pairs, per group, summing to one
    uneven   true: group 0 compares neighbouring actions (hard), group 1 actions four apart (easy); false: both compare
             two distinct uniform actions
    """

    name: str
    shares: tuple[float, ...]
    uneven: bool

    def __post_init__(self) -> None:
        if len(self.shares) != NUM_GROUPS or abs(sum(self.shares) - 1) > 1e-9 or min(self.shares) <= 0:
            raise UserError(
                f"scenario {self.name!r}: shares={self.shares}: {NUM_GROUPS} positive numbers that sum to 1"
            )

    def counts(self, num: int) -> tuple[int, ...]:
        """Pairs per group of ``num``."""
        first = round(self.shares[0] * num)
        return first, num - first


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("even_imbalanced", (0.2, 0.8), False),
        Scenario("uneven_balanced", (0.5, 0.5), True),
        Scenario("uneven_imbalanced", (0.2, 0.8), True),
    )
}


@dataclass(frozen=True)
class LinearWorld:
    """Feature map and true rewards.

    features    same: both groups use the base map; swapped: group 1 exchanges the two entries of each pair; flipped: group 1
                exchanges sine and cosine
    """

    features: FeatureMap = "swapped"
    state_dim: int = 2
    num_actions: int = 8

    def theta(self, group: int) -> np.ndarray:
        """(F,) true reward parameter: (1, 3, 1, 3, ..) and (3, 1, 3, 1, ..); (1, 2) and (2, 1) for one-dimensional states."""
        pair = (1.0, 2.0) if self.state_dim == 1 else (1.0, 3.0)
        return np.tile(pair if group == 0 else pair[::-1], self.state_dim)

    def phi(self, states: np.ndarray, group: int) -> np.ndarray:
        """(..., d) states -> (..., A, F) features of every action for one group."""
        size = 1 + np.arange(self.num_actions) / self.num_actions
        angle = np.pi * states[..., None, :]  # (..., 1, d)
        cos, sin = np.cos(angle), np.sin(angle)
        if self.features == "flipped" and group == 1:
            cos, sin = sin, cos
        entries = [size[:, None] * cos, sin / size[:, None]]  # each (..., A, d)
        if self.features == "swapped" and group == 1:
            entries.reverse()
        return np.stack(entries, -1).reshape(*states.shape[:-1], self.num_actions, 2 * self.state_dim)

    def rewards(self, states: np.ndarray, group: int) -> np.ndarray:
        """(..., d) -> (..., A)."""
        return self.phi(states, group) @ self.theta(group)


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs, sorted by group so that all replicates share the group index.

    features  (R, N, A, F) of every action at the pair's state and for its group
    chosen, rejected  (R, N) actions; group (N,); counts (G,)
    """

    features: Tensor
    chosen: Tensor
    rejected: Tensor
    group: Tensor
    counts: tuple[int, ...]

    def of(self, action: Tensor) -> Tensor:
        """(R, N, F) features of one action per pair."""
        index = action[..., None, None].expand(-1, -1, 1, self.features.shape[-1])
        return self.features.gather(2, index).squeeze(2)

    @property
    def difference(self) -> Tensor:
        """(R, N, F) features of the chosen minus those of the rejected action."""
        return self.of(self.chosen) - self.of(self.rejected)

    def group_means(self, values: Tensor) -> Tensor:
        """(R, N) -> (R, G)."""
        return torch.stack([part.mean(1) for part in values.split(self.counts, 1)], 1)


def _compared_actions(
    rng: np.random.Generator, num: int, actions: int, uneven: bool, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Two different actions per pair."""
    first = rng.integers(0, actions, num)
    if not uneven:
        return first, (first + rng.integers(1, actions, num)) % actions
    if group == 1:
        return first, (first + actions // 2) % actions
    step = rng.choice((-1, 1), num)
    step = np.where(first == 0, 1, np.where(first == actions - 1, -1, step))  # reflected at the ends
    return first, first + step


def _draw(
    world: LinearWorld,
    counts: Sequence[int],
    uneven: bool,
    certain: Sequence[float],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """features (N, A, F), chosen (N,), rejected (N,) of one replicate."""
    features, chosen, rejected = [], [], []
    for group, num in enumerate(counts):
        states = rng.random((num, world.state_dim))
        first, second = _compared_actions(rng, num, world.num_actions, uneven, group)
        rewards = world.rewards(states, group)
        rows = np.arange(num)
        gap = rewards[rows, first] - rewards[rows, second]
        noisy = rng.random(num) < 1 / (1 + np.exp(-gap))
        first_wins = np.where(rng.random(num) < certain[group], gap > 0, noisy)
        features.append(world.phi(states, group))
        chosen.append(np.where(first_wins, first, second))
        rejected.append(np.where(first_wins, second, first))
    return np.concatenate(features), np.concatenate(chosen), np.concatenate(rejected)


def draw_pairs(
    world: LinearWorld,
    counts: Sequence[int],
    uneven: bool,
    seeds: Sequence[int],
    split: str,
    certain: Sequence[float] = (1.0, 1.0),
) -> Pairs:
    """Pairs of every seed. ``certain[g]``: probability that a pair of group g is labelled by the larger reward; otherwise
    the label is Bradley-Terry, sigmoid of the reward gap."""
    drawn = [
        _draw(world, counts, uneven, certain, utils.stream(seed, "linear/pairs", split)) for seed in seeds
    ]
    features, chosen, rejected = (torch.from_numpy(np.stack(x)) for x in zip(*drawn, strict=True))
    group = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Pairs(features, chosen, rejected, group, tuple(counts))


@dataclass(frozen=True)
class HeldOutStates:
    """features (R, G, S, A, F) and rewards (R, G, S, A) at states that no pair was drawn from."""

    features: Tensor
    rewards: Tensor

    @classmethod
    def draw(cls, world: LinearWorld, num: int, seeds: Sequence[int]) -> HeldOutStates:
        """``num`` states per seed, the same for both groups."""
        states = [utils.stream(seed, "linear/test").random((num, world.state_dim)) for seed in seeds]
        groups = range(NUM_GROUPS)
        features = np.stack([np.stack([world.phi(x, g) for g in groups]) for x in states])
        rewards = np.stack([np.stack([world.rewards(x, g) for g in groups]) for x in states])
        return cls(torch.from_numpy(features), torch.from_numpy(rewards))

    def of_policy(self, theta: Tensor) -> dict[str, Tensor]:
        """(R, G) each, for the log-linear policy of (R, F) ``theta``.

        reward_error           best reward minus the greedy action's, mean over states (the paper's)
        reward_error_relative  the same divided by the mean best reward (the published code's)
        reward_error_sampled   best reward minus the expected reward of the softmax policy
        kl                     KL(policy || uniform reference), nats
        """
        logits = torch.einsum("rgsaf,rf->rgsa", self.features, theta)
        greedy = self.rewards.gather(-1, logits.argmax(-1, keepdim=True)).squeeze(-1).mean(-1)
        best = self.rewards.max(-1).values.mean(-1)
        logps = logits.log_softmax(-1)
        sampled = (logps.exp() * self.rewards).sum(-1).mean(-1)
        kl = (logps.exp() * logps).sum(-1).mean(-1) + np.log(self.rewards.shape[-1])
        return {
            "reward_error": best - greedy,
            "reward_error_relative": (best - greedy) / best,
            "reward_error_sampled": best - sampled,
            "kl": kl,
        }
