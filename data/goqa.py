"""GlobalOpinionQA (Durmus et al. 2023, arXiv 2306.16388): survey answers by country, as in group-robust preference
optimisation (Ramesh et al. 2024, arXiv 2405.20304, section 5).

``goqa_<i>`` is country i of COUNTRIES (group: the name); ``goqa`` is all of ``countries`` (group: the country).
goqma is the same with several pairs a question. Rows: question, selections, options (the last two as text).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.files import Reader, ReadSettings, choose, finish_split
from data.jsonl import RawRow, field_of
from data.names import parse_name
from data.schema import Example
from data.split import SPLITS, check_fractions, position
from data.survey import (
    LETTERS,
    best_of,
    best_random,
    check_frequencies,
    lettered,
    literal,
    option_texts,
    ranked,
)
from utils import UserError, did_you_mean, log, stream

COUNTRIES = (
    "Nigeria",
    "Egypt",
    "India (Current national sample)",
    "China",
    "Japan",
    "Germany",
    "France",
    "Spain",
    "United States",
    "Canada",
    "Brazil",
    "Argentina",
    "Australia",
    "New Zealand",
)
NUM_FOLDS = 5
REFERENCE_STATE = 42  # the state with which the reference code splits rows


@dataclass(frozen=True, kw_only=True)
class Settings(ReadSettings):
    """split_by: "question" puts a question into one split for all countries; "row" splits each country's rows on its
    own, as the reference code does (the same question may be trained on for one country and tested for another).
    """

    hub: str | None = "Anthropic/llm_global_opinions"
    countries: list[str] = field(default_factory=list)
    mode: str = "best_random"
    max_pairs: int = 4
    train_frac: float = 0.8
    test_fraction: float = 0.1
    validation_fraction: float = 0.1
    split_by: str = "question"
    split_seed: int = 0
    kfold: int | None = None
    pair_seed: int = 0
    drop_options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        choose("mode", self.mode, ("best_random", "ranked"))
        choose("split_by", self.split_by, ("question", "row"))
        keys = ("data.<name>.test_fraction", "data.<name>.validation_fraction")
        if problem := check_fractions(self.test_fraction, self.validation_fraction, keys):
            raise UserError(problem)
        if not 0.0 < self.train_frac <= self.train_room + 1e-9:
            raise UserError(
                f"data.<name>.train_frac={self.train_frac}: must be in (0, {self.train_room:g}], what testing and "
                "validation leave"
            )
        if self.kfold is not None and not 0 <= self.kfold < NUM_FOLDS:
            raise UserError(
                f"data.<name>.kfold={self.kfold}: must be 0 to {NUM_FOLDS - 1}, or null for no folds"
            )
        if self.split_by == "row" and self.split_seed:
            raise UserError(
                f"data.<name>.split_seed={self.split_seed}: not read with split_by=row, which splits as the reference code does; "
                "leave it away, or set split_by=question"
            )
        if self.max_pairs < 1:
            raise UserError(f"data.<name>.max_pairs={self.max_pairs}: must be at least 1; try 4")
        if len(set(self.countries)) != len(self.countries):
            raise UserError(f"data.<name>.countries={self.countries}: a country occurs twice")

    @property
    def train_room(self) -> float:
        """The fraction of questions that is not held out."""
        held_out = (
            1.0 / NUM_FOLDS if self.kfold is not None else self.test_fraction + self.validation_fraction
        )
        return 1.0 - held_out


@dataclass(frozen=True)
class Question:
    """One row: its options and, for the countries asked for, the frequency of each option."""

    line: int
    text: str
    options: tuple[str, ...]
    answers: dict[str, tuple[float, ...]]


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """Pairs by split. Splits and pairs have their own seeds: they are the same for every run ``seed``."""
    countries, indexed = asked_countries(name, settings)
    reader = Reader(name, settings, {"question", "selections", "options", "source"})
    seen: set[str] = set()

    def convert(row: RawRow) -> list[Question]:
        return read_question(row, countries, settings.drop_options, seen, reader.counts)

    if settings.path is not None:
        rows = reader.file("path", settings.path, convert)
    else:
        rows = reader.hub(convert)["train"]
    for country in countries:
        if country not in seen:
            raise UserError(
                f"data.{name}.countries: {country!r} is not in the data{did_you_mean(country, seen)}; there are "
                + ", ".join(sorted(seen))
            )
    by = (
        "row: each country's rows on their own, so that a question may be trained on for one and tested for another"
        if settings.split_by == "row"
        else "question: each in one split for all countries"
    )
    log.info("%s: split by %s", name, by)
    questions = [question for found in rows for question in found]
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for country in countries:
        examples = country_examples(questions, country, settings, reader.counts)
        if indexed:
            examples = {split: [replace(e, group=name) for e in found] for split, found in examples.items()}
        for split in SPLITS:
            if not examples[split]:
                raise UserError(
                    f"data.{name}: {country} has no {split} pair; it has {sum(country in q.answers for q in questions)} "
                    "questions: leave it out, raise the fraction, or set another split_seed"
                )
            splits[split] += examples[split]
    reader.finish()
    return {split: finish_split(name, split, examples) for split, examples in splits.items()}


def asked_countries(name: str, settings: Settings) -> tuple[list[str], bool]:
    """The countries that ``name`` and the settings ask for, and whether the name had an index."""
    _, index = parse_name(name)
    if index is None:
        return settings.countries or list(COUNTRIES), False
    if settings.countries:
        raise UserError(
            f"data.{name}.countries: only goes with a name without index; {name} is one country already"
        )
    if not index.isdecimal() or int(index) >= len(COUNTRIES):
        listed = ", ".join(f"{i} {country}" for i, country in enumerate(COUNTRIES))
        raise UserError(f"datasets=[{name}]: no country {index!r}; the indices are {listed}")
    return [COUNTRIES[int(index)]], True


# ---------------------------------------------------------------------------------------------- rows


def read_question(
    row: RawRow, countries: Sequence[str], drop: Sequence[str], seen: set[str], counts: Counter[str]
) -> list[Question]:
    """The row as a Question (a list of one), or an empty list where it is of no use; the reason is counted."""
    text = field_of(row, "question", "text")
    options = option_texts(row, "options", field_of(row, "options", "value"))
    selections = literal(row, "selections", field_of(row, "selections", "value"))
    if not isinstance(selections, dict) or not all(isinstance(country, str) for country in selections):
        raise row.bad("an object {country: probabilities} is due", "selections")
    seen.update(selections)
    if not text.strip() or not options:
        counts["questions skipped: no text or no options"] += 1
        return []
    kept = [i for i, option in enumerate(options) if option not in drop]
    if len(kept) < 2:
        counts["questions skipped: fewer than two options"] += 1
        return []
    answers = {}
    for country in countries:
        if country not in selections:
            continue
        frequencies = check_frequencies(row, f"selections[{country!r}]", selections[country])
        if len(frequencies) not in (0, len(options)):
            raise row.bad(
                f"{len(frequencies)} probabilities for {len(options)} options; mend the row",
                f"selections[{country!r}]",
            )
        left = [frequencies[i] for i in kept] if frequencies else []
        if not sum(left) > 0:
            counts["answers skipped: no probability on any option"] += 1
            continue
        answers[country] = tuple(value / sum(left) for value in left)
    return [Question(row.line, text, tuple(options[i] for i in kept), answers)] if answers else []


def prompt_of(country: str, question: str, options: Sequence[str]) -> str:
    """The prompt, to the letter that of the reference code."""
    return (
        f"Opinion of people in {country} on: {question}\nPlease select the best response:{lettered(options)}"
    )


def country_examples(
    questions: Sequence[Question], country: str, settings: Settings, counts: Counter[str]
) -> dict[str, list[Example]]:
    """One country's pairs by split; their group is the country."""
    prompts: dict[str, Question] = {}
    for question in questions:
        if country in question.answers:
            prompt = prompt_of(country, question.text, question.options)
            if prompt in prompts:
                counts["questions skipped: the same question with the same options came before"] += 1
            prompts.setdefault(prompt, question)
    examples: dict[str, list[Example]] = {split: [] for split in SPLITS}
    places = place(list(prompts.values()), settings)
    for (prompt, question), split in zip(prompts.items(), places, strict=True):
        if split is None:
            counts[f"questions left out of training: train_frac={settings.train_frac:g}"] += 1
            continue
        frequencies = question.answers[country]
        best = best_of(frequencies)
        rng = stream(settings.pair_seed, "goqa", prompt)
        one = settings.mode == "best_random"
        pairs = best_random(frequencies, rng) if one else ranked(frequencies, settings.max_pairs, rng)
        if not pairs:
            counts["questions skipped: all answers are equally frequent"] += 1
        for k, (winner, loser) in enumerate(pairs):
            responses = [("chosen", LETTERS[winner]), ("rejected", LETTERS[loser])]
            if k == len(pairs) - 1 and winner != best:  # SFT imitates the last winner unless told otherwise
                responses.append(("target", LETTERS[best]))
            examples[split].append(
                Example(
                    uid=f"{question.line}/{country}" + ("" if one else f"#{k}"),
                    prompt=prompt,
                    responses=tuple(responses),
                    group=country,
                    meta={"country": country, "frequencies": (frequencies[winner], frequencies[loser])},
                )
            )
    return examples


# ---------------------------------------------------------------------------------------------- splits


def place(questions: Sequence[Question], settings: Settings) -> list[str | None]:
    """The split of each question of one country; None: left out because ``train_frac`` is less than the room."""
    if settings.split_by == "row":
        return place_rows(len(questions), settings)
    return [place_question(question.text, settings) for question in questions]


def place_question(text: str, settings: Settings) -> str | None:
    """The split of a question, by the hash of its text: the same for all countries, whatever else is in the data."""
    seed, held_out = settings.split_seed, 1.0 - settings.train_room
    if settings.kfold is not None:
        if int(NUM_FOLDS * position(seed, text, "fold")) == settings.kfold:
            return "test" if position(seed, text, "half") < 0.5 else "validation"
        at = position(seed, text, "train")
    else:
        at = position(seed, text)
        if at < held_out:
            return "test" if at < settings.test_fraction else "validation"
        at = (at - held_out) / settings.train_room
    share = settings.train_frac / settings.train_room
    # a share that is 1 but for rounding leaves nobody out
    return "train" if at < share or share > 1.0 - 1e-9 else None


def place_rows(num_rows: int, settings: Settings) -> list[str | None]:
    """The splits of one country's rows as the reference code draws them (pandas samples, state 42; for folds,
    scikit-learn's shuffled KFold with state 42). ``split_seed`` is not used."""
    import pandas

    rows = pandas.Series(range(num_rows))
    if settings.kfold is None:
        train = rows.sample(frac=settings.train_room, random_state=REFERENCE_STATE)
        held_out = rows.drop(train.index)
        # of the sum, not of 1 - train_room: 0.1 / (1 - 0.8) is above 0.5, and half a row would be rounded up
        held_out_share = settings.test_fraction + settings.validation_fraction
        test_share = settings.test_fraction / held_out_share if held_out_share else 0.0
    else:
        # KFold shuffles the indices once and cuts them into folds, the first (rows mod folds) one longer
        shuffled = np.arange(num_rows)
        np.random.RandomState(REFERENCE_STATE).shuffle(shuffled)
        fold = np.array_split(shuffled, NUM_FOLDS)[settings.kfold]
        held_out, train = rows[sorted(fold)], rows.drop(fold)
        test_share = 0.5
    test = held_out.sample(frac=test_share, random_state=REFERENCE_STATE)
    if settings.train_frac < settings.train_room - 1e-9:
        train = train.sample(frac=settings.train_frac / settings.train_room, random_state=REFERENCE_STATE)
    places: list[str | None] = [None] * num_rows
    for split, part in (("train", train), ("test", test), ("validation", held_out.drop(test.index))):
        for row in part:
            places[row] = split
    return places
