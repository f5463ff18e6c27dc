"""What a loss is given and what it returns. Shapes: B examples of a micro-batch, S scored responses, N tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """What a loss asks of the loop. The loop never asks a loss for its name.

    policy            roles scored with gradient. ``("chosen", "rejected")``, ``("target",)`` for SFT, ...
    reference         roles scored by the reference model without gradient; empty: no reference is loaded.
    optional_roles    roles of ``policy``/``reference`` that a row may lack or have several of (VRPO's aux_1, aux_2).
    scalars           columns every row must have (checked when the data is read).
    optional_scalars  columns that a row with one of ``optional_roles`` must have (checked before a model is loaded).
    tokens            also return per-token log-probs.
    unit              what the mean is over: "example" (sum of losses / examples of the optimizer step) or "token"
                      (sum of losses / response tokens of the policy roles in the optimizer step).
    output            what the model's head gives: "logps" (language model), "reward" (scalar head),
                      "embedding" (general preference model).
    dim               width of the embedding; None for the other outputs.
    trains            False for evaluation-only losses: the loop refuses to train with them.
    """

    policy: tuple[str, ...] = ("chosen", "rejected")
    reference: tuple[str, ...] = ()
    optional_roles: tuple[str, ...] = ()
    scalars: tuple[str, ...] = ()
    optional_scalars: tuple[str, ...] = ()
    tokens: bool = False
    unit: Literal["example", "token"] = "example"
    output: Literal["logps", "reward", "embedding"] = "logps"
    dim: int | None = None
    trains: bool = True


@dataclass(frozen=True)
class Scored:
    """Scores of the S responses of one micro-batch, in batch order.

    logps        (S,) nats, summed over response tokens (EOS included); float32, or float64 when the model is
    num_tokens   (S,) int64, response tokens that were summed
    roles        S role names
    example      (S,) int64, index of the response's example in 0..B-1
    num_examples B
    values       (S,) rewards or (S, D) embeddings when the head is not a language-model head; logps is then empty
    token_logps  (sum of num_tokens,) in response order, only when asked for
    """

    logps: Tensor
    num_tokens: Tensor
    roles: tuple[str, ...]
    example: Tensor
    num_examples: int
    values: Tensor | None = None
    token_logps: Tensor | None = None
    _index: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def index(self, role: str) -> Tensor:
        """(A,) int64 positions of ``role`` among the S responses, in batch order."""
        if role not in self._index:
            where = torch.tensor([i for i, r in enumerate(self.roles) if r == role], dtype=torch.long)
            self._index[role] = where.to(self.example.device, non_blocking=True)
        return self._index[role]

    def one(self, role: str) -> Tensor:
        """(B,) int64 positions of a role of which every example has exactly one, in example order."""
        where = self.index(role)
        complete = where.numel() == self.num_examples
        if complete and self.example.device.type == "cpu":  # on a GPU looking would stall the step
            complete = torch.equal(self.example[where], torch.arange(self.num_examples))
        if not complete:
            raise ValueError(f"role {role!r}: every example must have exactly one such response")
        return where

    def __getitem__(self, role: str) -> Tensor:
        """(B,) summed log-probs of the role (every example must have exactly one)."""
        return self.logps[self.one(role)]

    def tokens_of(self, role: str) -> Tensor:
        """(B,) response tokens of the role."""
        return self.num_tokens[self.one(role)]

    def value(self, role: str) -> Tensor:
        """(B,) rewards or (B, D) embeddings of the role."""
        if self.values is None:
            raise ValueError("this model has a language-model head: it gives log-probs, not rewards")
        return self.values[self.one(role)]


@dataclass(frozen=True)
class LossOutput:
    """losses (B,) with gradient, one per example, NOT averaged (for ``unit="token"``: summed over the example's
    tokens); metrics {name: (B,)} detached, NaN where a metric is not defined for an example."""

    losses: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class Loss(Protocol):
    """A frozen dataclass whose fields are its hyper-parameters (the class is the config schema of its YAML)."""

    @property
    def needs(self) -> Needs: ...

    def __call__(self, policy: Scored, reference: Scored | None, batch: Any) -> LossOutput: ...


@runtime_checkable
class Derives(Protocol):
    """A loss with metrics that are functions of the means of its metrics, such as variances and ratios."""

    def derived(self, means: Mapping[str, float]) -> dict[str, float]: ...


def derived(loss: Any, means: Mapping[str, float]) -> dict[str, float]:
    """Further metrics of a step or an evaluation, from the means of ``LossOutput.metrics`` over its examples (a metric that
    no example has is not there); empty for losses that have none."""
    return loss.derived(means) if isinstance(loss, Derives) else {}


@runtime_checkable
class Advises(Protocol):
    """A loss that can tell from its metrics over many examples what is wrong with the run."""

    def advice(self, means: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, str]: ...


def advice(loss: Any, means: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, str]:
    """{kind: what to do}, from the means of ``LossOutput.metrics`` and how many examples each rests on."""
    return loss.advice(means, counts) if isinstance(loss, Advises) else {}


def soft_label(batch: Any, like: Tensor) -> Tensor:
    """(B,) probability that "chosen" is preferred: the column ``p_chosen`` where a row has one, else 1."""
    p = batch.scalars.get("p_chosen")
    if p is None:
        return torch.ones_like(like)
    p = p.to(like, non_blocking=True)
    return torch.where(torch.isnan(p), torch.ones_like(p), p).detach()


def reward_metrics(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """``rewards/*`` (B,) from detached implicit or explicit rewards in nats; a tie counts 1/2 in the accuracy."""
    chosen, rejected = chosen.detach(), rejected.detach()
    accuracy = (chosen > rejected).to(chosen) + 0.5 * (chosen == rejected).to(chosen)
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": accuracy,
    }
