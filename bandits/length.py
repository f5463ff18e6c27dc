"""Length tasks of Tajwar et al. 2024 (arXiv 2404.14367) with a small transformer: responses end, and only their length is rewarded.

T = 12 tokens at most from 12, token 0 ends the response; its length counts the tokens before the end. The reference imitates lengths
around 6 (a discretised normal of standard deviation 1.5). Rewards, all in [0, 1]:

    10  min length   1 - length / T: the best response is empty, far from the reference; data from the reference
    11  mode length  1 - |length - 6| / T: the best length is the reference's commonest
    12  skew         the reward of 10, but the first batch, hence all offline data, is cut to 1 + Exp(mean 1) tokens: short responses that
                     the reference hardly ever gives

The paper labels its pairs in the same three ways; there the model is a language model with 200-token responses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import norm
from torch import Tensor

from bandits import contextual
from bandits.policies import Params, Transformer, stack
from bandits.worlds import SequenceBandit, WarmStart, generators

END, MODE, SPREAD, SKEW = 0, 6, 1.5, 1.0


def small_transformer(dropout: float = 0.0) -> Transformer:
    """Two layers of width 32."""
    return Transformer(vocabulary=12, num_tokens=12, layers=2, heads=2, width=32, dropout=dropout)


def length_law(num_tokens: int) -> np.ndarray:
    """(T + 1,) probabilities of the lengths 0..T that the reference imitates."""
    edges = np.arange(num_tokens + 2) - 0.5
    mass = np.diff(norm.cdf(edges, MODE, SPREAD))
    return mass / mass.sum()


def token_law(num_tokens: int, vocabulary: int) -> np.ndarray:
    """(T, V) law of each token while the response lasts: the end by the lengths' hazard, all others alike."""
    law = length_law(num_tokens)
    hazard = law[:-1] / law[::-1].cumsum()[::-1][:-1]  # P(length t | length >= t)
    rest = np.repeat((1 - hazard)[:, None] / (vocabulary - 1), vocabulary - 1, axis=1)
    return np.concatenate((hazard[:, None], rest), axis=1)


def lengths(actions: Tensor) -> Tensor:
    """(..., T) tokens -> (...) number of tokens before the first END, T without one."""
    return (actions == END).cumsum(-1).eq(0).sum(-1)


class LengthBandit(SequenceBandit):
    """The three tasks; tokens after the end are neither scored nor rewarded."""

    def __init__(
        self,
        reward: int,
        seeds: Sequence[int],
        network: Transformer | None = None,
        warm: WarmStart | None = None,
        num_eval: int = 100,
    ) -> None:
        super().__init__(reward, seeds, network or small_transformer(), warm, num_eval)

    def define(self, reward: int) -> None:
        contextual.check_reward(reward, contextual.LENGTH)
        self.task = reward
        self.data = torch.from_numpy(token_law(self.network.num_tokens, self.network.vocabulary))
        self._cut = generators(self.seeds, "bandit/cut")

    def live(self, actions: Tensor) -> Tensor:
        """1 up to and including the end."""
        ended = (actions == END).cumsum(-1)
        return (ended - (actions == END).long() == 0).float()

    def first_actions(self, params: Params, prompts: Tensor, num: int) -> Tensor:
        """From the reference; in the skewed task cut short."""
        actions = self.sample(params, prompts, num)
        if self.task != 12:
            return actions
        shape = tuple(actions.shape[1:3])
        limit = stack([1 + rng.exponential(SKEW, shape) for rng in self._cut], torch.float64).long()
        position = torch.arange(actions.shape[-1])
        return torch.where(position >= limit.unsqueeze(-1), END, actions)

    def rewards(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """(..., T) tokens -> (...) float64."""
        length = lengths(actions).double()
        target = MODE if self.task == 11 else 0
        return 1 - (length - target).abs() / self.network.num_tokens

    def expected_rewards(self, prompts: Tensor, actions: Tensor, p: Tensor) -> dict[str, Tensor]:
        """Of the sampled responses: reward, and length in tokens."""
        return {"reward": self.rewards(prompts, actions), "length": lengths(actions).double()}
