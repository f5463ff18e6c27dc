"""Best-of-n with an explicit negative gradient on the responses that lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from losses.types import LossOutput, Needs, Scored
from utils import UserError


@dataclass(frozen=True)
class BestOfNNegative:
    """Likelihood of the best of n samples, minus that of the worse ones (Tajwar et al. 2024, arXiv 2404.14367).

    loss_i = -log pi(y*) + coef * push_i, over the n - 1 other samples y_j of the prompt:

        sum         push = sum_j w_j log pi(y_j)
        average     push = sum_j w_j log pi(y_j) / (n - 1)
        complement  push = -sum_j w_j log(1 - pi(y_j))          bounded unlikelihood

    w_j = 1 where y_j is strictly worse than y*, else 0; the published code pushes ties down too, and so undoes the
    imitation once the policy has settled on one action. "Only the worst" is ``sum`` with a single rejected response.

    coef         >= 0
    guard        in [0, 1): a negative with pi(y_j) <= guard * pi(y*) is left alone; 0 switches the guard off, and
                 then log pi(y_j) is unbounded below. The published transformer code uses 0.01, its MLP code none.
    constrained  adds log pi_ref(y*) - coef * push of the reference: constants, so the gradient does not change.

    Reads ``response_scalars["worse"]`` (S,). Roles: one "chosen", one or more "rejected" per example.
    """

    coef: float
    push: Literal["sum", "average", "complement"] = "sum"
    guard: float = 0.0
    constrained: bool = False

    def __post_init__(self) -> None:
        if self.coef < 0:
            raise UserError(f"coef={self.coef}: must be >= 0")
        if self.push not in ("sum", "average", "complement"):
            raise UserError(f"push={self.push}: must be sum, average or complement")
        if not 0 <= self.guard < 1:
            raise UserError(f"guard={self.guard}: must lie in [0, 1); try guard=0.01")

    @property
    def needs(self) -> Needs:
        roles = ("chosen", "rejected")
        return Needs(policy=roles, reference=roles if self.constrained else (), optional_roles=("rejected",))

    def _push(self, scored: Scored, weight: Tensor) -> Tensor:
        """(B,) the term that is minimised on the rejected responses; ``weight`` (K,) is 0 for those left alone."""
        where = scored.index("rejected")
        logps = scored.logps[where]  # (K,)
        if self.push == "complement":
            # log(1 - p) -> -inf as p -> 1; 1e-6 bounds it at -13.8
            logps = -torch.log(-torch.expm1(logps.clamp(max=-1e-6)))
        owner = scored.example[where]
        total = torch.zeros(scored.num_examples, dtype=logps.dtype).index_add(0, owner, weight * logps)
        if self.push == "average":
            total = total / torch.bincount(owner, minlength=scored.num_examples)
        return total

    def __call__(self, policy: Scored, reference: Scored | None, batch: Any) -> LossOutput:
        chosen = policy["chosen"]  # (B,)
        where = policy.index("rejected")
        rejected, owner = policy.logps[where].detach(), policy.example[where]
        weight = batch.response_scalars["worse"][where].to(chosen)
        if self.guard:
            weight = weight * (rejected - chosen.detach()[owner] > torch.tensor(self.guard).log())
        losses = -chosen + self.coef * self._push(policy, weight)
        if self.constrained:
            losses = losses + (reference["chosen"] - self.coef * self._push(reference, weight)).detach()
        return LossOutput(losses, {"logps/chosen": chosen.detach()})
