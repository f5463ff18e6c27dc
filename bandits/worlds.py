"""The contextual bandit (MLP policy) and the sequence bandit (transformer policy), all replicates at once.

A world owns the prompts' law, the rewards, the reference policy and the exact or conditional-expectation metrics. R
replicates (one per seed), S prompts, N responses per prompt, T tokens per response (1 in the contextual bandit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

import utils
from bandits import contextual
from bandits.policies import (
    MLP,
    Generators,
    Params,
    Transformer,
    frozen,
    sample_categorical,
    stack,
    trainable,
)


class World(Protocol):
    """What the training loop asks of a bandit."""

    def draw_prompts(self, num: int) -> Tensor: ...
    def warm_start(self, prompts: Tensor) -> Params: ...
    def first_actions(self, params: Params, prompts: Tensor, num: int) -> Tensor: ...
    def sample(self, params: Params, prompts: Tensor, num: int) -> Tensor: ...
    def token_logps(
        self, params: Params, prompts: Tensor, actions: Tensor, training: bool = False
    ) -> Tensor: ...
    def reference_token_logps(self, prompts: Tensor, actions: Tensor) -> Tensor: ...
    def rewards(self, prompts: Tensor, actions: Tensor) -> Tensor: ...
    def evaluate(self, params: Params) -> dict[str, Tensor]: ...


def generators(seeds: Sequence[int], name: str, *keys: int | str) -> Generators:
    """One generator per replicate: the stream (seed, name, keys)."""
    return [utils.stream(seed, name, *keys) for seed in seeds]


@dataclass(frozen=True)
class WarmStart:
    """The imitation phase before every run: Adam steps on KL(policy || data policy), the reverse KL.

    prompts: of a step of the transformer bandits (the published code has one); the others use all they have.
    """

    steps: int = 100
    lr: float = 0.01
    prompts: int = 1


class ContextualBandit:
    """One of 100 actions per context in [0, 1]^100; the reward ignores the context.

    The reference is the data policy itself, exactly. Metrics are exact sums over actions, averaged over
    ``num_eval`` contexts.
    """

    def __init__(
        self, reward: int, seeds: Sequence[int], warm: WarmStart | None = None, num_eval: int = 100
    ) -> None:
        contextual.check_reward(reward, contextual.DISCRETE)
        self.network = MLP()
        self.warm = warm or WarmStart()
        self.seeds = tuple(seeds)
        self.table = torch.from_numpy(contextual.reward_table(reward))
        self.data = torch.from_numpy(contextual.data_policy())
        self._prompts = generators(seeds, "bandit/prompts")
        self._actions = generators(seeds, "bandit/actions")
        self.eval_prompts = self._contexts(generators(seeds, "bandit/eval_prompts"), num_eval)

    def _contexts(self, rngs: Generators, num: int) -> Tensor:
        return stack([rng.random((num, self.network.inputs)) for rng in rngs], torch.float32)

    def draw_prompts(self, num: int) -> Tensor:
        """(R, S, 100) contexts."""
        return self._contexts(self._prompts, num)

    def action_logps(self, params: Params, prompts: Tensor) -> Tensor:
        """(R, S, A)."""
        return self.network(params, prompts).log_softmax(-1)

    def warm_start(self, prompts: Tensor) -> Params:
        """Initial parameters after full-batch imitation of the data policy on ``prompts``."""
        params = trainable(self.network.init(generators(self.seeds, "bandit/init")))
        optimizer = torch.optim.Adam(list(params.values()), lr=self.warm.lr, fused=True)
        target = self.data.log().float()
        for _ in range(self.warm.steps):
            logps = self.action_logps(params, prompts)
            divergence = (logps.exp() * (logps - target)).sum(-1).mean(-1)  # (R,)
            optimizer.zero_grad()
            divergence.sum().backward()
            optimizer.step()
        return frozen(params)

    def first_actions(self, params: Params, prompts: Tensor, num: int) -> Tensor:
        """The first batch comes from the data policy."""
        probs = self.data.expand(prompts.shape[0], prompts.shape[1], -1)
        return sample_categorical(probs, num, self._actions).unsqueeze(-1)

    @torch.no_grad()
    def sample(self, params: Params, prompts: Tensor, num: int) -> Tensor:
        """(R, S, N, 1) actions from the policy."""
        return sample_categorical(self.action_logps(params, prompts).exp(), num, self._actions).unsqueeze(-1)

    def token_logps(self, params: Params, prompts: Tensor, actions: Tensor, training: bool = False) -> Tensor:
        """(R, S, N, 1) log-probs."""
        return self.action_logps(params, prompts).gather(-1, actions.squeeze(-1)).unsqueeze(-1)

    def reference_token_logps(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, S, N, 1) log-probs under the data policy."""
        return self.data.log()[actions].float()

    def rewards(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, S, N) float64."""
        return self.table[actions.squeeze(-1)]

    @torch.no_grad()
    def evaluate(self, params: Params) -> dict[str, Tensor]:
        """(R,) each: exact expected reward, entropy and both KL divergences from the reference, in nats."""
        logps = self.action_logps(params, self.eval_prompts).double()
        p, log_data = logps.exp(), self.data.log()
        exact = {
            "reward": p @ self.table,
            "entropy": -(p * logps).sum(-1),
            "kl_policy_reference": (p * (logps - log_data)).sum(-1),
            "kl_reference_policy": (self.data * (log_data - logps)).sum(-1),
        }
        return {name: value.mean(-1) for name, value in exact.items()}


class SequenceBandit:
    """A prompt token from 100, nine response tokens, reward = mean over all ten tokens of a bump at 70 or 20.

    The reference is the policy after imitation, scored without dropout. Metrics are conditional expectations: prefixes
    are sampled, and what is summed over the next token is summed exactly. KL(reference || policy) uses prefixes drawn
    once from the reference.
    """

    def __init__(
        self,
        reward: int,
        seeds: Sequence[int],
        network: Transformer | None = None,
        warm: WarmStart | None = None,
        num_eval: int = 100,
    ) -> None:
        self.network = network or Transformer()
        self.warm = warm or WarmStart()
        self.seeds = tuple(seeds)
        self.define(reward)
        self._prompts = generators(seeds, "bandit/prompts")
        self._actions = generators(seeds, "bandit/actions")
        self._dropout = generators(seeds, "bandit/dropout")
        self.eval_prompts = self._tokens(generators(seeds, "bandit/eval_prompts"), num_eval)
        self.reference: Params = {}

    def define(self, reward: int) -> None:
        """Set the reward and ``data``, the law (V,) or (T, V) of each response token that imitation aims at."""
        contextual.check_reward(reward, contextual.SEQUENCE)
        self.table = torch.from_numpy(contextual.reward_table(reward))
        self.data = torch.from_numpy(contextual.data_policy())

    def live(self, actions: Tensor) -> Tensor:
        """(..., T) 1 for tokens that belong to the response and are scored; here all of them."""
        return torch.ones(())

    def _tokens(self, rngs: Generators, num: int) -> Tensor:
        return torch.from_numpy(np.stack([rng.integers(0, self.network.vocabulary, num) for rng in rngs]))

    def draw_prompts(self, num: int) -> Tensor:
        """(R, S) prompt tokens."""
        return self._tokens(self._prompts, num)

    def warm_start(self, prompts: Tensor) -> Params:
        """Imitation on prefixes of the model's own samples for random prompts; then the reference is fixed."""
        params = trainable(self.network.init(generators(self.seeds, "bandit/init")))
        optimizer = torch.optim.Adam(list(params.values()), lr=self.warm.lr, fused=True)
        target = self.data.log().float()
        rngs = generators(self.seeds, "bandit/warm")
        for _ in range(self.warm.steps):
            prompt = self._tokens(rngs, self.warm.prompts)
            actions = self.network.sample(params, prompt, 1, rngs).squeeze(2)
            logps = self.network.next_token_logps(params, prompt, actions)  # (R, B, T, V)
            divergence = ((logps.exp() * (logps - target)).sum(-1) * self.live(actions)).sum((1, 2))
            optimizer.zero_grad()
            divergence.sum().backward()
            optimizer.step()
        self.reference = frozen(params)
        sampler = generators(self.seeds, "bandit/reference_prefixes")
        self._reference_actions = self.network.sample(self.reference, self.eval_prompts, 1, sampler).squeeze(
            2
        )
        return frozen(params)

    def first_actions(self, params: Params, prompts: Tensor, num: int) -> Tensor:
        """The first batch comes from the policy, which imitates the data policy."""
        return self.sample(params, prompts, num)

    def sample(self, params: Params, prompts: Tensor, num: int) -> Tensor:
        """(R, S, N, T) response tokens."""
        return self.network.sample(params, prompts, num, self._actions)

    def token_logps(self, params: Params, prompts: Tensor, actions: Tensor, training: bool = False) -> Tensor:
        """(R, S, N, T) log-probs; ``training`` switches dropout on."""
        r, s, n, t = actions.shape
        flat = self.network.token_logps(
            params,
            prompts.repeat_interleave(n, 1),
            actions.view(r, s * n, t),
            self._dropout if training else None,
        )
        return flat.view(r, s, n, -1) * self.live(actions)

    @torch.no_grad()
    def reference_token_logps(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, S, N, T) log-probs under the imitation policy, without dropout."""
        return self.token_logps(self.reference, prompts, actions)

    def rewards(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, S, N) float64; the prompt token is one of the ten."""
        return (self.table[prompts].unsqueeze(-1) + self.table[actions].sum(-1)) / (actions.shape[-1] + 1)

    def expected_rewards(self, prompts: Tensor, actions: Tensor, p: Tensor) -> dict[str, Tensor]:
        """(R, B) each, given sampled ``actions`` (R, B, T) and the law ``p`` (R, B, T, V) of each token given its prefix."""
        t, generated = self.network.num_tokens, (p @ self.table).mean(-1)
        return {"reward": (self.table[prompts] + t * generated) / (t + 1), "reward_generated": generated}

    @torch.no_grad()
    def evaluate(self, params: Params) -> dict[str, Tensor]:
        """(R,) each, per sequence: reward (also over generated tokens alone), entropy and both KL divergences."""
        prompts = self.eval_prompts
        # the same uniforms at every evaluation: differences between steps are not sampling noise
        actions = self.network.sample(
            params, prompts, 1, generators(self.seeds, "bandit/eval_actions")
        ).squeeze(2)
        logps = self.network.next_token_logps(params, prompts, actions).double()  # (R, B, T, V)
        base = self.network.next_token_logps(self.reference, prompts, actions).double()
        p, live = logps.exp(), self.live(actions)
        base_away = self.network.next_token_logps(self.reference, prompts, self._reference_actions).double()
        away = self.network.next_token_logps(params, prompts, self._reference_actions).double()
        live_away = self.live(self._reference_actions)
        values = self.expected_rewards(prompts, actions, p) | {
            "entropy": -((p * logps).sum(-1) * live).sum(-1),
            "kl_policy_reference": ((p * (logps - base)).sum(-1) * live).sum(-1),
            "kl_reference_policy": ((base_away.exp() * (base_away - away)).sum(-1) * live_away).sum(-1),
        }
        return {name: value.mean(-1) for name, value in values.items()}
