"""The contextual bandit with actions in [-1, 1]^d: rewards 1-3, a squashed location-scale policy, a squashed Cauchy as data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from bandits import contextual
from bandits.policies import MLP, Generators, Params, frozen, stack, trainable
from bandits.worlds import WarmStart, generators
from utils import UserError

LIMIT = 0.99  # actions are clamped here, so that the density of a squashed variable stays finite
LOG_SCALE = (-20.0, 2.0)


class ContinuousBandit:
    """A context in [0, 1]^100, an action in [-1, 1]^d, a reward of the action alone.

    The policy squashes m(x) + s(x) * noise by tanh, one independent variable per dimension; ``latent: cauchy`` can equal
    the data policy, ``latent: gaussian`` cannot. The reference is the data policy's density. Metrics are averages over
    ``num_draws`` actions per evaluation context with noise that is fixed per seed.
    """

    def __init__(
        self,
        reward: int,
        seeds: Sequence[int],
        dims: int = 2,
        latent: Literal["gaussian", "cauchy"] = "gaussian",
        warm: WarmStart | None = None,
        num_eval: int = 100,
        num_draws: int = 64,
    ) -> None:
        contextual.check_reward(reward, contextual.CONTINUOUS)
        if dims < 1:
            raise UserError(f"dims={dims}: must be at least 1")
        self.reward, self.seeds, self.dims, self.latent = reward, tuple(seeds), dims, latent
        self.network = MLP(outputs=2 * dims, first="tanh")
        self.warm = warm or WarmStart()
        self._prompts = generators(seeds, "bandit/prompts")
        self._actions = generators(seeds, "bandit/actions")
        self.eval_prompts = self._contexts(generators(seeds, "bandit/eval_prompts"), num_eval)
        rngs = generators(seeds, "bandit/eval_actions")
        self.eval_noise = self._noise(rngs, num_eval, num_draws)
        self.eval_data = self._data(rngs, num_eval, num_draws)

    def _contexts(self, rngs: Generators, num: int) -> Tensor:
        return stack([rng.random((num, self.network.inputs)) for rng in rngs], torch.float32)

    def _noise(self, rngs: Generators, num: int, draws: int) -> Tensor:
        """(R, num, draws, d) standard draws of the latent variable."""
        shape = (num, draws, self.dims)
        draw = [
            r.standard_normal(shape) if self.latent == "gaussian" else r.standard_cauchy(shape) for r in rngs
        ]
        return stack(draw, torch.float32)

    def _data(self, rngs: Generators, num: int, draws: int) -> Tensor:
        """(R, num, draws, d) actions of the data policy."""
        shape = (num, draws, self.dims)
        return stack([contextual.squashed_cauchy_sample(rng, shape, LIMIT) for rng in rngs], torch.float32)

    def draw_prompts(self, num: int) -> Tensor:
        """(R, S, 100) contexts."""
        return self._contexts(self._prompts, num)

    def location_scale(self, params: Params, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """(R, S, 1, d) each."""
        location, log_scale = self.network(params, prompts).unsqueeze(2).chunk(2, -1)
        return location, log_scale.clamp(*LOG_SCALE).exp()

    def _squash(self, params: Params, prompts: Tensor, noise: Tensor) -> Tensor:
        location, scale = self.location_scale(params, prompts)
        return torch.tanh(location + scale * noise).clamp(-LIMIT, LIMIT)

    def _latent_log_density(self, z: Tensor) -> Tensor:
        """Of the standard latent variable, elementwise."""
        if self.latent == "gaussian":
            return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        return -torch.log(math.pi * (1 + z.square()))

    def log_density(self, params: Params, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, S, N, d) actions -> (R, S, N) nats, with the Jacobian of tanh."""
        location, scale = self.location_scale(params, prompts)
        z = (torch.atanh(actions) - location) / scale
        density = self._latent_log_density(z)
        return (density - scale.log() - torch.log1p(-actions.square())).sum(-1)

    def data_log_density(self, actions: Tensor) -> Tensor:
        """(..., d) -> (...) nats under the data policy."""
        z = (torch.atanh(actions) - contextual.LOCATION) / contextual.SCALE
        density = -torch.log(math.pi * contextual.SCALE * (1 + z.square()))
        return (density - torch.log1p(-actions.square())).sum(-1)

    def warm_start(self, prompts: Tensor) -> Params:
        """Reverse-KL imitation of the data policy with reparametrised samples."""
        params = trainable(self.network.init(generators(self.seeds, "bandit/init")))
        optimizer = torch.optim.Adam(list(params.values()), lr=self.warm.lr, fused=True)
        rngs = generators(self.seeds, "bandit/warm")
        for _ in range(self.warm.steps):
            actions = self._squash(params, prompts, self._noise(rngs, prompts.shape[1], 16))
            divergence = self.log_density(params, prompts, actions) - self.data_log_density(actions)
            optimizer.zero_grad()
            divergence.mean((1, 2)).sum().backward()
            optimizer.step()
        return frozen(params)

    def first_actions(self, params: Params, prompts: Tensor, num: int) -> Tensor:
        """The first batch comes from the data policy."""
        return self._data(self._actions, prompts.shape[1], num)

    @torch.no_grad()
    def sample(self, params: Params, prompts: Tensor, num: int) -> Tensor:
        """(R, S, N, d) actions from the policy."""
        return self._squash(params, prompts, self._noise(self._actions, prompts.shape[1], num))

    def token_logps(self, params: Params, prompts: Tensor, actions: Tensor, training: bool = False) -> Tensor:
        """(R, S, N, 1) log-densities."""
        return self.log_density(params, prompts, actions).unsqueeze(-1)

    def reference_token_logps(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, S, N, 1) log-densities under the data policy."""
        return self.data_log_density(actions).unsqueeze(-1)

    def rewards(self, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, S, N) float64."""
        return torch.from_numpy(contextual.continuous_reward(self.reward, actions.numpy().astype(np.float64)))

    @torch.no_grad()
    def evaluate(self, params: Params) -> dict[str, Tensor]:
        """(R,) each: expected reward, differential entropy and both KL divergences from the data policy, in nats.

        The policy's own draws are scored before they are clamped: a narrow policy beyond the clamp gives its clamped actions a density
        of zero. KL(data || policy) is over the clamped actions of the data; a Gaussian policy has no finite one over all of them.
        """
        location, scale = self.location_scale(params, self.eval_prompts)
        latent = location + scale * self.eval_noise  # (R, S, draws, d)
        actions = torch.tanh(latent).clamp(-LIMIT, LIMIT)
        own = self._latent_log_density(self.eval_noise) - scale.log()
        data = -torch.log(
            math.pi * contextual.SCALE * (1 + ((latent - contextual.LOCATION) / contextual.SCALE) ** 2)
        )
        jacobian = 2 * (math.log(2) - latent - softplus(-2 * latent))  # log(1 - tanh^2)
        away = self.data_log_density(self.eval_data) - self.log_density(
            params, self.eval_prompts, self.eval_data
        )
        values = {
            "reward": self.rewards(self.eval_prompts, actions),
            "entropy": (jacobian - own).sum(-1),
            "kl_policy_reference": (own - data).sum(-1),
            "kl_reference_policy": away,
        }
        return {name: value.double().mean((1, 2)) for name, value in values.items()}
