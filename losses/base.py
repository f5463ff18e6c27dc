"""The untrained model's own ranking: an evaluation, not a training loss."""

from __future__ import annotations

from dataclasses import dataclass

from data.schema import Batch
from losses.pairwise import PAIR, logp_metrics
from losses.types import LossOutput, Needs, Scored


@dataclass(frozen=True)
class Base:
    """How often a model ranks chosen above rejected by raw log-prob, before any preference training.

        loss_i = -1[log pi(w) > log pi(l)]      (-1/2 on a tie)

    No reference, no hyper-parameters, no gradient: ``needs.trains`` is False and the loop refuses to train with it.
    The mean loss is minus the accuracy, as in rsshyam/Group-robust-preference-optimization's ``base``.
    """

    @property
    def needs(self) -> Needs:
        return Needs(policy=PAIR, trains=False)

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        metrics = logp_metrics(policy, None)
        return LossOutput(-metrics["policy_accuracies"], metrics)
