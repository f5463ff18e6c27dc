"""Do the labelled responses follow the law of the reference policy? VRPO's correction is mean-zero only if they do.

Labelled responses and fresh samples to the same prompts are compared by their length and by their log-probability under
the reference, with the Kolmogorov-Smirnov distance: both follow from the law, so both must agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from data.schema import Batch, Example, Row
from engine.stats import mean_interval
from preference_datasets import Counts, Tokenization, tokenize
from utils import log, stream, without_nan

DATA, DRAWN = ("chosen", "rejected"), ("aux_1", "aux_2")
LEVEL = 0.001  # of a false warning, per statistic
ROWS = 16  # scored together
ADVICE = (
    "VRPO presumes that the labelled responses are draws from the reference policy. Train the reference on both responses of "
    "every pair (loss=sft loss.sft_on=all, until its loss on held-out prompts is flat), sample with sample.temperature=1 "
    "sample.top_p=1 and the run's own max_length; or lower loss.lam (0 is the plain loss)"
)


def ks_distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest difference of two empirical distribution functions, in [0, 1]; equal values are steps of both."""
    first, second = np.sort(np.asarray(a, np.float64)), np.sort(np.asarray(b, np.float64))
    at = np.concatenate((first, second))
    below = (np.searchsorted(x, at, side="right") / len(x) for x in (first, second))
    return float(np.abs(np.subtract(*below)).max())


def ks_limit(n: int, m: int, level: float = LEVEL) -> float:
    """Distance that independent samples of one law exceed with probability ``level`` at most, asymptotically."""
    return math.sqrt(-math.log(level / 2) / 2 * (n + m) / (n * m))


@dataclass(frozen=True)
class Statistic:
    """One number per response: mean over labelled and drawn responses, KS distance, and its limit."""

    name: str
    data: float
    drawn: float
    distance: float
    limit: float

    @property
    def differs(self) -> bool:
        return self.distance > self.limit


@dataclass(frozen=True)
class Comparison:
    """num_rows rows; gap (nats): mean over rows of log pi_ref(labelled) - log pi_ref(drawn), 0 if they follow one law."""

    num_rows: int
    statistics: tuple[Statistic, ...]
    gap: float
    gap_low: float
    gap_high: float

    @property
    def differs(self) -> bool:
        return any(s.differs for s in self.statistics)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the gap of a single row has no interval, so None."""
        return without_nan({**asdict(self), "differs": self.differs})

    def log(self, split: str) -> None:
        """What was found; a warning that says what to do where the laws differ."""
        for s in self.statistics:
            log.info(
                "%s: %s of labelled responses %.4g, of drawn ones %.4g; KS distance %.3f (limit %.3f, %d rows)",
                split, s.name, s.data, s.drawn, s.distance, s.limit, self.num_rows,
            )  # fmt: skip
        log.info(
            "%s: log pi_ref of labelled minus drawn responses: %.3f [%.3f, %.3f] nats",
            split, self.gap, self.gap_low, self.gap_high,
        )  # fmt: skip
        if self.differs:
            names = " and ".join(s.name for s in self.statistics if s.differs)
            log.warning("%s: labelled and drawn responses differ in %s. %s", split, names, ADVICE)


def compare(
    examples: Sequence[Example],
    tokenizer: Any,
    settings: Tokenization,
    scorer: torch.nn.Module,
    num_rows: int,
) -> Comparison:
    """Score ``num_rows`` rows, drawn at random, of those with auxiliary responses.

    Responses of one prompt are dependent, so the limit of the distance counts rows, not responses.
    """
    with_aux = [e for e in examples if any(role in DRAWN for role, _ in e.responses)]
    chosen = stream(0, "two_sample").permutation(len(with_aux))[:num_rows]
    groups = tuple(dict.fromkeys(e.group for e in with_aux))
    rows = tokenize(
        [with_aux[i] for i in sorted(chosen)],
        tokenizer,
        settings,
        groups=groups,
        roles=DATA + DRAWN,
        optional_roles=DRAWN,
        counts=Counts(),
    )
    table = np.concatenate([_score(rows[i : i + ROWS], scorer, i) for i in range(0, len(rows), ROWS)])
    drawn = table[:, 1] == 1
    limit = ks_limit(len(rows), len(rows))
    statistics = tuple(
        Statistic(
            name,
            float(values[~drawn].mean()),
            float(values[drawn].mean()),
            ks_distance(values[~drawn], values[drawn]),
            limit,
        )
        for name, values in (("tokens", table[:, 2]), ("log pi_ref", table[:, 3]))
    )
    gaps = [
        table[mine & ~drawn, 3].mean() - table[mine & drawn, 3].mean()
        for mine in (table[:, 0] == i for i in range(len(rows)))
    ]
    interval = mean_interval(gaps)
    return Comparison(len(rows), statistics, interval.estimate, interval.low, interval.high)


@torch.no_grad()
def _score(rows: Sequence[Row], scorer: torch.nn.Module, first: int) -> np.ndarray:
    """(S, 4): row, whether drawn, tokens, log pi_ref of every response."""
    scored = scorer(Batch.collate(list(rows)), DATA + DRAWN)
    drawn = np.array([role in DRAWN for role in scored.roles], np.float64)
    parts = (
        scored.example.cpu().numpy() + first,
        drawn,
        scored.num_tokens.cpu().numpy(),
        scored.logps.double().cpu().numpy(),
    )
    return np.stack(parts, axis=1)
