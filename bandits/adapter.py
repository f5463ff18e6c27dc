"""The only place where bandit log-probs become the ``Scored`` and ``Batch`` that the losses take.

Bandit batches are regular: every example has the same roles in the same order (a ``Pattern``), and every response has
the same number of tokens. That is all a loss needs to be told; there are no token ids to score, so ``Batch.responses``
holds empty arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from data.schema import Batch
from losses.types import Scored

_NO_TOKENS = np.empty(0, dtype=np.int32)
_NOWHERE = torch.empty(0, dtype=torch.long)


@dataclass(frozen=True)
class PatternScored(Scored):
    """A Scored that knows where its roles are: 10^5 role names need not be searched at every step."""

    positions: Mapping[str, Tensor] = field(default_factory=dict)

    def index(self, role: str) -> Tensor:
        return self.positions.get(role, _NOWHERE)


@dataclass(frozen=True)
class PatternBatch(Batch):
    """The same for a Batch: positions of a role as a tensor, which indexes as the list of the base class does."""

    where: Mapping[str, Tensor] = field(default_factory=dict)

    def positions(self, roles: Sequence[str]) -> Tensor:
        """(A,) positions of the responses with one of ``roles``, in batch order."""
        return torch.cat([self.where.get(role, _NOWHERE) for role in roles]).sort().values


@dataclass(frozen=True)
class Pattern:
    """B examples with the same P roles each, e.g. ("chosen", "rejected") or ("sample",)."""

    roles: tuple[str, ...]
    num_examples: int

    @cached_property
    def _all_roles(self) -> tuple[str, ...]:
        return self.roles * self.num_examples

    @cached_property
    def _example(self) -> Tensor:  # (B * P,)
        return torch.arange(self.num_examples).repeat_interleave(len(self.roles))

    @cached_property
    def _positions(self) -> dict[str, Tensor]:
        start = torch.arange(self.num_examples).unsqueeze(1) * len(self.roles)  # (B, 1)
        columns: dict[str, list[int]] = {}
        for column, role in enumerate(self.roles):
            columns.setdefault(role, []).append(column)
        return {role: (start + torch.tensor(c)).flatten() for role, c in columns.items()}

    def scored(self, logps: Tensor, token_logps: Tensor | None = None) -> Scored:
        """(B, P) summed log-probs, and (B, P, T) token log-probs where the loss asks for tokens."""
        if logps.shape != (self.num_examples, len(self.roles)):
            raise ValueError(
                f"log-probs {tuple(logps.shape)} for {self.num_examples} examples of {self.roles}"
            )
        num_tokens = 1 if token_logps is None else token_logps.shape[-1]
        flat = logps.flatten()
        return PatternScored(
            logps=flat,
            num_tokens=torch.full((flat.numel(),), num_tokens, dtype=torch.long),
            roles=self._all_roles,
            example=self._example,
            num_examples=self.num_examples,
            token_logps=None if token_logps is None else token_logps.flatten(),
            positions=self._positions,
        )

    def batch(
        self,
        scalars: Mapping[str, Tensor] | None = None,
        response_scalars: Mapping[str, Tensor] | None = None,
        token_scalars: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """scalars (B,), response_scalars (B, P), token_scalars (B, P, T)."""
        b, s = self.num_examples, self.num_examples * len(self.roles)
        return PatternBatch(
            uids=("bandit",) * b,
            group=torch.zeros(b, dtype=torch.long),
            weight=torch.ones(b),
            prompts=(_NO_TOKENS,) * b,
            responses=(_NO_TOKENS,) * s,
            example=self._example,
            roles=self._all_roles,
            scalars=dict(scalars or {}),
            response_scalars={n: v.flatten() for n, v in (response_scalars or {}).items()},
            token_scalars={n: v.flatten() for n, v in (token_scalars or {}).items()},
            where=self._positions,
        )
