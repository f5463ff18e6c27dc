"""Group-robust weights again, with plain products on Python floats: Ramesh et al. 2024 Algorithm 1 and its reference code."""

from __future__ import annotations

import math


def ascend(alpha: list[float], group_losses: list[float], eta: float) -> list[float]:
    """alpha_g exp(eta L_g), renormalised."""
    raised = [a * math.exp(eta * loss) for a, loss in zip(alpha, group_losses, strict=True)]
    return [r / sum(raised) for r in raised]


def unbiased_group_losses(losses: list[float], groups: list[int], probs: list[float]) -> list[float]:
    """L_g = (1/B) (1/p_g) sum of the losses of g's members."""
    totals = [0.0] * len(probs)
    for loss, g in zip(losses, groups, strict=True):
        totals[g] += loss / probs[g] / len(losses)
    return totals


def reference_step(
    alpha: list[float], micro_batches: list[tuple[list[float], list[int]]], counts: list[int], eta: float
) -> list[float]:
    """One optimizer step of the reference code's rule: after every micro-batch, alpha_g <- alpha_g exp(eta (N/N_g) sum
    of g's losses in the micro-batch), renormalised."""
    total = sum(counts)
    for losses, groups in micro_batches:
        group_losses = [0.0] * len(counts)
        for loss, g in zip(losses, groups, strict=True):
            group_losses[g] += total / counts[g] * loss
        alpha = ascend(alpha, group_losses, eta)
    return alpha


def quadratic_saddle(centre: float, offset: float) -> tuple[float, list[float]]:
    """min_theta max_alpha alpha_1 (theta - centre)^2 + alpha_2 ((theta + centre)^2 + offset) for |offset| < 4 centre^2.

    At an interior saddle the two losses agree: (t-c)^2 = (t+c)^2 + o, so t = -o/(4c); and the theta-gradient
    alpha_1 (t-c) + alpha_2 (t+c) = 0 gives alpha_1 = (t+c)/(2c).
    """
    theta = -offset / (4 * centre)
    first = (theta + centre) / (2 * centre)
    return theta, [first, 1 - first]
