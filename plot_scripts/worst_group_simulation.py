"""How well the interval for the worst group's accuracy covers, beside the naive one. CSV and figure."""

from __future__ import annotations

import numpy as np

from engine.stats import wilson_bounds, worst_group_bounds
from utils import stream

# name: (accuracy of each group, examples of each group)
DESIGNS = {
    "tied": ((0.70,) * 5, (60,) * 5),
    "separated": ((0.55, 0.70, 0.75, 0.80, 0.85), (60,) * 5),
    "one small group": ((0.70, 0.70, 0.72, 0.75, 0.65), (200, 200, 200, 200, 25)),
}


def simulate(draws: int = 4000, seed: int = 0, level: float = 0.95) -> list[dict]:
    rows = []
    for design, (shares, sizes) in DESIGNS.items():
        truth, n = np.asarray(shares), np.asarray(sizes)
        successes = stream(seed, "simulation/worst_group", design).binomial(n, truth, size=(draws, len(n)))
        low, high = worst_group_bounds(successes, n, level)
        observed = successes / n
        worst = observed.argmin(axis=1)[:, None]
        naive_low, naive_high = (
            np.take_along_axis(b, worst, 1)[:, 0] for b in wilson_bounds(successes, n, level)
        )
        target = truth.min()
        rows.append(
            {
                "design": design,
                "groups": len(n),
                "draws": draws,
                "coverage": float(((low <= target) & (target <= high)).mean()),
                "naive_coverage": float(((naive_low <= target) & (target <= naive_high)).mean()),
                "width": float((high - low).mean()),
                "naive_width": float((naive_high - naive_low).mean()),
                "bias": float(observed.min(axis=1).mean() - target),
            }
        )
    return rows
