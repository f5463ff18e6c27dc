"""goqa, goqma and oqa: prompts to the letter, pairs, splits, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from data import goqa, oqa
from data.jsonl import RawRow
from data.survey import best_random, best_worst, literal, ranked, softmax_pair
from utils import UserError, stream

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = {"test_fraction": 0.0, "validation_fraction": 0.0, "train_frac": 1.0}


def questions(path: str, countries, drop=()):
    from collections import Counter

    from data.jsonl import read_jsonl

    counts: Counter[str] = Counter()
    found = [
        goqa.read_question(row, countries, drop, set(), counts) for row in read_jsonl(Path(path), counts)
    ]
    return [q for one in found for q in one], counts


def country(found, name, **settings):
    from collections import Counter

    return goqa.country_examples(found, name, goqa.Settings(**{**SMALL, **settings}), Counter())["train"]


# ---------------------------------------------------------------------------------------------- goqa


def test_goqa_prompt_to_the_letter_and_best_answer_wins():
    found, counts = questions(str(FIXTURES / "goqa.jsonl"), ["Nigeria"])
    tea, rain, read = country(found, "Nigeria")
    assert tea.prompt == (
        "Opinion of people in Nigeria on: Is tea good?\nPlease select the best response:\nA. Yes\nB. No\nC. Don't know"
    )
    assert tea.response("chosen") == "A" and tea.response("rejected") in "BC"
    assert rain.responses == (("chosen", "B"), ("rejected", "A"))
    assert read.response("chosen") == "A"
    assert counts["questions skipped: fewer than two options"] == 1
    assert counts["answers skipped: no probability on any option"] == 1


def test_goqa_pairs_are_fixed_per_country_and_question():
    found, _ = questions(str(FIXTURES / "goqa.jsonl"), ["Nigeria", "Egypt", "China"])
    first = country(found, "Nigeria")
    assert country(found[::-1], "Nigeria")[::-1] == first  # order and company of rows do not matter
    losers = {s: country(found, "China", pair_seed=s)[1].response("rejected") for s in range(30)}
    assert set(losers.values()) == set("ABDE")  # every less frequent answer can lose


def test_goqma_draws_pairs_of_a_more_and_a_less_frequent_answer():
    found, _ = questions(str(FIXTURES / "goqa.jsonl"), ["China"])
    frequencies = [0.1, 0.2, 0.3, 0.15, 0.25]
    seen = set()
    for s in range(40):
        pairs = [
            e
            for e in country(found, "China", mode="ranked", pair_seed=s)
            if "#" in e.uid and "read" in e.prompt
        ]
        letters = [(e.response("chosen"), e.response("rejected")) for e in pairs]
        assert len(letters) == len(set(letters)) == 4
        assert all(len(pair.responses) == 2 for pair in pairs[:-1])
        assert all(frequencies["ABCDE".index(w)] > frequencies["ABCDE".index(v)] for w, v in letters)
        if any(w == "C" for w, _ in letters):
            assert (
                letters[-1][0] == "C" and len(pairs[-1].responses) == 2
            )  # the best answer's pair comes last
        else:
            assert pairs[-1].response("target") == "C"  # what SFT imitates where no pair has it
        seen.update(letters)
    assert len(seen) == 10  # every pair of five different frequencies
    assert (
        len(country(found, "China", mode="ranked", max_pairs=20)) == 2 + 10
    )  # the tie of Yes and No gives none


def test_goqa_drops_options_and_rescales():
    found, _ = questions(str(FIXTURES / "goqa.jsonl"), ["Nigeria"], ["Don't know", "DK/Refused"])
    assert found[0].options == ("Yes", "No") and found[0].answers["Nigeria"] == pytest.approx((0.625, 0.375))
    assert "Refused" not in country(found, "Nigeria")[2].prompt


def row(**changes):
    values = {
        "question": "Q?",
        "selections": "defaultdict(<class 'list'>, {'Nigeria': [0.5, 0.5]})",
        "options": "['Yes', 'No']",
    }
    return {**values, **changes}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"selections": "{'Nigeria': [0.5, 0.3, 0.2]}"}, r"selections['Nigeria']: 3 probabilities for 2 options"),
        ({"selections": "{'Nigeria': [1.0]}"}, r"selections['Nigeria']: 1 probabilities for 2 options"),
        ({"selections": "{'Nigeria': [0.5, -0.5]}"}, "selections['Nigeria']: probabilities are due, finite and not negative"),
        ({"selections": "{'Nigeria': [0.5, 'x']}"}, "selections['Nigeria']: probabilities are due"),
        ({"selections": "{'Nigeria': 0.5}"}, "selections['Nigeria']: a list of probabilities is due"),
        ({"selections": "defaultdict(<class 'list'>, {'Nigeria': [nan, 1]})"}, "selections: the text"),
        ({"selections": "{'Nigeria': __import__('os').getcwd()}"}, "selections: the text"),
        ({"selections": "[0.5, 0.5]"}, "selections: an object {country: probabilities} is due"),
        ({"selections": 3}, "selections: text that holds a list or an object is due, found the integer 3"),
        ({"options": "{'Yes'"}, "options: the text"),
        ({"options": "'Yes'"}, "options: a list of options is due"),
        ({"options": str(list(range(27)))}, "options: 27 options, but there are 26 letters"),
        ({"question": None}, "question: text is due, found null"),
    ],
)  # fmt: skip
def test_goqa_bad_rows_are_named(tmp_path, changes, problem):
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps(row()) + "\n" + json.dumps(row(**changes)) + "\n")
    with pytest.raises(UserError) as caught:
        goqa.load("goqa_0", goqa.Settings(path=str(path)), 0)
    assert str(caught.value).startswith(f"{path}:2: {problem}"), str(caught.value)
    # a country that is not asked for is not looked at
    if "probabilities" in problem and "{country" not in problem:
        assert questions(str(path), ["Egypt"])[0] == []


def test_goqa_lists_and_objects_need_not_be_text():
    plain = RawRow("f", 1, {})
    assert literal(plain, "k", {"Nigeria": [1.0]}) == {"Nigeria": [1.0]}
    assert literal(plain, "k", " ['a', \"b's\"]") == ["a", "b's"]
    assert literal(plain, "k", "defaultdict(<class 'list'>, {'a {b}': [1]})") == {"a {b}": [1]}


def test_goqa_names_and_countries():
    assert len(goqa.COUNTRIES) == 14 and goqa.COUNTRIES[2] == "India (Current national sample)"
    assert goqa.asked_countries("goqa_4", goqa.Settings()) == (["Japan"], True)
    assert goqa.asked_countries("goqma_13", goqa.Settings()) == (["New Zealand"], True)
    assert goqa.asked_countries("goqa", goqa.Settings()) == (list(goqa.COUNTRIES), False)
    assert goqa.asked_countries("goqa", goqa.Settings(countries=["Egypt"])) == (["Egypt"], False)
    for name in ("goqa_14", "goqa_x", "goqa_-1"):
        with pytest.raises(
            UserError, match=rf"datasets=\[{name}\]: no country .* the indices are 0 Nigeria, 1 Egypt"
        ):
            goqa.asked_countries(name, goqa.Settings())
    with pytest.raises(UserError, match=r"data.goqa_1.countries: only goes with a name without index"):
        goqa.asked_countries("goqa_1", goqa.Settings(countries=["Egypt"]))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mode": "rank"}, "mode=rank: must be one of best_random, ranked; did you mean 'ranked'"),
        ({"split_by": "country"}, "split_by=country: must be one of question, row"),
        ({"train_frac": 0.9}, r"train_frac=0.9: must be in \(0, 0.8\]"),
        ({"train_frac": 0.0}, "train_frac=0.0"),
        ({"test_fraction": 0.6, "validation_fraction": 0.5}, "nothing is left to train on"),
        ({"kfold": 5}, "kfold=5: must be 0 to 4"),
        ({"max_pairs": 0}, "max_pairs=0: must be at least 1"),
        ({"split_by": "row", "split_seed": 3}, "split_seed=3: not read with split_by=row"),
        ({"countries": ["A", "A"]}, "a country occurs twice"),
    ],
)
def test_goqa_settings_are_checked(settings, problem):
    with pytest.raises(UserError, match=problem):
        goqa.Settings(**settings)


@pytest.fixture(scope="module")
def survey(tmp_path_factory) -> str:
    """200 questions that three countries answer."""
    path = tmp_path_factory.mktemp("goqa") / "g.jsonl"
    rng = stream(0, "test survey")
    lines = []
    for i in range(200):
        answers = {c: list(rng.dirichlet([1.0] * 3)) for c in ("Nigeria", "Egypt", "Atlantis")}
        lines.append(row(question=f"Question {i}?", selections=answers, options=["a", "b", "c"]))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def split_questions(splits):
    return {s: {(e.meta["country"], e.prompt.split("on: ")[1]) for e in part} for s, part in splits.items()}


def test_goqa_question_is_in_one_split_for_all_countries(survey, caplog):
    caplog.set_level(logging.INFO, logger="robust_pref")

    def load(**settings):
        countries = ["Nigeria", "Egypt", "Atlantis"]
        return goqa.load("goqa", goqa.Settings(path=survey, countries=countries, **settings), 0)

    splits = load()
    assert list(splits) == ["train", "validation", "test"] and sum(map(len, splits.values())) == 600
    assert {e.group for e in splits["test"]} == {"Nigeria", "Egypt", "Atlantis"}
    texts = {s: {q for _, q in pairs} for s, pairs in split_questions(splits).items()}
    assert not texts["train"] & texts["test"] and not texts["train"] & texts["validation"]
    assert not texts["test"] & texts["validation"]
    assert 8 <= len(texts["test"]) <= 35 and 8 <= len(texts["validation"]) <= 35
    # training on less leaves the held-out questions alone
    fewer = load(train_frac=0.4)
    assert fewer["test"] == splits["test"] and fewer["validation"] == splits["validation"]
    assert 0 < len(fewer["train"]) < 0.65 * len(splits["train"])
    assert {e.uid for e in fewer["train"]} < {e.uid for e in splits["train"]}
    assert load(split_seed=1)["test"] != splits["test"]
    caplog.clear()
    by_row = split_questions(load(split_by="row"))
    assert not by_row["train"] & by_row["test"]
    assert "goqa: split by row: each country's rows on their own" in caplog.text


def test_goqa_index_names_the_group_and_gives_the_same_split_as_the_list(survey):
    one = goqa.load("goqa_1", goqa.Settings(path=survey), 3)
    both = goqa.load("goqa", goqa.Settings(path=survey, countries=["Nigeria", "Egypt"]), 4)
    for split in one:
        assert {e.group for e in one[split]} == {"goqa_1"} and one[split][0].uid.startswith(
            f"goqa_1/{split}:"
        )
        egypt = [e for e in both[split] if e.group == "Egypt"]
        assert [(e.prompt, e.responses) for e in egypt] == [(e.prompt, e.responses) for e in one[split]]


def test_goqa_folds_cover_every_question_once(survey):
    for split_by in ("question", "row"):
        tested = []
        for fold in range(5):
            splits = goqa.load("goqa_0", goqa.Settings(path=survey, kfold=fold, split_by=split_by), 0)
            held_out = {e.prompt for s in ("test", "validation") for e in splits[s]}
            assert not held_out & {e.prompt for e in splits["train"]}
            assert len(held_out) + len(splits["train"]) == 200
            if split_by == "row":
                assert len(splits["test"]) == len(splits["validation"]) == 20
            tested += held_out
        assert len(tested) == len(set(tested)) == 200


def test_goqa_folds_by_row_are_those_of_scikit_learn():
    """KFold(5, shuffle=True, random_state=42) over ten rows."""
    folds = [
        [i for i, p in enumerate(goqa.place_rows(10, goqa.Settings(split_by="row", kfold=k))) if p != "train"]
        for k in range(5)
    ]
    assert folds == [[1, 8], [0, 5], [2, 7], [4, 9], [3, 6]]


@pytest.mark.parametrize("split_by", ["question", "row"])
def test_goqa_fractions_go_to_the_split_they_name(survey, split_by):
    settings = goqa.Settings(
        path=survey, test_fraction=0.3, validation_fraction=0.05, train_frac=0.65, split_by=split_by
    )
    sizes = {split: len(part) for split, part in goqa.load("goqa_0", settings, 0).items()}
    assert 40 <= sizes["test"] <= 80 and 2 <= sizes["validation"] <= 20 and sum(sizes.values()) == 200


@pytest.mark.parametrize("kfold", [None, 1])
def test_goqa_train_frac_is_a_share_of_all_questions(kfold):
    settings = goqa.Settings(train_frac=0.3, kfold=kfold)
    places = [goqa.place_question(f"Question {i}?", settings) for i in range(5000)]
    shares = {place: places.count(place) / 5000 for place in ("train", "test", "validation", None)}
    assert shares == pytest.approx({"train": 0.3, "test": 0.1, "validation": 0.1, None: 0.5}, abs=0.02)


@pytest.mark.parametrize(
    "n", [93, 83, 85, 87]
)  # 19, 17 (half of which is rounded to even), 17 and 17 rows held out
def test_goqa_rows_are_split_as_pandas_samples_them(n):
    import pandas

    frame = pandas.DataFrame({"i": range(n)})
    train = frame.sample(frac=0.8, random_state=42)
    test = frame.drop(train.index)
    true_test = test.sample(frac=0.5, random_state=42)
    places = goqa.place_rows(n, goqa.Settings(split_by="row"))
    assert {i for i, p in enumerate(places) if p == "train"} == set(train.i)
    assert {i for i, p in enumerate(places) if p == "test"} == set(true_test.i)
    assert {i for i, p in enumerate(places) if p == "validation"} == set(test.drop(true_test.index).i)
    half = goqa.place_rows(n, goqa.Settings(split_by="row", train_frac=0.4))
    assert {i for i, p in enumerate(half) if p == "train"} == set(train.sample(frac=0.5, random_state=42).i)
    assert [p for p in half if p == "test"] == [p for p in places if p == "test"]


def test_goqa_absent_country_and_empty_split_are_errors(survey, tmp_path):
    with pytest.raises(
        UserError,
        match=r"'Atlantic' is not in the data; did you mean 'Atlantis'\?; there are Atlantis, Egypt",
    ):
        goqa.load("goqa", goqa.Settings(path=survey, countries=["Atlantic"]), 0)
    with pytest.raises(UserError, match="'Japan' is not in the data"):
        goqa.load("goqa_4", goqa.Settings(path=survey), 0)
    with pytest.raises(UserError, match=r"data.goqa_0: Nigeria has no \w+ pair; it has 3 questions"):
        goqa.load("goqa_0", goqa.Settings(path=str(FIXTURES / "goqa.jsonl")), 0)


def test_goqa_repeated_questions_are_used_once(tmp_path, caplog):
    path = tmp_path / "g.jsonl"
    lines = [
        row(question=f"Q{i % 40}?", selections={"Nigeria": [0.9, 0.1] if i < 40 else [0.2, 0.8]})
        for i in range(80)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        splits = goqa.load("goqa_0", goqa.Settings(path=str(path)), 0)
    examples = [example for part in splits.values() for example in part]
    assert len(examples) == 40 and {e.response("chosen") for e in examples} == {"A"}  # the first is used
    assert "goqa_0: 40 questions skipped: the same question with the same options came before" in caplog.text


def test_goqa_real_file(real_data_dir):
    path = str(real_data_dir / "global_opinions_subset.jsonl.gz")
    sizes = {"Nigeria": 98, "Egypt": 117, "India (Current national sample)": 93, "China": 48, "Japan": 132}
    settings = goqa.Settings(path=path, countries=list(sizes), expected_rows=1299)
    splits = goqa.load("goqa", settings, 0)
    for name, size in sizes.items():
        used = sum(e.group == name for part in splits.values() for e in part)
        assert size - 2 <= used <= size  # at most two questions have only tied answers
    for e in [e for part in splits.values() for e in part]:
        assert [role for role, _ in e.responses] == ["chosen", "rejected"]
        assert e.meta["frequencies"][0] > e.meta["frequencies"][1]
    many = goqa.load("goqma_0", goqa.Settings(path=path, mode="ranked"), 0)
    assert sum(map(len, many.values())) > 3 * 98


# ---------------------------------------------------------------------------------------------- oqa


def load_oqa(name="oqa_SEX_Male", **settings):
    return oqa.load(
        name, oqa.Settings(**{"path": str(FIXTURES / "oqa.csv"), "test_fraction": 0.0, **settings}), 0
    )


def test_oqa_prompt_to_the_letter(caplog):
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        walk, bus, early = load_oqa()["train"]
    assert walk.prompt == (
        "Answer the following question as if you were SEX of Male: Do you walk, often?\n"
        "Respond with a single letter:\nA. Yes\nB. No"
    )
    assert walk.responses == (("chosen", "B"), ("rejected", "A")) and walk.group == "oqa_SEX_Male"
    # the distribution has no "Not sure": it is listed, and never in a pair
    assert bus.prompt.endswith("A. Good\nB. Fair\nC. Bad\nD. Not sure")
    assert bus.response("chosen") == "B" and bus.response("rejected") in "AC"
    assert early.uid == "oqa_SEX_Male/train:7" and early.response("chosen") == "A"
    assert "1 questions whose last option has no probability" in caplog.text


def test_oqa_modes_draw_the_pairs_that_they_name():
    drawn = {
        mode: {
            oqa.draw((0.5, 0.2, 0.3), "Q?", oqa.Settings(mode=mode, pair_seed=seed))[0] for seed in range(60)
        }
        for mode in ("best_worst", "best_random", "random")
    }
    assert drawn == {
        "best_worst": {(0, 1)},
        "best_random": {(0, 1), (0, 2)},
        "random": {(0, 1), (0, 2), (2, 1)},
    }


def test_oqa_names_may_be_written_with_underscores():
    for name in ("oqa_INCOME_Less than $30,000", "oqa_INCOME_less_than_30_000"):
        (example,) = load_oqa(name)["train"]
        assert "INCOME of Less than $30,000: Is it late?" in example.prompt and example.group == name
    with pytest.raises(
        UserError, match=r"no such group; did you mean 'SEX_Male'\?; there are INCOME_Less than"
    ):
        load_oqa("oqa_SEX_Mail")
    with pytest.raises(UserError, match="say which group: oqa_<ATTRIBUTE>_<GROUP>"):
        load_oqa("oqa")


@pytest.mark.parametrize(
    "numbers", ["[0.3]", "[0.2 0.2 0.2 0.2 0.2]", "0.3 0.7", "[a b]", "[nan 1]", "[-1 2]", ""]
)
def test_oqa_bad_distributions_are_named(tmp_path, numbers):
    path = tmp_path / "o.csv"
    header, options = "question,options,attribute,group,D_H\n", "\"['a', 'b', 'c', 'Refused']\""
    path.write_text(f"{header}Q,{options},SEX,Male,[0.1 0.2 0.7]\nQ2,{options},SEX,Male,{numbers}\n")
    with pytest.raises(UserError, match=r"o.csv:3: D_H: "):
        load_oqa(path=str(path))


def test_oqa_distribution_may_include_the_dropped_options(tmp_path):
    path = tmp_path / "o.csv"
    path.write_text(
        "question,options,attribute,group,D_H\nQ,\"['Refused', 'b', 'c']\",SEX,Male,[0.8 0.05 0.15]\n"
    )
    (example,) = load_oqa(path=str(path))["train"]
    assert example.prompt.endswith("A. b\nB. c") and example.response("chosen") == "B"


def test_oqa_real_file(real_data_dir):
    path = str(real_data_dir / "opinion_qa_test.csv.gz")
    settings = {"path": path, "test_fraction": 0.2, "validation_fraction": 0.1}
    male, female = load_oqa(**settings), load_oqa("oqa_SEX_Female", **settings)
    assert sum(map(len, male.values())) == 154 and sum(map(len, female.values())) == 165
    trained = {e.meta["question"] for part in (male, female) for e in part["train"]}
    held_out = {
        e.meta["question"] for part in (male, female) for s in ("test", "validation") for e in part[s]
    }
    assert not trained & held_out
    assert [e.response("chosen") for e in load_oqa(mode="best_worst", **settings)["test"]] == [
        e.response("chosen") for e in male["test"]
    ]


# ---------------------------------------------------------------------------------------------- drawing pairs


def test_pair_rules():
    rng = stream(0, "test pairs")
    assert best_worst([0.2, 0.5, 0.2, 0.1]) == [(1, 3)]
    assert best_worst([0.5, 0.5]) == best_random([0.5, 0.5], rng) == softmax_pair([0.5, 0.5], rng) == []
    assert ranked([0.5, 0.5], 4, rng) == []
    assert best_random([0.4, 0.4, 0.2], rng) == [(0, 2)]  # a tied answer never loses
    draws = [softmax_pair([0.0, 2.0, 1.0], rng) for _ in range(2000)]
    weights = np.exp([0.0, 2.0, 1.0])
    p = weights / weights.sum()
    # P({i, j}) of two draws without replacement
    expected = {
        (j, i): p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j]) for i, j in ((0, 1), (0, 2), (2, 1))
    }
    for pair, probability in expected.items():
        rate = sum(draw == [pair] for draw in draws) / len(draws)
        assert abs(rate - probability) < 4 * np.sqrt(probability * (1 - probability) / len(draws)), pair
