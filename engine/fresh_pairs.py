"""Auxiliary pairs drawn anew for every row at every epoch, as part of training: VRPO without a file of samples.

With fixed auxiliary pairs the correction keeps the noise of those M pairs however long one trains; with fresh ones E epochs
average over about E M pairs. What is drawn is a function of (seed, uid, epoch, index), so a resumed run draws the same, and
there is no state to keep.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from data.schema import Example, Row
from engine import sampling
from engine.preferences import function_odds, load_function, pair_positions

LABELLED = ("chosen", "rejected")


@dataclass(frozen=True)
class FreshPairs:
    """reference     gives, as a context, the frozen language model that is drawn from
    preference    rows -> per row the log-odds (1 + M,) of the labelled and the auxiliary pairs
    temperature   of the preferences, as commands.annotate finds it (annotation.temperature, calibration.json)
    max_length    tokens of prompt and response; max_new_tokens: a further limit, or None
    """

    reference: Callable[[], AbstractContextManager[nn.Module]]
    tokenizer: Any
    preference: Callable[[Sequence[Row]], list[np.ndarray]]
    num_pairs: int
    temperature: float
    max_length: int
    max_new_tokens: int | None
    batch_size: int
    seed: int

    def __call__(self, rows: Sequence[Row], epoch: int) -> list[Row]:
        """The rows with the auxiliary pairs of this epoch, and preferences, in place of those they may have. A row that is
        there twice (groups are drawn again before the epoch ends) has the same pairs both times."""
        distinct = list({row.uid: row for row in rows}.values())
        made = {row.uid: row for row in self._draw(distinct, epoch)}
        return [made[row.uid] for row in rows]

    def _draw(self, rows: Sequence[Row], epoch: int) -> list[Row]:
        number = 2 * self.num_pairs
        room = [self.max_length - len(row.prompt) for row in rows]
        if self.max_new_tokens is not None:
            room = [min(n, self.max_new_tokens) for n in room]
        with self.reference() as model:
            drawn = sampling.generate(
                model,
                self.tokenizer,
                [row.prompt for row in rows for _ in range(number)],
                max_new_tokens=[n for n in room for _ in range(number)],
                seed=self.seed,
                keys=[(row.uid, "epoch", epoch, i) for row in rows for i in range(number)],
                batch_size=self.batch_size,
                # labelled responses end with EOS and nothing else, whatever the generation config ends a turn with
                stop_ids=[self.tokenizer.eos_token_id],
            )
        made = [self._with(row, drawn[i * number : (i + 1) * number]) for i, row in enumerate(rows)]
        odds = self.preference(made)
        return [self._preferred(row, found) for row, found in zip(made, odds, strict=True)]

    def _with(self, row: Row, drawn: Sequence[sampling.Sample]) -> Row:
        """The labelled pair and the drawn responses: the very tokens, with EOS where the model ended."""
        kept = [row.responses[row.roles.index(role)] for role in LABELLED]
        return replace(
            row,
            responses=(*kept, *(sample.ids for sample in drawn)),
            roles=(*LABELLED, *("aux_1", "aux_2") * self.num_pairs),
            response_scalars={},
        )

    def _preferred(self, row: Row, odds: np.ndarray) -> Row:
        p = 0.5 * (1.0 + np.tanh(odds / (2 * self.temperature)))
        nan = math.nan
        pairs = tuple(v for x in p[1:] for v in (float(x), nan))
        return replace(
            row,
            scalars={**row.scalars, "chosen_preference": float(p[0])},
            response_scalars={"aux_preference": (nan, nan, *pairs)},
        )


class FunctionPreference:
    """``module:function`` (see ``engine.preferences.function_odds``) on the texts of token rows; ``examples`` by uid.

    It is called as function(prompt, responses, row) like a scorer of commands.annotate; row has the labelled pair's columns.
    """

    def __init__(self, path: str, examples: Mapping[str, Example], tokenizer: Any) -> None:
        self.path, self.examples, self.tokenizer = path, examples, tokenizer
        self.function = load_function(path, "fresh_pairs.function")

    def __call__(self, rows: Sequence[Row]) -> list[np.ndarray]:
        return [self._row(row) for row in rows]

    def _row(self, row: Row) -> np.ndarray:
        example = self.examples[row.uid]
        texts = [*(example.response(role) for role in LABELLED), *map(self._text, row.responses[2:])]
        if not isinstance(example.prompt, str):
            texts = [({"role": "assistant", "content": t},) if isinstance(t, str) else t for t in texts]
        columns = {
            "uid": row.uid,
            "group": example.group,
            "weight": example.weight,
            **example.scalars,
            **example.meta,
        }
        found = self.function(example.prompt, texts, columns)
        return function_odds(found, pair_positions(row.roles), len(texts), f"{row.uid}: {self.path}")

    def _text(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
