"""Small batches with made-up scores, so that losses can be called without a model.

The numbers of an example are plain Python floats, which the oracles read; ``build`` turns a list of examples into what the
losses are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data.schema import Batch
from losses.types import Scored

DIMENSION = 4  # of the embeddings


@dataclass(frozen=True)
class Response:
    """One scored response: log-probs in nats under policy and reference, tokens, reward, embedding."""

    role: str
    policy: float
    reference: float
    tokens: int
    reward: float
    embedding: tuple[float, ...]
    preference: float = float("nan")  # on aux_1: g* of its pair


@dataclass(frozen=True)
class Row:
    """One example: chosen, rejected, then aux_1, aux_2, aux_1, aux_2, ..."""

    responses: tuple[Response, ...]
    scalars: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, role: str) -> Response:
        return next(r for r in self.responses if r.role == role)

    @property
    def aux(self) -> list[tuple[Response, Response]]:
        """The auxiliary pairs."""
        first = [r for r in self.responses if r.role == "aux_1"]
        return list(zip(first, [r for r in self.responses if r.role == "aux_2"], strict=True))


@dataclass(frozen=True)
class Case:
    """What a loss is called with; ``leaf`` is the tensor the loss differentiates."""

    policy: Scored
    reference: Scored
    batch: Batch
    leaf: torch.Tensor


def random_response(rng: np.random.Generator, role: str, scale: float = 3.0) -> Response:
    return Response(
        role=role,
        policy=float(-20 + scale * rng.normal()),
        reference=float(-20 + scale * rng.normal()),
        tokens=int(rng.integers(2, 9)),
        reward=float(rng.normal()),
        embedding=tuple(float(x) for x in rng.normal(size=DIMENSION)),
        preference=float(rng.uniform(0.05, 0.95)) if role == "aux_1" else float("nan"),
    )


def random_rows(
    seed: int,
    num: int,
    *,
    num_aux: Sequence[int] = (0,),
    p_chosen: bool = False,
    margin: bool = False,
    scale: float = 3.0,
) -> list[Row]:
    """``num`` rows; row i has num_aux[i % len] auxiliary pairs."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(num):
        m = num_aux[i % len(num_aux)]
        roles = ["chosen", "rejected", *["aux_1", "aux_2"] * m]
        responses = tuple(random_response(rng, role, scale) for role in roles)
        scalars = {}
        if p_chosen:
            scalars["p_chosen"] = float(rng.uniform())
        if margin:
            scalars["margin"] = float(rng.normal())
        if m:
            scalars["chosen_preference"] = float(rng.uniform(0.05, 0.95))
        rows.append(Row(responses, scalars))
    return rows


def build(rows: Sequence[Row], output: str = "logps", dtype: torch.dtype = torch.float64) -> Case:
    """Scores and batch of the rows; scalars stay float64 so that oracles can be met to rounding."""
    flat = [(i, r) for i, row in enumerate(rows) for r in row.responses]
    example = torch.tensor([i for i, _ in flat])
    roles = tuple(r.role for _, r in flat)
    tokens = torch.tensor([r.tokens for _, r in flat])
    read = {"logps": lambda r: r.policy, "reward": lambda r: r.reward, "embedding": lambda r: r.embedding}[
        output
    ]
    leaf = torch.tensor([read(r) for _, r in flat], dtype=dtype, requires_grad=True)
    no_logps = torch.empty(0, dtype=dtype)

    def scored(logps: torch.Tensor, values: torch.Tensor | None) -> Scored:
        return Scored(logps, tokens, roles, example, len(rows), values=values)

    policy = scored(leaf, None) if output == "logps" else scored(no_logps, leaf)
    reference = scored(torch.tensor([r.reference for _, r in flat], dtype=dtype), None)
    nan = float("nan")
    names = sorted({name for row in rows for name in row.scalars})
    batch = Batch(
        uids=tuple(f"made/up:{i}" for i in range(len(rows))),
        group=torch.zeros(len(rows), dtype=torch.long),
        weight=torch.ones(len(rows)),
        prompts=tuple(np.zeros(1, dtype=np.int32) for _ in rows),
        responses=tuple(np.zeros(r.tokens, dtype=np.int32) for _, r in flat),
        example=example,
        roles=roles,
        scalars={
            n: torch.tensor([row.scalars.get(n, nan) for row in rows], dtype=torch.float64) for n in names
        },
        response_scalars={
            "aux_preference": torch.tensor([r.preference for _, r in flat], dtype=torch.float64)
        },
    )
    return Case(policy, reference, batch, leaf)


def call(loss, case: Case):
    """The loss on the case, with exactly the reference it asks for."""
    return loss(case.policy, case.reference if loss.needs.reference else None, case.batch)


def with_leaf(case: Case, leaf: torch.Tensor) -> Case:
    """The same case with other policy scores."""
    old = case.policy
    logps, values = (leaf, None) if old.values is None else (old.logps, leaf)
    policy = Scored(logps, old.num_tokens, old.roles, old.example, old.num_examples, values=values)
    return Case(policy, case.reference, case.batch, leaf)
