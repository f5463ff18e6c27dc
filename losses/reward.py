"""Reward models: a scalar head trained by Bradley-Terry on pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from data.schema import Batch
from losses.pairwise import PAIR, expected, require
from losses.types import LossOutput, Needs, Scored, reward_metrics, soft_label


def logistic(margin: Tensor) -> Tensor:
    """-log sigmoid(margin), any shape."""
    return softplus(-margin)


def margin_column(batch: Batch, like: Tensor) -> Tensor:
    """(B,) the column ``margin`` (the reward gap a pair should at least have); 0 for rows without it."""
    margin = batch.scalars.get("margin")
    if margin is None:
        return torch.zeros_like(like)
    return margin.detach().to(like, non_blocking=True).nan_to_num(nan=0.0)


def centring(chosen: Tensor, rejected: Tensor, coefficient: float) -> Tensor:
    """(B,) c (r_w + r_l)^2: pins the rewards' free constant near zero (Eisenstein et al. 2023, arXiv 2312.09244)."""
    return coefficient * (chosen + rejected) ** 2


@dataclass(frozen=True)
class Reward:
    """Bradley-Terry reward model.

    Ouyang et al. 2022 (arXiv 2203.02155) eq. 1; the margin is that of Llama 2 (Touvron et al. 2023, arXiv 2307.09288, eq. 2).

        link(m) = -log sigmoid(m),     m = r(w) - r(l) - d
        loss    = q link(m) + (1 - q) link(-m) + c (r(w) + r(l))^2,     q = (1 - eps) p + eps (1 - p)

    label_smoothing             eps in [0, 1/2), as in DPO; p is the column ``p_chosen`` or 1.
    d                           column ``margin``, in units of reward; 0 without it. It belongs to the pair's order, so the
                                swapped label sees -d.
    center_rewards_coefficient  c >= 0; 0.01 is usual.

    Raises UserError for values out of range. Deviation: none from TRL's RewardTrainer for p = 1, eps = 0. The metric
    ``rewards/margins`` is r(w) - r(l), without d.
    """

    label_smoothing: float = 0.0
    center_rewards_coefficient: float = 0.0

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "must be in [0, 0.5)"
        )
        require(
            self.center_rewards_coefficient >= 0,
            "center_rewards_coefficient",
            self.center_rewards_coefficient,
            "must be >= 0; 0 turns it off",
        )

    @property
    def needs(self) -> Needs:
        return Needs(policy=PAIR, output="reward")

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        chosen, rejected = policy.value("chosen"), policy.value("rejected")
        q = self.label_smoothing + (1 - 2 * self.label_smoothing) * soft_label(batch, chosen)
        losses = expected(logistic, q, chosen - rejected - margin_column(batch, chosen))
        losses = losses + centring(chosen, rejected, self.center_rewards_coefficient)
        return LossOutput(losses, reward_metrics(chosen, rejected))
