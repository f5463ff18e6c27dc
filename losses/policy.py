"""Losses on single sampled responses: REINFORCE, PPO and reward-weighted regression.

An example is one response with role "sample". Rewards, advantages and the log-probs under the policy that drew the
sample are annotations on the batch, put there before the loss is called; nothing here samples or scores. Every loss
is minimised and leaves the mean over examples to the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from losses.types import LossOutput, Needs, Scored
from utils import UserError

ROLE = "sample"


def _penalty(log_ratio: Tensor, coef: float) -> Tensor:
    """(B,) what the KL penalty takes off the advantage: coef * log(pi / pi_ref) at the sample, without gradient."""
    return coef * log_ratio.detach()


@dataclass(frozen=True)
class Reinforce:
    """Score-function policy gradient (Williams 1992).

    loss_i = -(A_i - kl_coef * sg[log pi(y_i) - log pi_ref(y_i)]) * log pi(y_i),  y_i ~ pi.

    Its gradient is an unbiased estimate of -grad(E_pi[A] - kl_coef KL(pi || pi_ref)). The penalty sits in the
    advantage because adding kl_coef * (log pi - log pi_ref) to the loss instead, as the bandit code of Tajwar et al.
    2024 (arXiv 2404.14367) does, has expected gradient zero on fresh samples: E_pi[grad log pi] = 0.

    kl_coef  >= 0, nats of reward per nat of KL; 0 needs no reference.

    Reads the column ``advantage``. Raises UserError for a negative kl_coef.
    """

    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise UserError(f"loss.kl_coef={self.kl_coef}: must be >= 0")

    @property
    def needs(self) -> Needs:
        return Needs(policy=(ROLE,), reference=(ROLE,) if self.kl_coef else (), scalars=("advantage",))

    def __call__(self, policy: Scored, reference: Scored | None, batch: Any) -> LossOutput:
        logps = policy[ROLE]  # (B,)
        advantage = batch.scalars["advantage"].to(logps, non_blocking=True).detach()
        if self.kl_coef:
            advantage = advantage - _penalty(logps - reference[ROLE], self.kl_coef)
        return LossOutput(-advantage * logps, {"policy/advantage": advantage, "logps/sample": logps.detach()})


@dataclass(frozen=True)
class PPO:
    """Clipped surrogate without a critic (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    loss_i = sum_t max(-A_i rho_t, -A_i clip(rho_t, 1 - clip, 1 + clip)),  rho_t = pi(y_t) / pi_old(y_t),

    one advantage for all tokens of a response; ``level: sequence`` uses one ratio, that of the whole response. At
    pi = pi_old the gradient is REINFORCE's.

    clip     in (0, 1), half-width of the trust interval of the ratio; 0.2 in the paper
    level    "token" (as language-model PPO) or "sequence"
    kl_coef  >= 0; the advantage becomes A_i - kl_coef * log(pi_old / pi_ref)(y_i), the penalty inside the reward

    Reads ``advantage`` (B,) and the log-probs of the sampling policy: ``token_scalars["old_logps"]`` (N,) for level
    token, the column ``old_logps`` (B,) for level sequence and whenever kl_coef > 0. Raises UserError for bad fields.
    """

    clip: float = 0.2
    level: Literal["token", "sequence"] = "token"
    kl_coef: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.clip < 1:
            raise UserError(f"loss.clip={self.clip}: must lie between 0 and 1; try loss.clip=0.2")
        if self.level not in ("token", "sequence"):
            raise UserError(f"loss.level={self.level}: must be token or sequence")
        if self.kl_coef < 0:
            raise UserError(f"loss.kl_coef={self.kl_coef}: must be >= 0")

    @property
    def needs(self) -> Needs:
        per_sample = self.level == "sequence" or self.kl_coef > 0
        return Needs(
            policy=(ROLE,),
            reference=(ROLE,) if self.kl_coef else (),
            scalars=("advantage", "old_logps") if per_sample else ("advantage",),
            tokens=self.level == "token",
        )

    def __call__(self, policy: Scored, reference: Scored | None, batch: Any) -> LossOutput:
        logps = policy[ROLE]  # (B,)
        advantage = batch.scalars["advantage"].to(logps, non_blocking=True).detach()
        if self.kl_coef:
            old = batch.scalars["old_logps"].to(logps, non_blocking=True)
            advantage = advantage - _penalty(old - reference[ROLE], self.kl_coef)
        if self.level == "sequence":
            owner = torch.arange(logps.numel(), device=logps.device)
            log_ratio = logps - batch.scalars["old_logps"].to(logps, non_blocking=True).detach()
        else:  # every example has one response, so responses are examples and tokens come in example order
            # (N,) example of each token; its length is known, so that a GPU need not be asked
            owner = torch.repeat_interleave(policy.tokens_of(ROLE), output_size=len(policy.token_logps))
            log_ratio = (
                policy.token_logps - batch.token_scalars["old_logps"].to(logps, non_blocking=True).detach()
            )
        ratio = log_ratio.exp()  # (N,) or (B,)
        gain = advantage[owner]
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        terms = torch.maximum(-gain * ratio, -gain * clipped)
        losses = torch.zeros_like(logps).index_add(0, owner, terms)
        count = torch.zeros_like(logps).index_add(0, owner, torch.ones_like(terms))

        def mean(values: Tensor) -> Tensor:  # (N,) -> (B,) mean over the units of each example
            return torch.zeros_like(logps).index_add(0, owner, values.detach().to(logps)) / count

        metrics = {
            "policy/advantage": advantage,
            "policy/ratio": mean(ratio),
            # where the bound acts: the clipped branch is the larger one, so the gradient is zero there
            "policy/clip_fraction": mean((-gain * clipped > -gain * ratio).to(logps)),
            "logps/sample": logps.detach(),
        }
        return LossOutput(losses, metrics)


@dataclass(frozen=True)
class RewardWeighted:
    """Reward-weighted regression (Peters & Schaal 2007; RWR in Tajwar et al. 2024, arXiv 2404.14367).

    loss_i = -w_i log pi(y_i),  w_i = min(exp(r_i / temperature), max_weight).

    Its minimiser on samples from mu is pi(y) ~ mu(y) exp(r(y) / temperature): no response is ever pushed down.

    temperature  > 0, in units of the reward
    max_weight   > 0 or None: an upper bound on w (the language-model code of the paper uses 20)

    Reads the column ``reward``. Raises UserError for bad fields.
    """

    temperature: float
    max_weight: float | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"loss.temperature={self.temperature}: must be > 0; try loss.temperature=0.1")
        if self.max_weight is not None and not self.max_weight > 0:
            raise UserError(f"loss.max_weight={self.max_weight}: must be > 0 or null")

    @property
    def needs(self) -> Needs:
        return Needs(policy=(ROLE,), scalars=("reward",))

    def __call__(self, policy: Scored, reference: Scored | None, batch: Any) -> LossOutput:
        logps = policy[ROLE]  # (B,)
        weight = (batch.scalars["reward"].to(logps, non_blocking=True).detach() / self.temperature).exp()
        if self.max_weight is not None:
            weight = weight.clamp(max=self.max_weight)
        return LossOutput(-weight * logps, {"policy/weight": weight, "logps/sample": logps.detach()})
