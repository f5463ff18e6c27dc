"""Worlds of language that can be enumerated: all responses, all pairs and all preferences are known, hence all optima.

A prompt is answered with ``length`` letters of ``alphabet``, so there are N = len(alphabet)^length responses. Law of a row:

    prompt     uniform over the X prompts, which all groups share: their interests meet in one policy
    pair       two responses i.i.d. from ``sampler``, drawn again until they differ
    label      the first is preferred with p = (1 - noise) c + noise (1 - c),  c = mean_a sigmoid(r_a(y1) - r_a(y2))

The mean is over the annotators of the row's group. Rewards are log-linear: r_a(x, y) = <theta_a, phi(x, y)> with features of
the prompt, the letter at each position, and each pair of neighbouring letters. One annotator without noise is Bradley-Terry
with the group's reward; a mixture of annotators has in general no reward behind it (a mean of logistic functions is none).

What follows from the law exactly is in data/optima.py. ``mode=exhaustive`` writes the law itself as rows: every (pair, label)
with its probability as weight, so that a full batch is the population problem, without sampling noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.files import TRUNCATIONS, choose, finish_split
from data.schema import Example
from utils import UserError, stream

GROUPS = ("red", "green", "blue")
MOST_RESPONSES = 128
MOST_ROWS = 50_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Size, groups and law; ``data_seed`` alone decides what is drawn. Keys are explained in config/dataset/world_bt.yaml."""

    alphabet: str = "abc"
    length: int = 2
    num_prompts: int = 1
    group_scales: list[float] = field(default_factory=lambda: [1.0])
    group_sizes: list[int] = field(default_factory=lambda: [1])
    conflict: float = 0.0
    annotators: int = 1
    annotator_spread: float = 0.0
    noise: float = 0.0
    sampler_tilt: float = 0.0
    mode: str = "exhaustive"
    num_train: int = 1000
    num_validation: int = 0
    num_aux: int = 0
    aux_sharpness: float = 1.0
    data_seed: int = 0
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        choose("truncation_mode", self.truncation_mode, TRUNCATIONS)
        choose("mode", self.mode, ("exhaustive", "sampled"))
        distinct = len(set(self.alphabet)) == len(self.alphabet) >= 2 and self.alphabet.isalnum()
        _check(distinct, "alphabet", self.alphabet, "two or more different letters or digits")
        _check(self.length >= 1, "length", self.length, "must be at least 1")
        n = len(self.alphabet) ** self.length
        _check(
            n <= MOST_RESPONSES,
            "length",
            self.length,
            f"{n} responses are too many to enumerate; at most {MOST_RESPONSES}",
        )
        _check(1 <= self.num_prompts <= 26, "num_prompts", self.num_prompts, "must be in 1..26")
        scales, sizes = self.group_scales, self.group_sizes
        _check(
            1 <= len(scales) <= len(GROUPS) and min(scales) > 0,
            "group_scales",
            scales,
            f"1 to {len(GROUPS)} positive numbers, one a group",
        )
        _check(
            len(sizes) == len(scales) and min(sizes) >= 1,
            "group_sizes",
            sizes,
            f"{len(scales)} whole numbers >= 1, one a group as in group_scales",
        )
        _check(0 <= self.conflict <= 1, "conflict", self.conflict, "must be in [0, 1]")
        _check(self.annotators >= 1, "annotators", self.annotators, "must be at least 1")
        _check(self.annotator_spread >= 0, "annotator_spread", self.annotator_spread, "must be >= 0")
        _check(0 <= self.noise < 0.5, "noise", self.noise, "must be in [0, 0.5), the share of flipped labels")
        _check(self.num_train >= 1, "num_train", self.num_train, "must be at least 1")
        _check(self.num_validation >= 0, "num_validation", self.num_validation, "must be >= 0")
        _check(self.num_aux >= 0, "num_aux", self.num_aux, "must be >= 0")
        aux = self.num_aux if self.mode == "exhaustive" else 0  # the test split is exhaustive without them
        _check(aux <= 1, "num_aux", self.num_aux, "mode=exhaustive pairs every row with one; 0 or 1")
        rows = sum(sizes) * self.num_prompts * 2 * (n * (n - 1) // 2) ** (1 + aux)
        _check(
            rows <= MOST_ROWS,
            "length",
            self.length,
            f"{rows} rows in the exhaustive split are too many; shorten length, alphabet or group_sizes",
        )


def _check(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise UserError(f"data.<name>.{key}={value}: {rule}")


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(x / 2))


# ---------------------------------------------------------------------------------------------- the law


@dataclass(frozen=True)
class World:
    """G groups, A annotators each, X prompts, N responses.

    prompts, responses, groups   names; texts of prompts and responses
    sizes       (G,) share of each group, sums to one
    annotators  (G, A, X, N) rewards, in log-odds
    sampler     (X, N) law of one response as drawn
    noise       share of flipped labels
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    groups: tuple[str, ...]
    sizes: np.ndarray
    annotators: np.ndarray
    sampler: np.ndarray
    noise: float = 0.0

    @cached_property
    def rewards(self) -> np.ndarray:
        """(G, X, N) the group's reward: the mean of its annotators'."""
        return self.annotators.mean(1)

    @cached_property
    def preference(self) -> np.ndarray:
        """(G, X, N, N) probability that the first response is preferred, noise included; 1/2 on the diagonal."""
        r = self.annotators
        clean = sigmoid(r[..., :, None] - r[..., None, :]).mean(1)
        return (1 - self.noise) * clean + self.noise * (1 - clean)

    @cached_property
    def pair_law(self) -> np.ndarray:
        """(X, N, N) probability of prompt and ordered pair; the same in every group; sums to one."""
        joint = self.sampler[:, :, None] * self.sampler[:, None, :]
        joint = joint * (1 - np.eye(len(self.responses)))
        return joint / joint.sum((1, 2), keepdims=True) / len(self.prompts)


def make_world(settings: Settings) -> World:
    """The world of these settings: a pure function of them."""
    letters, length, x = settings.alphabet, settings.length, settings.num_prompts
    responses = tuple("".join(word) for word in itertools.product(letters, repeat=length))
    phi = _features(letters, responses)

    def rewards(*keys: str | int) -> np.ndarray:
        """(X, N) log-linear rewards of mean 0 and standard deviation 1 over the responses of each prompt."""
        r = stream(settings.data_seed, "worlds", *keys).standard_normal((x, phi.shape[1])) @ phi.T
        r = r - r.mean(1, keepdims=True)
        return r / r.std(1, keepdims=True)

    common, c = rewards("common"), settings.conflict
    annotators = []
    for group, scale in zip(GROUPS, settings.group_scales, strict=False):
        own = scale * ((1 - c) * common + c * rewards("group", group))
        spread = np.stack([rewards("annotator", group, a) for a in range(settings.annotators)])
        spread = spread - spread.mean(0)  # the group's reward does not depend on its annotators
        annotators.append(own + settings.annotator_spread * spread)
    tilt = np.exp(settings.sampler_tilt * rewards("sampler"))
    return World(
        prompts=tuple(f"{chr(ord('A') + k)}:" for k in range(x)),
        responses=responses,
        groups=GROUPS[: len(annotators)],
        sizes=np.array(settings.group_sizes) / sum(settings.group_sizes),
        annotators=np.stack(annotators),
        sampler=tilt / tilt.sum(1, keepdims=True),
        noise=settings.noise,
    )


def _features(letters: str, responses: tuple[str, ...]) -> np.ndarray:
    """(N, F) indicators: the letter at each position, and each pair of neighbouring letters."""
    places = [(t, a) for t in range(len(responses[0])) for a in letters]
    bigrams = [(t, a + b) for t in range(len(responses[0]) - 1) for a in letters for b in letters]
    return np.array([[float(word[t : t + len(s)] == s) for t, s in places + bigrams] for word in responses])


# ---------------------------------------------------------------------------------------------- the data


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """train: as ``mode`` says; validation: sampled, if it has rows; test: always the exhaustive law, without auxiliary pairs.

    Splits share their prompts on purpose: a world is a table, and what is learned of a prompt is told of that prompt.
    """
    world = make_world(settings)
    if settings.mode == "exhaustive":
        splits = {"train": list(exhaustive(world, settings, settings.num_aux))}
    else:
        splits = {"train": list(sampled(world, settings, "train", settings.num_train))}
    if settings.num_validation:
        splits["validation"] = list(sampled(world, settings, "validation", settings.num_validation))
    splits["test"] = list(exhaustive(world, settings, 0))
    return {split: finish_split(name, split, examples) for split, examples in splits.items()}


def exhaustive(world: World, settings: Settings, num_aux: int) -> Iterator[Example]:
    """Every (group, prompt, unordered pair, label), and auxiliary pair if there is one; weights average one in every group.

    The rows of a group are repeated ``group_sizes`` times, so that counts of rows are in the ratio of the groups.
    """
    n = len(world.responses)
    pairs = list(itertools.combinations(range(n), 2))
    count = len(world.prompts) * len(pairs) ** (1 + num_aux) * 2  # rows of one copy of a group
    for g, copies in enumerate(settings.group_sizes):
        for copy, x in itertools.product(range(copies), range(len(world.prompts))):
            law = 2 * world.pair_law[x]  # of unordered pairs
            for i, j in pairs:
                for aux in pairs if num_aux else [None]:
                    share = count * law[i, j] * (law[aux] / law[np.triu_indices(n, 1)].sum() if aux else 1.0)
                    for first, second in ((i, j), (j, i)):
                        weight = share * world.preference[g, x, first, second]
                        tag = f"{copy}.{x}.{first}.{second}" + (f".{aux[0]}.{aux[1]}" if aux else "")
                        yield row(
                            world,
                            settings,
                            f"{world.groups[g]}.{tag}",
                            (g, x, first, second),
                            [aux] if aux else [],
                            weight,
                        )


def sampled(world: World, settings: Settings, split: str, num: int) -> Iterator[Example]:
    """``num`` rows i.i.d. from the law, in the order drawn."""
    rng = stream(settings.data_seed, "worlds", split)
    n, x_count = len(world.responses), len(world.prompts)

    def pair(x: int) -> tuple[int, int]:
        first, second = divmod(int(rng.choice(n * n, p=world.pair_law[x].ravel() * x_count)), n)
        return first, second

    for k in range(num):
        g, x = int(rng.choice(len(world.groups), p=world.sizes)), int(rng.integers(x_count))
        first, second = pair(x)
        if rng.random() >= world.preference[g, x, first, second]:
            first, second = second, first
        yield row(
            world, settings, str(k), (g, x, first, second), [pair(x) for _ in range(settings.num_aux)], 1.0
        )


def row(
    world: World,
    settings: Settings,
    uid: str,
    cell: tuple[int, int, int, int],
    aux: list[tuple[int, int]],
    weight: float,
) -> Example:
    """``cell`` is (group, prompt, chosen, rejected). Auxiliary preferences are the group's own, their log-odds multiplied by
    ``aux_sharpness``: 1 exact, 0 ignorant, -1 always wrong."""
    g, x, chosen, rejected = cell
    p = world.preference[g, x]

    def told(first: int, second: int) -> float:
        odds = np.log(p[first, second]) - np.log(p[second, first])
        return float(sigmoid(settings.aux_sharpness * odds))

    responses = [("chosen", world.responses[chosen]), ("rejected", world.responses[rejected])]
    values = [np.nan, np.nan]
    for first, second in aux:
        responses += [("aux_1", world.responses[first]), ("aux_2", world.responses[second])]
        values += [told(first, second), np.nan]
    return Example(
        uid=uid,
        prompt=world.prompts[x],
        responses=tuple(responses),
        group=world.groups[g],
        weight=float(weight),
        scalars={"chosen_preference": told(chosen, rejected)} if aux else {},
        response_scalars={"aux_preference": tuple(values)} if aux else {},
        meta={"p_star": float(p[chosen, rejected])},
    )
