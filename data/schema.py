"""Rows before and after tokenisation. No torch.nn, no tokenizer, no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Message = Mapping[str, str]  # {"role": "user" | "assistant" | "system" | "tool", "content": text}
Text = str | tuple[Message, ...]  # plain text, or chat messages


@dataclass(frozen=True)
class Example:
    """One row of a data set: a pair (or one completion, or a pair with auxiliary responses) for one prompt.

    uid               "<dataset>/<split>:<row>[#<pair>]", in every error message
    prompt            text or messages
    responses         ((role, text or messages), ...): roles "chosen", "rejected"; "target" (one completion);
                      "aux_1", "aux_2" (VRPO: the m-th aux_1 and the m-th aux_2 are one auxiliary pair)
    group             group name (the data set's name unless a column says otherwise)
    weight            per-example weight, finite and >= 0; losses are divided by the count, not by the weights' sum
    scalars           {"p_chosen": .., "margin": .., "chosen_preference": .., ...}
    response_scalars  {name: one float per response, NaN where it does not apply}
    meta              anything worth keeping in evaluation records (topic, annotator, the truth of generated data)
    """

    uid: str
    prompt: Text
    responses: tuple[tuple[str, Text], ...]
    group: str
    weight: float = 1.0
    scalars: Mapping[str, float] = field(default_factory=dict)
    response_scalars: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    meta: Mapping[str, object] = field(default_factory=dict)

    def response(self, role: str) -> Text:
        """The first response with that role."""
        for name, text in self.responses:
            if name == role:
                return text
        raise KeyError(f"{self.uid}: no response with role {role!r}")


@dataclass(frozen=True)
class Row:
    """A tokenised Example: what the batch plan indexes.

    prompt            (P,) int32 token ids, BOS included where the tokenizer's rule says so
    responses         per response (R,) int32 ids, EOS included; never empty
    prompt_key        equal for equal prompt ids (used to split by prompt and to share prompts)
    """

    uid: str
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    roles: tuple[str, ...]
    group: int
    prompt_key: str
    weight: float = 1.0
    scalars: Mapping[str, float] = field(default_factory=dict)
    response_scalars: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @cached_property
    def num_tokens(self) -> int:
        """Prompt tokens plus all response tokens, the prompt counted once."""
        return len(self.prompt) + sum(len(r) for r in self.responses)


@dataclass(frozen=True)
class Batch:
    """B examples with S responses, ragged: how they are laid out for the model is the Scorer's secret.

    uids              B names
    group             (B,) int64
    weight            (B,) float32
    prompts           B arrays of token ids
    responses         S arrays of token ids, flat, examples in order
    example           (S,) int64, the example of each response
    roles             S role names
    scalars           {name: (B,) float32}, NaN where a row lacks it
    response_scalars  {name: (S,) float32}, NaN where it does not apply
    token_scalars     {name: (N,) one value per response token of the batch, in response order}; never read from data,
                      an online loop annotates with it (the log-probs of the policy that drew the tokens)
    """

    uids: tuple[str, ...]
    group: Tensor
    weight: Tensor
    prompts: tuple[np.ndarray, ...]
    responses: tuple[np.ndarray, ...]
    example: Tensor
    roles: tuple[str, ...]
    scalars: Mapping[str, Tensor] = field(default_factory=dict)
    response_scalars: Mapping[str, Tensor] = field(default_factory=dict)
    token_scalars: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        b, s = len(self.uids), len(self.responses)
        if len(self.prompts) != b or self.group.shape != (b,) or self.weight.shape != (b,):
            raise ValueError(f"batch of {b}: prompts, group and weight must have {b} entries")
        if len(self.roles) != s or self.example.shape != (s,):
            raise ValueError(f"batch of {s} responses: roles and example must have {s} entries")
        for name, value in self.scalars.items():
            if value.shape != (b,):
                raise ValueError(f"scalar {name!r} has shape {tuple(value.shape)}, expected ({b},)")
        for name, value in self.response_scalars.items():
            if value.shape != (s,):
                raise ValueError(f"response scalar {name!r} has shape {tuple(value.shape)}, expected ({s},)")

    def __len__(self) -> int:
        return len(self.uids)

    def positions(self, roles: Sequence[str]) -> list[int]:
        """Positions among the S responses of those whose role is in ``roles``, in batch order."""
        wanted = set(roles)
        return [i for i, role in enumerate(self.roles) if role in wanted]

    @staticmethod
    def collate(rows: Sequence[Row]) -> Batch:
        """Rows in order -> one Batch on the CPU."""
        scalar_names = sorted({name for row in rows for name in row.scalars})
        response_names = sorted({name for row in rows for name in row.response_scalars})
        nan = float("nan")
        return Batch(
            uids=tuple(row.uid for row in rows),
            group=torch.tensor([row.group for row in rows], dtype=torch.long),
            weight=torch.tensor([row.weight for row in rows], dtype=torch.float32),
            prompts=tuple(row.prompt for row in rows),
            responses=tuple(response for row in rows for response in row.responses),
            example=torch.tensor([i for i, row in enumerate(rows) for _ in row.responses], dtype=torch.long),
            roles=tuple(role for row in rows for role in row.roles),
            scalars={
                n: torch.tensor([row.scalars.get(n, nan) for row in rows], dtype=torch.float32)
                for n in scalar_names
            },
            response_scalars={
                n: torch.tensor(
                    [v for row in rows for v in row.response_scalars.get(n, (nan,) * len(row.responses))],
                    dtype=torch.float32,
                )
                for n in response_names
            },
        )
