"""Where auxiliary preferences come from: a trained model, a function of your own, or a language model as judge.

Every scorer takes labelled rows and gives, per row, the log-odds that the first response of a pair is preferred, for the
labelled pair (chosen first) and then every auxiliary pair; or, as text, why it cannot.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from commands.judge import Judge, Question
from commands.rows import Labelled
from data.schema import Text
from engine.preferences import (
    ROLES,
    ModelPreference,
    function_odds,
    load_function,
    log_odds,
    pair_positions,
)
from preference_datasets import Counts, Tokenization, tokenize
from utils import file_hash

Scores = np.ndarray | str


def responses_of(one: Labelled) -> tuple[list[Text], list[tuple[int, int]]]:
    """(all responses, the pairs among them)."""
    roles = [role for role, _ in one.example.responses]
    return [text for _, text in one.example.responses], pair_positions(roles)


@dataclass
class ModelScorer:
    """A reward or general preference model; ``identity`` says which."""

    preference: ModelPreference
    tokenizer: Any
    settings: Tokenization
    identity: dict[str, Any]

    def __call__(self, batch: Sequence[Labelled]) -> list[Scores]:
        examples = [one.example for one in batch]
        groups = tuple(dict.fromkeys(e.group for e in examples))
        rows = tokenize(
            examples,
            self.tokenizer,
            self.settings,
            groups=groups,
            roles=ROLES,
            optional_roles=ROLES[2:],
            counts=Counts(),
        )
        found = dict(zip((row.uid for row in rows), self.preference(rows), strict=True)) if rows else {}
        return [found.get(e.uid, "longer than max_length (truncation=drop)") for e in examples]


def source_hash(path: str) -> str | None:
    """Of the file of ``module:function``, so that scores of an edited one are not kept; None where there is no file."""
    file = getattr(importlib.import_module(path.partition(":")[0]), "__file__", None)
    return file_hash(Path(file))[:16] if file else None


@dataclass
class FunctionScorer:
    """``module:function`` called as function(prompt, responses, row), with the responses chosen, rejected and the auxiliary
    ones in order; it returns one score per response (in log-odds), or the matrix of P(i preferred to j)."""

    path: str

    def __post_init__(self) -> None:
        self.function = load_function(self.path, "annotate.function")
        self.identity = {"scorer": "function", "function": self.path, "source": source_hash(self.path)}

    def __call__(self, batch: Sequence[Labelled]) -> list[Scores]:
        return [self._row(one) for one in batch]

    def _row(self, one: Labelled) -> np.ndarray:
        texts, pairs = responses_of(one)
        found = self.function(one.example.prompt, texts, one.row)
        return function_odds(found, pairs, len(texts), f"{one.example.uid}: {self.path}")


@dataclass
class JudgeScorer:
    """A language model asked in both orders; its two votes, smoothed by half a vote either way, are the probability."""

    judge: Judge

    @property
    def identity(self) -> dict[str, Any]:
        return {"scorer": "judge", **self.judge.identity}

    def __call__(self, batch: Sequence[Labelled]) -> list[Scores]:
        questions, counts = [], []
        for one in batch:
            texts, pairs = responses_of(one)
            questions += [Question(one.example.prompt, texts[i], texts[j]) for i, j in pairs]
            counts.append(len(pairs))
        verdicts = iter(self.judge(questions))
        found: list[Scores] = []
        for count in counts:
            p = [next(verdicts).p for _ in range(count)]
            # Krichevsky and Trofimov: (wins + 1/2) / (votes + 1), of two votes
            found.append(
                "the judge's answer could not be read" if None in p else log_odds((2 * np.array(p) + 0.5) / 3)
            )
        return found
