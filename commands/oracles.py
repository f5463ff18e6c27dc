"""Preference functions of data whose law is known, for ``annotate.scorer=function``."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from data import opinions as law
from utils import UserError


@functools.cache
def _cells() -> dict[str, tuple[str, str, str]]:
    """prompt -> (group, topic, wording), all of them."""
    cells = itertools.product(law.GROUPS, law.TOPICS, law.WORDINGS)
    waves = list(itertools.product(law.MONTHS, law.YEARS))
    return {law.prompt_of(*cell, *wave): cell for cell in cells for wave in waves}


def opinions(prompt: str, responses: Sequence[str], row: object = None) -> np.ndarray:
    """(n, n) probability that response i is preferred to response j under the law of the built-in data, label noise
    (``data.opinions.NOISE``) included. Text that is no answer loses against every answer, but for the noise."""
    if prompt not in _cells():
        raise UserError(f"commands.oracles:opinions: not a prompt of the built-in data: {prompt[:60]!r}")
    answers = [law.LETTERS.index(text) if text in law.LETTERS else None for text in responses]
    n = len(answers)
    p = np.full((n, n), 0.5)
    for i, j in itertools.product(range(n), repeat=2):
        if answers[i] is not None and answers[j] is not None:
            p[i, j] = law.preference_probability(*_cells()[prompt], answers[i], answers[j])
        elif (answers[i] is None) != (answers[j] is None):
            p[i, j] = law.NOISE if answers[i] is None else 1.0 - law.NOISE
    return p
