"""Local files in every format, implicit prompts, auxiliary responses, and the messages for rows that do not fit."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest

from data import local
from data.jsonl import RawRow
from utils import UserError

FIXTURES = Path(__file__).parent / "fixtures"
U = {"role": "user", "content": "Hi"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def convert(values: dict, counts: Counter | None = None, **settings):
    row = RawRow("d.jsonl", 7, values)
    return local.convert(row, local.Settings(**settings), "mine", Counter() if counts is None else counts)


def load(path: Path, **settings):
    return local.load("mine", local.Settings(path=str(path), **{"test_fraction": 0.0, **settings}), 0)


def test_every_shape_of_the_fixture():
    examples = load(FIXTURES / "local.jsonl")["train"]
    by_uid = {example.uid: example for example in examples}
    first = by_uid["mine/train:1"]
    assert first.responses == (("chosen", " Apple."), ("rejected", " Rock."))
    assert (first.group, first.weight, first.scalars) == ("food", 2.0, {"p_chosen": 0.9, "margin": 1.5})
    assert [by_uid[f"mine/train:2#{k}"].responses for k in (0, 1)] == [
        (("chosen", " c"), ("rejected", " a")),
        (("chosen", " c"), ("rejected", " b")),
    ]
    assert [by_uid[f"mine/train:3#{k}"].response("rejected") for k in (0, 1)] == [" a", " c"]
    assert by_uid["mine/train:4"].response("chosen") == (assistant("Hello"),)
    assert by_uid["mine/train:5"].responses == (("target", " This."),)
    assert {example.group for example in examples} == {"food", "mine"}
    assert len(examples) == 7


def test_csv_and_parquet_give_the_same_examples_as_jsonl(tmp_path):
    rows = [
        {
            "prompt": f"Question {i}?",
            "chosen": f" yes, {i}",
            "rejected": ' "no"\n',
            "group": "g",
            "weight": 0.5 * i,
        }
        for i in range(5)
    ]
    jsonl = tmp_path / "d.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    import csv

    import pyarrow
    import pyarrow.parquet

    with (tmp_path / "d.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")

    def facts(name: str):
        return [(e.prompt, e.responses, e.group, e.weight) for e in load(tmp_path / name)["train"]]

    assert facts("d.jsonl") == facts("d.csv") == facts("d.parquet")
    assert len(facts("d.csv")) == 5


def test_csv_lists_are_json_cells(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('prompt,responses,scores\nP,"["" a"", "" b""]","[1, 2]"\n')
    (example,) = load(path)["train"]
    assert example.responses == (("chosen", " b"), ("rejected", " a"))
    path.write_text('prompt,responses,scores\nP,"["" a"", "" b""]","[1, ""2""]"\n')
    with pytest.raises(UserError, match=r"d.csv:2: scores\[1\]: a finite number is due, found the text '2'"):
        load(path)


def test_columns_map_names_and_messages_speak_the_files_language():
    settings = {"columns": {"chosen": "winner", "responses": "texts"}, "group_field": "country"}
    (example,) = convert(
        {"prompt": "P", "winner": " a", "rejected": " b", "country": "X"},
        **settings | {"columns": {"chosen": "winner"}},
    )
    assert example.response("chosen") == " a" and example.group == "X"
    with pytest.raises(
        UserError, match=r"d\.jsonl:7: winner: text or a list of messages is due, found the integer 3"
    ):
        convert({"prompt": "P", "winner": 3, "rejected": " b"}, columns={"chosen": "winner"})
    with pytest.raises(UserError, match=r"winner: no such column .*found \['chosen', 'prompt', 'rejected'\]"):
        convert({"prompt": "P", "chosen": " a", "rejected": " b"}, columns={"chosen": "winner"})
    with pytest.raises(UserError, match=r"texts\[1\]: text or a list of messages is due, found null"):
        convert({"prompt": "P", "texts": ["a", None], "scores": [1, 2]}, columns={"responses": "texts"})
    with pytest.raises(UserError, match=r"no such column of ours; did you mean 'chosen'"):
        local.Settings(columns={"choosen": "winner"})
    with pytest.raises(UserError, match=r"country: no such column; found"):
        convert({"prompt": "P", "chosen": " a", "rejected": " b"}, group_field="country")


BAD_ROWS = {
    "nothing": ({"prompt": "P"}, "no chosen and rejected, no responses, no completion; found ['prompt']"),
    "half a pair": ({"prompt": "P", "chosen": "a"}, "rejected: no such column; found ['chosen', 'prompt']"),
    "two shapes": ({"prompt": "P", "chosen": "a", "rejected": "b", "completion": "c"}, "has chosen and completion"),
    "null chosen": ({"prompt": "P", "chosen": None, "rejected": "b"}, "chosen: text or a list of messages is due, found null"),
    "bool chosen": ({"prompt": "P", "chosen": True, "rejected": "b"}, "chosen: text or a list of messages is due"),
    "number prompt": ({"prompt": 3, "chosen": "a", "rejected": "b"}, "prompt: text or a list of messages is due"),
    "empty prompt": ({"prompt": "", "chosen": "a", "rejected": "b"}, "prompt: empty"),
    "empty messages": ({"prompt": [], "chosen": "a", "rejected": "b"}, "prompt: an empty list of messages"),
    "mixed": ({"prompt": "P", "chosen": [assistant("a")], "rejected": [assistant("b")]}, "chosen: prompt and completions must be both"),
    "role": ({"prompt": [{"role": "bot", "content": "x"}], "chosen": [assistant("a")], "rejected": [assistant("b")]}, "prompt[0].role: must be one of"),
    "content": ({"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"}, "prompt[0].content: text is due, found null"),
    "message keys": ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "prompt[0]: a message has role and content"),
    "not a message": ({"prompt": ["x"], "chosen": "a", "rejected": "b"}, "prompt[0]: a message"),
    "user first": ({"prompt": [U], "chosen": [U], "rejected": [assistant("b")]}, "chosen: a completion starts with the role assistant"),
    "group": ({"prompt": "P", "chosen": "a", "rejected": "b", "group": 3}, "group: text is due, found the integer 3"),
    "summary group": ({"prompt": "P", "chosen": "a", "rejected": "b", "group": "all"}, "group: 'all' is what the tables call"),
    "empty group": ({"prompt": "P", "chosen": "a", "rejected": "b", "group": ""}, "group: an empty group name"),
    "weight": ({"prompt": "P", "chosen": "a", "rejected": "b", "weight": -1}, "weight: must not be negative"),
    "weight text": ({"prompt": "P", "chosen": "a", "rejected": "b", "weight": "1"}, "weight: a finite number is due"),
    "p_chosen": ({"prompt": "P", "chosen": "a", "rejected": "b", "p_chosen": 1}, "p_chosen: a float in [0, 1] is due, found the integer 1; write 1.0"),
    "margin": ({"prompt": "P", "chosen": "a", "rejected": "b", "margin": True}, "margin: a finite number is due"),
    "one response": ({"prompt": "P", "responses": ["a"], "scores": [1]}, "responses: at least 2 are due, found 1"),
    "pairs and scores": ({"prompt": "P", "responses": ["a", "b"], "scores": [1, 2], "pairs": []}, "responses go with either pairs or scores; both"),
    "neither": ({"prompt": "P", "responses": ["a", "b"]}, "responses go with either pairs or scores; neither"),
    "scores length": ({"prompt": "P", "responses": ["a", "b"], "scores": [1]}, "scores: 2 are due, one per response, found 1"),
    "pair range": ({"prompt": "P", "responses": ["a", "b"], "pairs": [[0, 1], [0, 2]]}, "pairs[1]: an index from 0 to 1 is due, found the integer 2"),
    "pair bool": ({"prompt": "P", "responses": ["a", "b"], "pairs": [[0, True]]}, "pairs[0]: an index from 0 to 1 is due"),
    "pair length": ({"prompt": "P", "responses": ["a", "b"], "pairs": [[0]]}, "pairs[0]: two indices"),
    "pair self": ({"prompt": "P", "responses": ["a", "b"], "pairs": [[1, 1]]}, "pairs[0]: response 1 is paired with itself"),
    "stray scalar": ({"prompt": "P", "completion": "a", "p_chosen": 0.5}, "p_chosen: only goes with chosen and rejected"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row_is_one_message_with_row_and_column(kind):
    values, problem = BAD_ROWS[kind]
    with pytest.raises(UserError) as caught:
        convert(values)
    assert str(caught.value).startswith(f"d.jsonl:7: {problem}"), str(caught.value)


def test_ties_and_rows_without_a_pair_are_counted():
    counts: Counter[str] = Counter()
    assert convert({"prompt": "P", "responses": ["a", "b", "c"], "scores": [2, 2, 2]}, counts) == []
    assert convert({"prompt": "P", "responses": ["a", "b"], "pairs": []}, counts) == []
    assert counts["pairs skipped: equal scores"] == 3 and counts["rows without a pair"] == 2
    last = convert({"prompt": "P", "responses": ["a", "b", "c", "d"], "scores": [1, 4, 2, 3]})[-1]
    assert last.response("chosen") == "b"  # the best response's pairs come last: it is what SFT imitates


# ---------------------------------------------------------------------------------------------- implicit prompts


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: 2+2? four", "Q: 2+2? five", "Q: 2+2? f"),  # the exact shared prefix, even inside a word
        ("Q: sky? blue", "Q: sky? red", "Q: sky?"),  # but a space belongs to the completion
        ("Q: end", "Q: end of it", "Q: end"),  # one completion may be empty
        ("Q:\U0001f600", "Q:\U0001f601", "Q:"),
    ],
)
def test_implicit_prompt_is_the_shared_prefix(chosen, rejected, prompt):
    (example,) = convert({"chosen": chosen, "rejected": rejected})
    assert example.prompt == prompt
    assert (prompt + example.response("chosen"), prompt + example.response("rejected")) == (chosen, rejected)


def test_implicit_prompt_can_be_made_to_end_in_a_marker():
    values = {"chosen": "\n\nHuman: a\n\nAssistant: The end", "rejected": "\n\nHuman: a\n\nAssistant: This"}
    (example,) = convert(values, prompt_end="\n\nAssistant:")
    assert example.prompt.endswith("Assistant:") and example.response("rejected") == " This"
    with pytest.raises(UserError, match="share no beginning that ends in 'Bot:'"):
        convert(values, prompt_end="Bot:")


def test_implicit_prompt_of_messages_is_the_shared_leading_messages():
    values = {"chosen": [U, assistant("a")], "rejected": [U, assistant("b")]}
    (example,) = convert(values)
    assert example.prompt == (U,) and example.response("rejected") == (assistant("b"),)
    # a prompt column that repeats what the messages hold can be ignored
    assert convert({"prompt": "Hi", **values}, columns={"prompt": None}) == [example]
    for bad, problem in (
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "share no leading message"),
        (
            {"chosen": [U, assistant("a")], "rejected": [U, assistant("a"), U]},
            "are the beginning of one another",
        ),
        ({"chosen": [U, assistant("a")], "rejected": "Hi"}, "completions must be all text or all messages"),
    ):
        with pytest.raises(UserError, match=problem):
            convert(bad)


def test_implicit_prompt_that_cannot_be_told_is_an_error():
    for values, problem in (
        ({"chosen": "same", "rejected": "same"}, "the completions do not differ"),
        ({"chosen": "abc", "rejected": "xyz"}, "the completions share no beginning"),
        ({"completion": "abc"}, "prompt: no such column"),
    ):
        with pytest.raises(UserError, match=problem):
            convert(values)


# ---------------------------------------------------------------------------------------------- auxiliary responses

PAIR = {"prompt": "P", "chosen": " w", "rejected": " l"}
FOUR = {"chosen_preference": 0.8, "rejected_preference": 0.2, "a_1_preference": 0.4, "a_2_preference": 0.6}
AUX = {"a_1": " x", "a_2": " y"}


def test_auxiliary_fixture():
    examples = {e.uid.split(":")[1]: e for e in load(FIXTURES / "vrpo.jsonl")["train"]}
    one, two, three, bare, plain = (examples[str(i)] for i in range(1, 6))
    assert one.responses == (("chosen", " w"), ("rejected", " l"), ("aux_1", " x"), ("aux_2", " y"))
    assert one.scalars == {"chosen_preference": 0.8}
    assert one.response_scalars["aux_preference"][2] == 0.4
    assert [math.isnan(v) for v in one.response_scalars["aux_preference"]] == [True, True, False, True]
    assert [role for role, _ in two.responses] == ["chosen", "rejected", "aux_1", "aux_2", "aux_1", "aux_2"]
    assert [two.response_scalars["aux_preference"][i] for i in (2, 4)] == [0.7, 0.1]
    # the prefix of all four, not of the pair, is the prompt
    assert three.prompt == "The sky is" and [t for _, t in three.responses] == [
        " blue.",
        " bread.",
        " black.",
        " up.",
    ]
    assert len(bare.responses) == 4 and bare.scalars == {} and bare.response_scalars == {}
    assert len(plain.responses) == 2


def test_auxiliary_messages():
    aux = {"a_1": [assistant("x")], "a_2": [assistant("y")]}
    (example,) = convert(
        {"prompt": [U], "chosen": [assistant("w")], "rejected": [assistant("l")], **aux, **FOUR}
    )
    assert example.response("aux_2") == (assistant("y"),)


MANY = {
    "aux_responses": [[" a", " b"], [" c", " d"]],
    "aux_preferences": [0.7, 0.1],
    "chosen_preference": 0.5,
}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        *(({**AUX, **{k: v for k, v in FOUR.items() if k != gone}}, f"{gone}: missing, though") for gone in FOUR),
        ({"a_1": " x", **FOUR}, "a_2: missing, though a_1 is there"),
        (FOUR, "a_1: missing, though chosen_preference, "),
        ({**AUX, **FOUR, "a_1_preference": 1}, "a_1_preference: a float in [0, 1] is due, found the integer 1; write 1.0"),
        ({**AUX, **FOUR, "a_2_preference": True}, "a_2_preference: a float in [0, 1] is due, found the boolean true"),
        ({**AUX, **FOUR, "chosen_preference": "0.8"}, "chosen_preference: a float in [0, 1] is due, found the text"),
        ({**AUX, **FOUR, "chosen_preference": 1.5}, "chosen_preference: a float in [0, 1] is due, found the number 1.5"),
        ({**AUX, **FOUR, "a_1_preference": 0.9, "a_2_preference": 0.9}, "a_1_preference: a_1_preference + a_2_preference must be 1"),
        ({**AUX, **FOUR, "chosen_preference": 0.80001}, "chosen_preference: chosen_preference + rejected_preference must be 1"),
        ({**MANY, **AUX}, "a_1: does not go with aux_responses"),
        ({**MANY, "aux_preferences": [0.7]}, "aux_preferences: 2 are due, one per pair of aux_responses, found 1"),
        ({**MANY, "aux_preferences": [0.7, 1]}, "aux_preferences[1]: a float in [0, 1] is due, found the integer 1; write 1.0"),
        ({**MANY, "aux_preferences": [0.7, -0.1]}, "aux_preferences[1]: a float in [0, 1] is due"),
        ({**MANY, "aux_responses": [[" a"], [" c", " d"]]}, "aux_responses[0]: two responses [first, second] are due"),
        ({**MANY, "aux_responses": [[" a", 3], [" c", " d"]]}, "aux_responses[0][1]: text or a list of messages is due"),
        ({**MANY, "rejected_preference": 0.6}, "chosen_preference: chosen_preference + rejected_preference must be 1"),
        ({k: v for k, v in MANY.items() if k != "chosen_preference"}, "chosen_preference: missing, though aux_preferences"),
        ({k: v for k, v in MANY.items() if k != "aux_preferences"}, "aux_preferences: missing, though chosen_preference"),
        ({k: v for k, v in MANY.items() if k != "aux_responses"}, "aux_responses: no such column"),
        ({**AUX, **FOUR, "aux_finished": [[True, True]]}, "aux_finished: goes with aux_responses"),
        ({**MANY, "aux_finished": [[True, True]]}, "aux_finished: 2 are due, one per pair of aux_responses, found 1"),
        ({**MANY, "aux_finished": [[True, 1], [True, True]]}, "aux_finished[0]: [true or false, true or false] is due"),
    ],
)  # fmt: skip
def test_bad_auxiliary_columns_are_named(values, problem):
    with pytest.raises(UserError) as caught:
        convert({**PAIR, **values})
    assert str(caught.value).startswith(f"d.jsonl:7: {problem}"), str(caught.value)


def test_preferences_that_sum_to_one_within_rounding_are_accepted():
    (example,) = convert({**PAIR, **AUX, **FOUR, "a_1_preference": 1 / 3, "a_2_preference": 0.6666669})
    assert example.response_scalars["aux_preference"][2] == 1 / 3
    assert convert({**PAIR, "aux_responses": [], "aux_preferences": [], "chosen_preference": 0.5})[0].scalars


def test_auxiliary_responses_that_were_cut_are_marked():
    (example,) = convert({**PAIR, **MANY, "aux_finished": [[True, False], [False, True]]})
    assert example.response_scalars["finished"] == (1.0, 1.0, 1.0, 0.0, 0.0, 1.0)
    assert "finished" not in convert({**PAIR, **MANY})[0].response_scalars
