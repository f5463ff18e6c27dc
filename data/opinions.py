"""The built-in data: generated survey opinions with planted groups, whose law is known.

A prompt names a survey wave (which means nothing), a group, a topic and a wording, and lists five ordinal answers from
strong agreement to strong disagreement:

    May 21, north: wages shall rise.
    A ++ B + C 0 D - E --

Law of a pair for (group, topic, wording):
    answers     y1, y2 i.i.d. from ``response_law``; with ``distinct_pairs`` both are drawn again until they differ, so
                that P(y1, y2) = law(y1) law(y2) / (1 - sum of law^2) for y1 != y2 and each answer alone has
                ``marginal_law``. Without it, equal pairs stay (preferred with probability 1/2).
    label       y1 is preferred with probability ``preference_probability`` (noise included).

The preferences are a mixture of logistic ones around an ideal answer, which the groups place differently: every group
but the largest disagrees with the majority on some topics, the smallest on all. The error that nobody can avoid is
about the same in all groups, so that a group which a model serves worse is one it has not learned. Two parts of the law are of
no Bradley-Terry form: on the topic CYCLIC_TOPIC a cyclic term dominates, so that no ranking of the answers agrees with
all preferences, and MIXED (a group and a topic) is two camps with opposite ideals.

With ``group_in_prompt=false`` the prompt does not say whose opinion is asked ("May 21: wages shall rise."), so that one
policy has to answer for all groups and what it gives to one it takes from another. ``law_table`` is then the whole
problem, and data/optima.py solves it: the best average and the best worst group are different policies.

Every month and every year of the waves is in every split, but each combination is in one split only: held-out prompts
are new, and predictable.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data.files import TRUNCATIONS, choose, finish_split
from data.schema import Example
from data.split import SPLITS
from utils import UserError, stream

GROUPS = ("north", "south", "coast", "hills", "plain")
TOPICS = ("taxes", "rents", "wages", "loans")
WORDINGS = ("shall", "might")
ANSWERS = ("++", "+", "0", "-", "--")
LETTERS = ("A", "B", "C", "D", "E")
MONTHS = ("Jan", "May", "Aug", "Oct")
YEARS = ("20", "21", "22", "23")

# the majority's ideal answer (0 agrees strongly .. 4 disagrees strongly) to "<topic> shall rise" and ".. might rise"
MAJORITY = {
    "taxes": {"shall": 4, "might": 3},
    "rents": {"shall": 4, "might": 4},
    "wages": {"shall": 0, "might": 1},
    "loans": {"shall": 1, "might": 0},
}
# the topics on which a group's ideal is the opposite of the majority's
DISSENT = {
    "north": (),
    "south": ("wages",),
    "coast": ("taxes",),
    "hills": ("taxes", "wages"),
    "plain": ("taxes", "rents", "wages", "loans"),
}
# how much a step away from the ideal costs, in log-odds
SHARPNESS = {"north": 3.0, "south": 2.2, "coast": 2.2, "hills": 2.2, "plain": 2.2}
CYCLIC_TOPIC = "loans"
CYCLIC_SHARPNESS = 0.2  # opinions on the cyclic topic are weak ...
CYCLE = 1.0  # ... so that this term, in log-odds, decides between near answers
MIXED = ("north", "rents")
MIXED_MAJORITY = 0.85  # share of the camp with the group's own ideal
ANCHORING = 0.25  # how strongly answers gather around the majority's ideal, in log-odds a step
NOISE = 0.03


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes, group shares and noise of the generated data; ``data_seed`` alone decides what is drawn."""

    num_train: int = 4000
    num_validation: int = 500
    num_test: int = 1000
    group_sizes: list[float] = field(default_factory=lambda: [0.45, 0.25, 0.15, 0.10, 0.05])
    balance_evaluation: bool = True
    group_in_prompt: bool = True
    noise: float = NOISE
    distinct_pairs: bool = True
    data_seed: int = 0
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        choose("truncation_mode", self.truncation_mode, TRUNCATIONS)
        for key, value in (("num_train", self.num_train), ("num_test", self.num_test)):
            if value < len(self.group_sizes):
                raise UserError(
                    f"data.<name>.{key}={value}: must be at least {len(self.group_sizes)}, one a group"
                )
        if self.num_validation != 0 and self.num_validation < len(self.group_sizes):
            raise UserError(
                f"data.<name>.num_validation={self.num_validation}: must be 0 or at least one a group"
            )
        sizes = self.group_sizes
        if not 1 <= len(sizes) <= len(GROUPS) or min(sizes) <= 0 or abs(sum(sizes) - 1.0) > 1e-6:
            raise UserError(
                f"data.<name>.group_sizes={sizes}: 1 to {len(GROUPS)} positive shares whose sum is 1; "
                "try [0.45, 0.25, 0.15, 0.10, 0.05]"
            )
        if not 0.0 <= self.noise <= 0.5:
            raise UserError(
                f"data.<name>.noise={self.noise}: must be in [0, 0.5], the share of flipped labels"
            )


# ---------------------------------------------------------------------------------------------- the law


def ideal(group: str, topic: str, wording: str) -> int:
    """The group's ideal answer, 0 (agrees strongly) to 4 (disagrees strongly)."""
    majority = MAJORITY[topic][wording]
    return len(ANSWERS) - 1 - majority if topic in DISSENT[group] else majority


def response_law(group: str, topic: str, wording: str) -> np.ndarray:
    """(5,) probabilities of one answer as drawn, before equal pairs are drawn again.

    Answers gather around the majority's ideal, in every group: the crowd drafts them, the group judges them.
    """
    distance = np.abs(np.arange(len(ANSWERS)) - MAJORITY[topic][wording])
    weights = np.exp(-ANCHORING * distance)
    return weights / weights.sum()


def pair_law(group: str, topic: str, wording: str, distinct: bool = True) -> np.ndarray:
    """(5, 5) probabilities of the ordered pair (first, second) of answers."""
    law = response_law(group, topic, wording)
    joint = np.outer(law, law)
    if distinct:
        np.fill_diagonal(joint, 0.0)
    return joint / joint.sum()


def marginal_law(group: str, topic: str, wording: str, distinct: bool = True) -> np.ndarray:
    """(5,) probabilities of one answer of a pair: what a model trained on all answers learns."""
    return pair_law(group, topic, wording, distinct).sum(axis=1)


def preference_probability(
    group: str, topic: str, wording: str, first: int, second: int, noise: float = NOISE
) -> float:
    """P(answer ``first`` is preferred to answer ``second``), label noise included; answers are 0 to 4."""
    if first == second:
        return 0.5
    centre, last = ideal(group, topic, wording), len(ANSWERS) - 1
    sharpness = CYCLIC_SHARPNESS if topic == CYCLIC_TOPIC else SHARPNESS[group]
    clean = _logistic(
        sharpness * (abs(second - centre) - abs(first - centre)) + _cyclic(topic, first, second)
    )
    if (group, topic) == MIXED:
        opposite = _logistic(sharpness * (abs(second - (last - centre)) - abs(first - (last - centre))))
        clean = MIXED_MAJORITY * clean + (1.0 - MIXED_MAJORITY) * opposite
    return (1.0 - noise) * clean + noise * (1.0 - clean)


def _cyclic(topic: str, first: int, second: int) -> float:
    """Antisymmetric: on the cyclic topic every answer beats the next two, counted in a circle of five."""
    if topic != CYCLIC_TOPIC:
        return 0.0
    return CYCLE if (second - first) % len(ANSWERS) in (1, 2) else -CYCLE


def _logistic(x: float) -> float:
    return float(1.0 / (1.0 + np.exp(-x)))


@dataclass(frozen=True)
class LawTable:
    """What data/optima.py reads of a world: G groups that answer the same X cells (topic, wording) with N = 5 answers.

    sizes (G,) shares of the training pairs · sampler (X, N) law of one answer as drawn · pair_law (X, N, N) probability of
    cell and ordered pair, sums to one · preference (G, X, N, N) probability that the first is preferred
    """

    groups: tuple[str, ...]
    sizes: np.ndarray
    sampler: np.ndarray
    pair_law: np.ndarray
    preference: np.ndarray


def law_table(groups: Sequence[str], settings: Settings) -> LawTable:
    """The population problem of these groups where one policy answers for all of them: ``group_in_prompt=false``, or one group.

    Waves mean nothing and are left out. The answers' law is the same in every group (``response_law``).
    """
    cells = list(itertools.product(TOPICS, WORDINGS))
    n = range(len(ANSWERS))
    shares = np.array([settings.group_sizes[GROUPS.index(group)] for group in groups])
    return LawTable(
        tuple(groups),
        shares / shares.sum(),
        np.stack([response_law(groups[0], *cell) for cell in cells]),
        np.stack([pair_law(groups[0], *cell, settings.distinct_pairs) for cell in cells]) / len(cells),
        np.array(
            [
                [
                    [[preference_probability(g, *cell, i, j, settings.noise) for j in n] for i in n]
                    for cell in cells
                ]
                for g in groups
            ]
        ),
    )


# ---------------------------------------------------------------------------------------------- what can be reached


def bayes_accuracy(examples: Sequence[Example]) -> float:
    """Expected accuracy, on these pairs of answers, of the rule that knows the law: mean of max(p, 1 - p)."""
    p = np.array([float(example.meta["p_star"]) for example in examples])
    return float(np.maximum(p, 1.0 - p).mean())


def law_accuracy(group: str, topic: str, wording: str, noise: float = NOISE, ranking: bool = False) -> float:
    """The same from the law itself, for distinct pairs of one (group, topic, wording).

    ranking: the best that a fixed ranking of the answers reaches, i.e. any model that gives each answer a score (the
    implicit rewards of DPO); less than the Bayes accuracy where preferences are cyclic.
    """
    joint = pair_law(group, topic, wording)
    n = len(ANSWERS)
    p = np.array(
        [[preference_probability(group, topic, wording, i, j, noise) for j in range(n)] for i in range(n)]
    )
    if not ranking:
        return float((joint * np.maximum(p, 1.0 - p)).sum())
    orders = (np.argsort(order) for order in itertools.permutations(range(n)))
    return max(float((joint * np.where(rank[:, None] < rank[None, :], p, 1.0 - p)).sum()) for rank in orders)


# ---------------------------------------------------------------------------------------------- the data


def prompt_of(group: str | None, topic: str, wording: str, month: str, year: str) -> str:
    """The prompt of one cell in one survey wave, ASCII: 55 bytes, or 48 with group None, which is not told."""
    listed = " ".join(f"{letter} {answer}" for letter, answer in zip(LETTERS, ANSWERS, strict=True))
    asked = "" if group is None else f", {group}"
    return f"{month} {year}{asked}: {topic} {wording} rise.\n{listed}\n"


def waves(split: str) -> list[tuple[str, str]]:
    """The (month, year) of a split: a Latin square gives each split every month and every year."""
    of = {0: "test", 1: "validation", 2: "train", 3: "train"}
    cells = itertools.product(enumerate(MONTHS), enumerate(YEARS))
    return [(month, year) for (i, month), (j, year) in cells if of[(i + j) % len(YEARS)] == split]


def group_counts(num_examples: int, sizes: Sequence[float]) -> list[int]:
    """``num_examples`` shared out by ``sizes`` (largest remainders), at least one each."""
    exact = np.array(sizes) * num_examples
    counts = np.maximum(np.floor(exact).astype(int), 1)
    for k in np.argsort(-(exact - np.floor(exact)), kind="stable")[: max(num_examples - counts.sum(), 0)]:
        counts[k] += 1
    counts[0] -= counts.sum() - num_examples  # only where shares below one example were rounded up
    return [int(count) for count in counts]


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """The generated pairs by split; a pure function of the settings (not of the run's ``seed``)."""
    sizes = settings.group_sizes
    even = [1.0 / len(sizes)] * len(sizes)
    numbers = {"train": settings.num_train, "validation": settings.num_validation, "test": settings.num_test}
    splits = {}
    for split in SPLITS:
        if numbers[split]:
            shares = even if settings.balance_evaluation and split != "train" else sizes
            splits[split] = finish_split(
                name, split, generate(split, group_counts(numbers[split], shares), settings)
            )
    return splits


def generate(split: str, counts: Sequence[int], settings: Settings) -> list[Example]:
    """Pairs of one split, ``counts[g]`` of group g in random order; topic, wording and wave uniform."""
    rng = stream(settings.data_seed, "opinions", split)
    cells = list(itertools.product(TOPICS, WORDINGS, waves(split)))
    groups = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    drawn = rng.integers(len(cells), size=len(groups))
    return [
        draw(str(i), GROUPS[g], *cells[c], settings, rng)
        for i, (g, c) in enumerate(zip(groups, drawn, strict=True))
    ]


def draw(
    uid: str,
    group: str,
    topic: str,
    wording: str,
    wave: tuple[str, str],
    settings: Settings,
    rng: np.random.Generator,
) -> Example:
    """One pair: the answers from ``pair_law``, the label from ``preference_probability``."""
    joint = pair_law(group, topic, wording, settings.distinct_pairs)
    first, second = divmod(int(rng.choice(joint.size, p=joint.ravel())), len(ANSWERS))
    p_first = preference_probability(group, topic, wording, first, second, settings.noise)
    chosen, rejected, p_star = first, second, p_first
    if rng.random() >= p_first:
        chosen, rejected, p_star = second, first, 1.0 - p_first
    return Example(
        uid=uid,
        prompt=prompt_of(group if settings.group_in_prompt else None, topic, wording, *wave),
        responses=(("chosen", LETTERS[chosen]), ("rejected", LETTERS[rejected])),
        group=group,
        meta={"p_star": p_star, "topic": topic, "wording": wording, "group": group},
    )
