"""Small facts about responses that several sources need: where a shared prompt ends, which pairs scores make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def shared_length(texts: Sequence[str]) -> int:
    """Length of the longest prefix that all texts share."""
    first, last = min(texts), max(texts)  # what the extremes of the sort order share, all share
    length = min(len(first), len(last))
    return next((i for i in range(length) if first[i] != last[i]), length)


def shared_end(texts: Sequence[str], marker: str) -> int | None:
    """Length of the longest prefix that all texts share and that ends in ``marker``; None if there is none."""
    at = texts[0].rfind(marker, 0, shared_length(texts))
    return at + len(marker) if at >= 0 else None


def ranked_pairs(scores: Sequence[float], ties: str = "skip") -> list[tuple[int, int]]:
    """(winner, loser) for every two items of different score, the pairs that the best item wins last.

    ties: what two items of equal score give: "skip" (no pair) or "later_wins".
    """
    pairs = []
    for i, j in itertools.combinations(range(len(scores)), 2):
        if scores[i] != scores[j] or ties == "later_wins":
            pairs.append((i, j) if scores[i] > scores[j] else (j, i))
    return sorted(pairs, key=lambda pair: scores[pair[0]])
