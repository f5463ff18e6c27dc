"""Are predicted preferences right as often as they say? Temperature by maximum likelihood, and the curve that shows it.

A labelled pair is a prediction sigmoid(log-odds / T) that its first response is preferred, with the outcome 1 (or the soft
label ``p_chosen``). For the curve every pair is turned by a coin, or all outcomes would be 1; likelihoods do not change.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar

from engine.stats import Interval, cluster_mean, share_interval
from utils import content_hash, log, stream, without_nan

LARGEST = 1000.0  # temperatures are sought in [1 / LARGEST, LARGEST]
BINS = 10
FOLDS = 2


@dataclass(frozen=True)
class Pairs:
    """Labelled pairs: log-odds (N,), outcome (N,) of "the first is preferred", prompt (N,) and uid (N,) names."""

    odds: np.ndarray
    outcome: np.ndarray
    prompt: tuple[str, ...]
    uid: tuple[str, ...]

    def part(self, where: np.ndarray) -> Pairs:
        index = np.flatnonzero(where)
        return Pairs(
            self.odds[index],
            self.outcome[index],
            tuple(self.prompt[i] for i in index),
            tuple(self.uid[i] for i in index),
        )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(x / 2))


def nll(odds: np.ndarray, outcome: np.ndarray) -> np.ndarray:
    """(N,) negative log-likelihood in nats."""
    return outcome * np.logaddexp(0, -odds) + (1 - outcome) * np.logaddexp(0, odds)


def fit_temperature(pairs: Pairs) -> float:
    """T that maximises the likelihood of the outcomes; convex in 1 / T. At its bounds: no signal, or no mistake."""
    found = minimize_scalar(
        lambda a: float(nll(math.exp(a) * pairs.odds, pairs.outcome).mean()),
        bounds=(-math.log(LARGEST), math.log(LARGEST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return math.exp(-found.x)


def cross_fitted(pairs: Pairs) -> np.ndarray:
    """(N,) log-odds, each divided by the temperature fitted on the other half of the prompts."""
    names = sorted(set(pairs.prompt))
    order = stream(0, "calibration folds").permutation(len(names))
    fold_of = {names[i]: k % FOLDS for k, i in enumerate(order)}
    fold = np.array([fold_of[p] for p in pairs.prompt])
    odds = np.empty_like(pairs.odds)
    for k in range(FOLDS):
        others = pairs.part(fold != k)
        odds[fold == k] = pairs.odds[fold == k] / (fit_temperature(others) if len(others.odds) else 1.0)
    return odds


@dataclass(frozen=True)
class Curve:
    """bins: dicts with low, high, n, predicted, observed and its 95 % interval; the rest are means with their n."""

    n: int
    num_prompts: int
    log_loss: float
    brier: float
    brier_low: float
    brier_high: float
    accuracy: float
    expected_calibration_error: float
    bins: list[dict[str, float | int]]


def curve(odds: np.ndarray, outcome: np.ndarray, prompt: Sequence[str]) -> Curve:
    """Reliability in ten equally wide bins; the pairs are turned already. Ties count 1/2 in the accuracy."""
    p, names = sigmoid(odds), np.array(prompt)
    index = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = []
    for b in range(BINS):
        mine = index == b
        n = int(mine.sum())
        if n:
            observed = share_interval(outcome[mine], names[mine])
            bins.append(
                {
                    "low": b / BINS,
                    "high": (b + 1) / BINS,
                    "n": n,
                    "predicted": float(p[mine].mean()),
                    "observed": observed.estimate,
                    "observed_low": observed.low,
                    "observed_high": observed.high,
                }
            )
    right = np.where(odds == 0, 0.5, np.where(odds > 0, outcome, 1 - outcome))
    brier: Interval = cluster_mean((p - outcome) ** 2, names)
    error = sum(b["n"] * abs(b["predicted"] - b["observed"]) for b in bins) / len(p)
    return Curve(
        n=len(p),
        num_prompts=len(set(prompt)),
        log_loss=float(nll(odds, outcome).mean()),
        brier=brier.estimate,
        brier_low=brier.low,
        brier_high=brier.high,
        accuracy=float(right.mean()),
        expected_calibration_error=error,
        bins=bins,
    )


def turned(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """(N,) signs and outcomes of the pairs, each turned or not by a coin of its own."""
    sign = np.array([1 if stream(0, "calibration turn", uid).random() < 0.5 else -1 for uid in pairs.uid])
    return sign, np.where(sign > 0, pairs.outcome, 1 - pairs.outcome)


@dataclass(frozen=True)
class Calibration:
    """temperature, fitted on all pairs; raw: the scorer's own curve; calibrated: with temperatures of the other half."""

    split: str
    temperature: float
    raw: Curve
    calibrated: Curve

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; numbers that are not defined (an interval of one prompt) are None."""
        return without_nan(asdict(self))

    def log(self) -> None:
        """The numbers, and a warning where the scorer knows nothing about the labels."""
        for name, c in (("raw", self.raw), ("calibrated", self.calibrated)):
            log.info(
                "%s, %s: log loss %.4f (0.6931 is a coin), Brier %.4f [%.4f, %.4f], accuracy %.3f, ECE %.3f, %d pairs",
                self.split, name, c.log_loss, c.brier, c.brier_low, c.brier_high, c.accuracy,
                c.expected_calibration_error, c.n,
            )  # fmt: skip
        log.info("temperature %.4g", self.temperature)
        if self.calibrated.log_loss >= math.log(2) or self.temperature > 0.99 * LARGEST:
            log.warning(
                "%s: these preferences predict labels no better than a coin (log loss %.4f with the temperature of other "
                "prompts): a correction by them adds variance; train the scorer longer, or use another",
                self.split,
                self.calibrated.log_loss,
            )
        elif self.temperature < 1.01 / LARGEST:
            log.warning("the scorer makes no mistake on %s: too few pairs to calibrate on", self.split)


def calibrate(pairs: Pairs, split: str, folder: Path) -> Calibration:
    """Fit, and write ``folder/calibration.csv``: one row per pair and method, as the figure ``calibration`` reads it."""
    sign, outcome = turned(pairs)
    odds = {"raw": pairs.odds * sign, "calibrated": cross_fitted(pairs) * sign}
    with (folder / "calibration.csv").open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(("method", "p", "y", "uid", "prompt"))
        prompts = [content_hash(prompt)[:16] for prompt in pairs.prompt]
        for name, values in odds.items():
            writer.writerows(
                zip([name] * len(values), sigmoid(values), outcome, pairs.uid, prompts, strict=True)
            )
    raw, fitted = (curve(values, outcome, pairs.prompt) for values in odds.values())
    return Calibration(split, fit_temperature(pairs), raw, fitted)
