"""Supervised fine-tuning on one target response per example."""

from __future__ import annotations

from dataclasses import dataclass

from data.schema import Batch
from losses.types import LossOutput, Needs, Scored
from utils import UserError


@dataclass(frozen=True)
class SFT:
    """Negative log-likelihood of the target response.

        loss_i = -log pi(y_i | x_i) = -sum over the response's tokens (EOS included), in nats

    unit    what the step's mean is over. "example": sum of losses / examples, so long responses weigh more; what
            eric-mitchell/direct-preference-optimization trains. "token": sum of losses / response tokens of the whole
            optimizer step, what TRL trains. The loss per example is the same; the loop divides.
    sft_on  which responses become targets; read by the data layer. "chosen": the chosen response, one example per prompt.
            "all": chosen and rejected alike, one example each, which estimates the law of the data's responses (the
            reference that VRPO presumes).

    Raises UserError for other values. Metrics: ``logps/target`` (nats), ``nll_per_token`` (nats per token).
    """

    unit: str = "example"
    sft_on: str = "chosen"

    def __post_init__(self) -> None:
        if self.unit not in ("example", "token"):
            raise UserError(f"loss.unit={self.unit}: must be example or token")
        if self.sft_on not in ("chosen", "all"):
            raise UserError(f"loss.sft_on={self.sft_on}: must be chosen or all")

    @property
    def needs(self) -> Needs:
        return Needs(policy=("target",), unit="token" if self.unit == "token" else "example")

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        logps = policy["target"]
        detached = logps.detach()
        return LossOutput(
            -logps, {"logps/target": detached, "nll_per_token": -detached / policy.tokens_of("target")}
        )
