"""Your own data: JSONL, CSV or Parquet (or a set on the hub) in one of the formats below.

A row has ``prompt`` and one of
    chosen, rejected                 one pair (with p_chosen, margin and auxiliary responses if you like; see below)
    responses and pairs              pairs [[i, j], ..] of response indices, the winner first
    responses and scores             every two responses of different score, the higher one chosen
    completion                       one completion to imitate (role "target")
Without ``prompt`` the exact shared prefix of all completions is the prompt. Prompts and completions are text, or both
are lists of messages {"role": .., "content": ..}. Every row may have ``group`` and ``weight``.

Auxiliary responses, for variance-reduced losses, are ``aux_responses`` [[first, second], ..] with ``aux_preferences``
[P(first preferred), ..] and ``chosen_preference``; ``aux_finished`` [[true, false], ..] says which ended by themselves: a
response cut while it was generated gets no EOS. One pair may also be a_1, a_2 with the four preferences of the paper.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from data.files import GroupedSettings, Reader, by_prompt, group_of, load_examples
from data.jsonl import RawRow, checked, describe, field_of
from data.pairs import ranked_pairs, shared_end, shared_length
from data.schema import Example, Message, Text
from utils import UserError, did_you_mean

ROLES = ("system", "user", "assistant", "tool")
PREFERENCES = ("chosen_preference", "rejected_preference", "a_1_preference", "a_2_preference")
AUXILIARY = ("a_1", "a_2", "aux_responses", "aux_preferences", "aux_finished")
PAIR_ONLY = ("p_chosen", "margin", *AUXILIARY, *PREFERENCES)
COLUMNS = (
    *("prompt", "chosen", "rejected", "responses", "pairs", "scores", "completion", "group", "weight"),
    *PAIR_ONLY,
)
WRITTEN = ("uid", "aux_from", "annotation")  # what commands.sample and commands.annotate write for people
SHAPES = {"chosen": ("chosen", "rejected"), "responses": ("responses",), "completion": ("completion",)}
SUM_TOLERANCE = 1e-6

Responses = tuple[tuple[str, Text], ...]


@dataclass(frozen=True, kw_only=True)
class Settings(GroupedSettings):
    """columns: {ours: theirs} where your columns are named otherwise; {prompt: null} ignores a prompt column.

    prompt_end: with an implicit prompt, a text with which the prompt must end, e.g. "\\n\\nAssistant:".
    """

    columns: dict[str, str | None] = field(default_factory=dict)
    prompt_end: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for ours in self.columns:
            if ours not in COLUMNS:
                raise UserError(
                    f"data.<name>.columns={{{ours}: ..}}: no such column of ours{did_you_mean(ours, COLUMNS)}; "
                    f"there are {', '.join(COLUMNS)}"
                )
        if self.prompt_end == "":
            raise UserError(
                "data.<name>.prompt_end: must not be empty; leave it null for the whole shared prefix"
            )


def load(name: str, settings: Settings, seed: int) -> dict[str, list[Example]]:
    """Examples by split. The data do not depend on the run's ``seed``."""
    known = {*COLUMNS, *WRITTEN, *(theirs for theirs in settings.columns.values() if theirs)}
    if settings.group_field:
        known.add(settings.group_field)
    reader = Reader(name, settings, known)
    return load_examples(reader, settings, lambda row: convert(row, settings, name, reader.counts), by_prompt)


def convert(row: RawRow, settings: Settings, name: str, counts: Counter[str]) -> list[Example]:
    """The examples of one row: one, or one per pair."""
    row = row.renamed(settings.columns)
    shape = _shape(row)
    common = {"group": group_of(row, settings.group_field, name), "weight": _weight(row)}
    if shape != "chosen" and (stray := [key for key in PAIR_ONLY if key in row]):
        raise row.bad("only goes with chosen and rejected", stray[0])
    if shape == "completion":
        prompt, texts = _prompt(row, settings, [("completion", _text(row, "completion"))])
        return [Example(str(row.line), prompt, (("target", texts[0]),), **common)]
    if shape == "responses":
        return _pairs_of_responses(row, settings, counts, common)
    return [_pair(row, settings, counts, common)]


def _shape(row: RawRow) -> str:
    present = [shape for shape, columns in SHAPES.items() if any(column in row for column in columns)]
    if len(present) == 1:
        return present[0]
    if present:
        raise row.bad(
            f"has {' and '.join(present)}: which is meant? keep one, or hide one with columns: {{{present[1]}: null}}"
        )
    raise row.bad(
        f"no chosen and rejected, no responses, no completion; found {sorted(row.values)}; "
        "name your columns with columns: {chosen: theirs, ..}"
    )


def _weight(row: RawRow) -> float:
    if "weight" not in row:
        return 1.0
    weight = field_of(row, "weight", "number")
    if weight < 0:
        raise row.bad(f"must not be negative, found {weight:g}", "weight")
    return weight


# ---------------------------------------------------------------------------------------------- the three shapes


def _pairs_of_responses(row: RawRow, settings: Settings, counts: Counter[str], common: dict) -> list[Example]:
    found = field_of(row, "responses", "list")
    named = [(f"responses[{i}]", _as_text(row, f"responses[{i}]", item)) for i, item in enumerate(found)]
    if len(named) < 2:
        raise row.bad(f"at least 2 are due, found {len(named)}", "responses")
    if ("pairs" in row) == ("scores" in row):
        raise row.bad(
            "responses go with either pairs or scores; "
            + ("both are" if "pairs" in row else "neither is")
            + " there"
        )
    pairs = _given_pairs(row, len(named)) if "pairs" in row else _scored_pairs(row, len(named), counts)
    if not pairs:
        counts["rows without a pair"] += 1
    prompt, texts = _prompt(row, settings, named)
    return [
        Example(f"{row.line}#{k}", prompt, (("chosen", texts[winner]), ("rejected", texts[loser])), **common)
        for k, (winner, loser) in enumerate(pairs)
    ]


def _given_pairs(row: RawRow, num_responses: int) -> list[tuple[int, int]]:
    pairs = []
    for k, pair in enumerate(field_of(row, "pairs", "list")):
        key = f"pairs[{k}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.bad(f"two indices [winner, loser] are due, found {describe(pair)}", key)
        for index in pair:
            if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < num_responses:
                raise row.bad(f"an index from 0 to {num_responses - 1} is due, found {describe(index)}", key)
        if pair[0] == pair[1]:
            raise row.bad(f"response {pair[0]} is paired with itself", key)
        pairs.append((pair[0], pair[1]))
    return pairs


def _scored_pairs(row: RawRow, num_responses: int, counts: Counter[str]) -> list[tuple[int, int]]:
    found = field_of(row, "scores", "list")
    if len(found) != num_responses:
        raise row.bad(f"{num_responses} are due, one per response, found {len(found)}", "scores")
    pairs = ranked_pairs([_item(row, f"scores[{i}]", score, "number") for i, score in enumerate(found)])
    counts["pairs skipped: equal scores"] += num_responses * (num_responses - 1) // 2 - len(pairs)
    return pairs


def _pair(row: RawRow, settings: Settings, counts: Counter[str], common: dict) -> Example:
    named = [("chosen", _text(row, "chosen")), ("rejected", _text(row, "rejected"))]
    scalars = {}
    if "p_chosen" in row:
        scalars["p_chosen"] = field_of(row, "p_chosen", "probability")
    if "margin" in row:
        scalars["margin"] = field_of(row, "margin", "number")
    auxiliary, preferences = _auxiliary(row)
    if preferences is not None:
        scalars["chosen_preference"] = preferences[0]
    prompt, texts = _prompt(row, settings, [*named, *auxiliary])
    if texts[0] == texts[1]:
        counts["pairs of equal responses"] += 1
    roles = ["chosen", "rejected"] + ["aux_1", "aux_2"] * (len(auxiliary) // 2)
    response_scalars = {}
    if "aux_finished" in row:
        response_scalars["finished"] = (1.0, 1.0, *_finished(row, len(auxiliary) // 2))
    if preferences is not None:
        nan = float("nan")
        response_scalars["aux_preference"] = (nan, nan, *(v for p in preferences[1:] for v in (p, nan)))
    return Example(
        uid=str(row.line),
        prompt=prompt,
        responses=tuple(zip(roles, texts, strict=True)),
        scalars=scalars,
        response_scalars=response_scalars,
        **common,
    )


# ---------------------------------------------------------------------------------------------- auxiliary responses


def _auxiliary(row: RawRow) -> tuple[list[tuple[str, Text]], list[float] | None]:
    """Auxiliary responses (aux_1, aux_2, aux_1, ..) and [P(chosen preferred), P(first preferred) per pair].

    No preferences at all (None) are fine: they can be computed later. Some but not all are an error.
    """
    if "aux_responses" in row or "aux_preferences" in row:
        return _many_auxiliary(row)
    responses = [key for key in ("a_1", "a_2") if key in row]
    given = [key for key in PREFERENCES if key in row]
    if not responses and not given:
        return [], None
    _all_or_none(row, ("a_1", "a_2"), "the auxiliary pair")
    texts = [(key, _text(row, key)) for key in ("a_1", "a_2")]
    if not given:
        return texts, None
    _all_or_none(row, PREFERENCES, "the four preferences")
    return texts, [
        _complementary(row, "chosen_preference", "rejected_preference"),
        _complementary(row, "a_1_preference", "a_2_preference"),
    ]


def _many_auxiliary(row: RawRow) -> tuple[list[tuple[str, Text]], list[float] | None]:
    for key in ("a_1", "a_2", "a_1_preference", "a_2_preference"):
        if key in row:
            raise row.bad("does not go with aux_responses; keep one of the two forms", key)
    texts: list[tuple[str, Text]] = []
    pairs = field_of(row, "aux_responses", "list")
    for m, pair in enumerate(pairs):
        key = f"aux_responses[{m}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise row.bad(f"two responses [first, second] are due, found {describe(pair)}", key)
        texts += [(f"{key}[{i}]", _as_text(row, f"{key}[{i}]", item)) for i, item in enumerate(pair)]
    if not any(key in row for key in ("aux_preferences", "chosen_preference", "rejected_preference")):
        return texts, None
    _all_or_none(row, ("aux_preferences", "chosen_preference"), "the preferences")
    found = field_of(row, "aux_preferences", "list")
    if len(found) != len(pairs):
        raise row.bad(
            f"{len(pairs)} are due, one per pair of aux_responses, found {len(found)}", "aux_preferences"
        )
    first = (
        _complementary(row, "chosen_preference", "rejected_preference")
        if "rejected_preference" in row
        else field_of(row, "chosen_preference", "probability")
    )
    return texts, [
        first,
        *(_item(row, f"aux_preferences[{m}]", p, "probability") for m, p in enumerate(found)),
    ]


def _finished(row: RawRow, num_pairs: int) -> list[float]:
    """1 where an auxiliary response ended by itself, 0 where it was cut while it was generated; aux_1, aux_2, aux_1, .."""
    if "aux_responses" not in row:
        raise row.bad("goes with aux_responses", "aux_finished")
    found = field_of(row, "aux_finished", "list")
    if len(found) != num_pairs:
        raise row.bad(
            f"{num_pairs} are due, one per pair of aux_responses, found {len(found)}", "aux_finished"
        )
    for m, pair in enumerate(found):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(x, bool) for x in pair)):
            raise row.bad(
                f"[true or false, true or false] is due, found {describe(pair)}", f"aux_finished[{m}]"
            )
    return [float(x) for pair in found for x in pair]


def _all_or_none(row: RawRow, keys: Sequence[str], what: str) -> None:
    for key in keys:
        if key not in row:
            there = [other for other in keys if other in row] or [
                k for k in (*PREFERENCES, *AUXILIARY) if k in row
            ]
            raise row.bad(
                f"missing, though {', '.join(there)} is there; {what} go together ({', '.join(keys)})", key
            )


def _complementary(row: RawRow, first: str, second: str) -> float:
    """P(first preferred), checked against P(second preferred) = 1 - P(first preferred)."""
    p, q = field_of(row, first, "probability"), field_of(row, second, "probability")
    if not math.isclose(p + q, 1.0, rel_tol=0.0, abs_tol=SUM_TOLERANCE):
        raise row.bad(
            f"{first} + {second} must be 1, found {p:g} + {q:g} = {p + q:g}; they are probabilities", first
        )
    return p


# ---------------------------------------------------------------------------------------------- texts and prompts


def _text(row: RawRow, key: str) -> Text:
    return _as_text(row, key, field_of(row, key, "value"))


def _item(row: RawRow, key: str, value: object, kind: str) -> float:
    """An element of a list column: JSON inside a CSV cell is no longer text, so it is checked as JSON."""
    return checked(RawRow(row.file, row.line, row.values, names=row.names), key, value, kind)


def _as_text(row: RawRow, key: str, value: object) -> Text:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise row.bad(f"text or a list of messages is due, found {describe(value)}", key)
    if not value:
        raise row.bad("an empty list of messages", key)
    return tuple(_message(row, f"{key}[{i}]", message) for i, message in enumerate(value))


def _message(row: RawRow, key: str, value: object) -> Message:
    if not isinstance(value, dict):
        raise row.bad(f'a message {{"role": .., "content": ..}} is due, found {describe(value)}', key)
    if set(value) != {"role", "content"}:
        raise row.bad(f"a message has role and content and nothing else, found {sorted(value)}", key)
    role = _item(row, f"{key}.role", value["role"], "text")
    if role not in ROLES:
        raise row.bad(f"must be one of {', '.join(ROLES)}, found {role!r}", f"{key}.role")
    return {"role": role, "content": _item(row, f"{key}.content", value["content"], "text")}


def _prompt(row: RawRow, settings: Settings, named: list[tuple[str, Text]]) -> tuple[Text, list[Text]]:
    """The prompt and the completions without it; ``named`` are (column, completion) in the row's order."""
    texts = [text for _, text in named]
    if "prompt" in row:
        prompt = _text(row, "prompt")
    else:
        prompt, texts = _implicit(row, settings.prompt_end, texts)
    if not prompt:
        raise row.bad("empty: a response needs something to follow", "prompt")
    for (key, _), text in zip(named, texts, strict=True):
        if isinstance(text, str) != isinstance(prompt, str):
            raise row.bad(
                "prompt and completions must be both text or both messages; columns: {prompt: null} ignores the prompt",
                key,
            )
        if not isinstance(text, str) and text[0]["role"] != "assistant":
            raise row.bad(f"a completion starts with the role assistant, found {text[0]['role']!r}", key)
    return prompt, texts


def _implicit(row: RawRow, prompt_end: str | None, texts: list[Text]) -> tuple[Text, list[Text]]:
    """The shared beginning of all completions, and what is left of each."""
    if len(texts) == 1:
        raise row.bad(
            "no such column, and one completion alone does not tell where its prompt ends", "prompt"
        )
    if all(text == texts[0] for text in texts):
        raise row.bad(
            "no prompt column, and the completions do not differ: where the prompt ends cannot be told"
        )
    if all(isinstance(text, str) for text in texts):
        end = shared_length(texts) if prompt_end is None else shared_end(texts, prompt_end)
        if not end:
            ending = f" that ends in {prompt_end!r}" if prompt_end else ""
            raise row.bad(f"no prompt column, and the completions share no beginning{ending}")
        # "Q: 2+2? four" / "Q: 2+2? five": the space is the completions', as tokenizers want it
        if prompt_end is None and end > 1 and texts[0][end - 1] == " ":
            end -= 1
        return texts[0][:end], [text[end:] for text in texts]
    if any(isinstance(text, str) for text in texts):
        raise row.bad("completions must be all text or all messages")
    length = min(map(len, texts))
    end = next((i for i in range(length) if any(text[i] != texts[0][i] for text in texts)), length)
    if end == 0 or end == length:
        problem = "share no leading message" if end == 0 else "are the beginning of one another"
        raise row.bad(f"no prompt column, and the completions {problem}")
    return texts[0][:end], [text[end:] for text in texts]
