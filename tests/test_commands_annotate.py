"""Auxiliary preferences: every scorer against numbers computed otherwise, calibration, cross-fitting, resuming, bad rows."""

from __future__ import annotations

import csv
import json
import logging
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import run_data
from commands import annotate, calibration, oracles, scorers
from commands import rows as jsonl
from commands.annotate import Settings
from commands.calibration import Pairs
from commands.judge import JudgeSettings
from data import opinions
from engine.stats import cluster_bootstrap
from losses.gpm import preference_score
from plot_scripts.make_figures import main as make_figures
from tests.test_commands_judge import longer, serving
from tests.vrpo_tools import local, run_of, trained
from utils import UserError


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def pair(uid: str, prompt: str, chosen: str, rejected: str, *aux: list[str], **more) -> dict:
    row = {"uid": uid, "prompt": prompt, "chosen": chosen, "rejected": rejected, "group": "g", **more}
    return row | ({"aux_responses": list(aux)} if aux else {})


@pytest.fixture
def folder(tmp_path) -> Path:
    """12 rows with 0 to 2 auxiliary pairs, and 4 of validation without."""
    rows = [
        pair(f"d:{i}", f"P{i % 5}", "yes " * (i % 3 + 1), "no", *[[f"a{m}", f"bb{i}"] for m in range(i % 3)])
        for i in range(12)
    ]
    jsonl.write(tmp_path / "in" / "train.jsonl", rows)
    jsonl.write(
        tmp_path / "in" / "validation.jsonl", [pair(f"v:{i}", f"Q{i}", "yes", "no " * i) for i in range(4)]
    )
    return tmp_path


def settings(folder: Path, **how) -> Settings:
    return Settings(data=str(folder / "in"), out=str(folder / "out"), **how)


def lengths(prompt, responses, row):
    return [0.1 * len(r) for r in responses]


def matrix(prompt, responses, row):
    """Not antisymmetric: prefers what is named first."""
    n = len(responses)
    return [
        [min(1.0, 0.6 + 0.01 * (len(responses[i]) - len(responses[j]))) for j in range(n)] for i in range(n)
    ]


def nan_for_p3(prompt, responses, row):
    return [float("nan") if prompt == "P3" else 1.0 for _ in responses]


def remembers(prompt, responses, row):
    """Sure of the labels of train, right in three of four rows of validation."""
    kind, number = row["uid"].split(":")
    return [9.0 if kind == "d" else 3.0 if int(number) % 4 else -3.0, 0.0, *responses[2:]]


def wrong_shape(prompt, responses, row):
    return [1.0]


def no_probability(prompt, responses, row):
    return [[1.5] * len(responses)] * len(responses)


HERE = "tests.test_commands_annotate"


def function(folder: Path, name: str, **how) -> list[dict]:
    annotate.run(run_of(folder), settings(folder, scorer="function", function=f"{HERE}:{name}", **how))
    return rows_of(folder / "out" / "train.jsonl")


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_scores_of_a_function_become_preferences(folder):
    for row, before in zip(
        function(folder, "lengths", calibrate="none"), rows_of(folder / "in" / "train.jsonl"), strict=True
    ):
        labelled = sigmoid(0.1 * (len(row["chosen"]) - len(row["rejected"])))
        if "aux_responses" in before:
            assert row["chosen_preference"] == pytest.approx(labelled)
            assert row["aux_preferences"] == pytest.approx(
                [sigmoid(0.1 * (len(a) - len(b))) for a, b in row["aux_responses"]]
            )
        else:
            assert "chosen_preference" not in row  # the plain loss needs none
        assert row["annotation"]["labelled"] == pytest.approx(labelled)
        assert row["annotation"]["function"] == f"{HERE}:lengths"
        assert {k: v for k, v in row.items() if k in before} == before
    run = run_of(folder, data=local(folder / "out")[:2])
    assert len(run_data.load_examples(run)["train"][0]) > 0


def test_probabilities_of_a_function_are_averaged_over_both_orders(folder):
    for row in function(folder, "matrix", calibrate="none"):
        gap = len(row["chosen"]) - len(row["rejected"])
        forward, backward = (min(1.0, 0.6 + 0.01 * s * gap) for s in (1, -1))
        assert row["annotation"]["labelled"] == pytest.approx((forward + 1 - backward) / 2)


def test_scores_of_a_function_that_was_edited_are_refused(folder, monkeypatch):
    """The same path to other code: the old scores would be taken for the new function's."""
    file = folder / "edited_scorer.py"
    monkeypatch.syspath_prepend(str(folder))
    how = settings(folder, scorer="function", function="edited_scorer:f", calibrate="none")
    for factor, refused in ((1, False), (1, False), (-1, True)):
        file.write_text(
            f"def f(prompt, responses, row):\n    return [{factor} * len(r) for r in responses]\n"
        )
        monkeypatch.delitem(sys.modules, "edited_scorer", raising=False)
        with pytest.raises(UserError, match=r"other settings \(source: ") if refused else nullcontext():
            annotate.run(run_of(folder), how)


def test_scores_of_rows_that_were_edited_or_of_another_precision_are_refused(folder):
    """The same names with other texts: the old scores would be taken for theirs."""
    function(folder, "lengths")
    with pytest.raises(UserError, match=r"made with other settings \(precision: fp32 -> bf16"):
        annotate.run(
            run_of(folder, "precision=bf16"),
            settings(folder, scorer="function", function=f"{HERE}:lengths"),
        )
    file = folder / "in" / "train.jsonl"
    file.write_text(file.read_text().replace('"no"', '"never"'))
    with pytest.raises(UserError, match=r"made with other settings \(rows: "):
        function(folder, "lengths")


def test_rows_in_the_papers_form_get_its_four_columns(tmp_path):
    row = {"prompt": "P", "chosen": "aaaa", "rejected": "b", "a_1": "a", "a_2": "bb", "chosen_preference": 0.9, "rejected_preference": 0.1, "a_1_preference": 0.5, "a_2_preference": 0.5}  # fmt: skip
    jsonl.write(tmp_path / "in" / "train.jsonl", [row])
    (found,) = function(tmp_path, "lengths", calibrate="none")
    assert found["chosen_preference"] == pytest.approx(sigmoid(0.3))
    assert found["a_1_preference"] == pytest.approx(sigmoid(-0.1))
    for one, other in (("chosen", "rejected"), ("a_1", "a_2")):
        assert found[f"{one}_preference"] + found[f"{other}_preference"] == pytest.approx(1, abs=1e-12)
    assert jsonl.read(tmp_path / "out" / "train.jsonl")[0].example.scalars["chosen_preference"]


def test_preferences_of_another_scorer_are_replaced(tmp_path):
    old = {
        "chosen_preference": 0.9,
        "rejected_preference": 0.1,
        "aux_preferences": [0.8],
        "annotation": "old",
    }
    jsonl.write(tmp_path / "in" / "train.jsonl", [pair("x", "P", "aaaa", "b", ["a", "bb"], **old)])
    (row,) = function(tmp_path, "lengths", calibrate="none")
    assert row["chosen_preference"] == pytest.approx(sigmoid(0.3)) and "rejected_preference" not in row
    assert row["aux_preferences"] == pytest.approx([sigmoid(-0.1)]) and row["annotation"] != "old"
    jsonl.read(tmp_path / "out" / "train.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan_for_p3", "d:3: .*scores must be finite"),
        ("wrong_shape", r"d:0: .*array of shape \(1,\); 2 scores or a 2 x 2 matrix"),
        ("no_probability", "d:0: .*not probabilities"),
        ("nothing", "cannot be imported"),
    ],
)
def test_a_functions_mistakes_name_the_row(folder, name, message):
    with pytest.raises(UserError, match=message):
        function(folder, name)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "P", "chosen": "a"}], r"train.jsonl:1: rejected: no such column"),
        (
            [{"prompt": "P", "completion": "a"}],
            r"train.jsonl:1: chosen: no such column; auxiliary preferences are for",
        ),
        (
            [pair("x", "P", "a", "b"), pair("x", "P", "a", "c")],
            r"train.jsonl:2: uid: 'x' is also the name of line 1",
        ),
        ([pair("x", "P", "a", "b", ["c"])], r"train.jsonl:1: aux_responses\[0\]: two responses"),
    ],
)
def test_bad_rows_are_one_message_with_the_line(tmp_path, rows, message):
    jsonl.write(tmp_path / "in" / "train.jsonl", rows)
    with pytest.raises(UserError, match=message):
        function(tmp_path, "lengths")


def test_nan_in_a_file_names_the_line(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "train.jsonl").write_text(
        '{"prompt": "P", "chosen": "a", "rejected": "b", "p_chosen": NaN}\n'
    )
    with pytest.raises(UserError, match=r"train.jsonl:1: .*NaN is no JSON number"):
        function(tmp_path, "lengths")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "annotate.model=null: give the trained scorer"),
        ({"model": "m", "cross_fit": 2}, "the folds train their own"),
        ({"cross_fit": 1}, "at least 2"),
        (
            {"cross_fit": 2, "calibrate": "validation"},
            "calibrate=validation: with annotate.cross_fit only train",
        ),
        ({"scorer": "function"}, "annotate.function=None: they go together"),
        ({"scorer": "judge"}, "annotate.judge=None: they go together"),
        ({"model": "m", "function": "a:b"}, "they go together"),
        ({"scorer": "function", "function": "a:b", "cross_fit": 2}, "is not trained here"),
        ({"model": "m", "batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_that_do_not_go_together_are_user_errors(how, message):
    with pytest.raises(UserError, match=message):
        Settings(data="d", out="o", **how)


def test_places_that_cannot_be_are_told(folder):
    with pytest.raises(UserError, match="must not be where the data are"):
        annotate.run(
            run_of(folder),
            Settings(data=str(folder / "in"), out=str(folder / "in"), scorer="function", function="a:b"),
        )
    with pytest.raises(UserError, match="no such file, and no folder"):
        annotate.run(
            run_of(folder),
            Settings(data=str(folder / "no"), out=str(folder / "o"), scorer="function", function="a:b"),
        )
    with pytest.raises(UserError, match=r"there is no test\.jsonl, only train, validation"):
        function(folder, "lengths", calibrate="test")


def test_an_interrupted_command_continues(folder, monkeypatch):
    whole = function(folder, "lengths", batch_size=2)
    file = folder / "out" / "scores" / "train.jsonl"
    content, calls = file.read_bytes(), []
    file.write_bytes(b"".join(content.splitlines(keepends=True)[:5]) + b'{"uid')  # in the middle of a batch
    original = scorers.FunctionScorer._row
    monkeypatch.setattr(
        scorers.FunctionScorer, "_row", lambda self, one: calls.append(one) or original(self, one)
    )
    assert function(folder, "lengths", batch_size=2) == whole
    assert file.read_bytes() == content
    assert len(calls) == 8  # the batch of the fifth and sixth row again: scores may round by their company
    with pytest.raises(UserError, match="made with other settings"):
        function(folder, "matrix")


def test_a_name_may_hold_a_line_separator(tmp_path):
    jsonl.write(tmp_path / "in" / "train.jsonl", [pair("a\u2028b", "P", "yes", "no", ["a", "bb"])])
    (row,) = function(tmp_path, "lengths", calibrate="none")
    assert row["uid"] == "a\u2028b" and row["aux_preferences"] == [pytest.approx(sigmoid(-0.1))]


# ---------------------------------------------------------------------------------------------- trained scorers


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory) -> Path:
    """A reward model and a general preference model, each after a few steps, and a language model."""
    folder = tmp_path_factory.mktemp("scorers")
    few = ("n_examples=16", "lr=0.01", "warmup_steps=0", "do_first_eval=false")
    trained(folder, "rm", "loss=reward", *few)
    trained(folder, "gpm", "loss=gpm", "loss.tau=0.5", "loss.dim=4", *few)
    trained(folder, "lm", "loss=sft", "n_examples=8", "do_first_eval=false")
    return folder


def head_outputs(archive: str, texts: list[tuple[str, str]]) -> torch.Tensor:
    """What Hugging Face's own sequence classifier says about prompt + response + EOS."""
    model = AutoModelForSequenceClassification.from_pretrained(archive)
    tokenizer = AutoTokenizer.from_pretrained(archive)
    found = []
    for prompt, response in texts:
        ids = (
            tokenizer.encode(prompt)
            + tokenizer.encode(response, add_special_tokens=False)
            + [tokenizer.eos_token_id]
        )
        assert prompt in tokenizer.decode(ids)
        with torch.no_grad():
            found.append(model(input_ids=torch.tensor([ids])).logits[0].double())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["rm", "gpm"])
def test_trained_scorers_say_what_their_checkpoint_says_to_hugging_face(models_folder, folder, kind):
    archive = f"{models_folder}/runs/{kind}/LATEST"
    scorer = {"rm": "reward", "gpm": "gpm"}[kind]
    annotate.run(run_of(folder), settings(folder, scorer=scorer, model=archive, calibrate="none"))
    odds = set()
    for row in rows_of(folder / "out" / "train.jsonl"):
        pairs = [(row["chosen"], row["rejected"]), *row.get("aux_responses", [])]
        texts = [(row["prompt"], text) for two in pairs for text in two]
        values = head_outputs(archive, texts)
        first, second = values[::2], values[1::2]
        expected = (first - second)[:, 0] if kind == "rm" else preference_score(first, second) / 0.5
        assert row["annotation"].get("tau") == (None if kind == "rm" else 0.5)  # of what the scores depend on
        found = [row["annotation"]["labelled"], *row.get("aux_preferences", [])]
        assert found == pytest.approx(torch.sigmoid(expected).tolist(), abs=1e-6)
        odds.add(round(float(expected[0]), 9))
    assert len(odds) > 4  # they depend on the prompt: only 3 different pairs of responses occur


def test_a_trained_scorer_is_not_calibrated_on_labels_that_it_may_have_seen(models_folder, folder, caplog):
    archive = f"{models_folder}/runs/rm/LATEST"
    annotate.run(run_of(folder), settings(folder, model=archive))
    assert json.loads((folder / "out" / "calibration.json").read_text())["split"] == "validation"
    alone = Settings(data=str(folder / "in" / "train.jsonl"), out=str(folder / "alone"), model=archive)
    with caplog.at_level(logging.WARNING, "robust_pref"):
        annotate.run(run_of(folder), alone)
    assert "the preferences are not calibrated" in caplog.text
    assert not (folder / "alone" / "calibration.json").exists()
    assert {row["annotation"]["temperature"] for row in rows_of(folder / "alone" / "train.jsonl")} == {1.0}


def test_a_language_model_or_another_kind_of_scorer_is_refused(models_folder, folder):
    place = f"{models_folder}/runs"
    with pytest.raises(UserError, match="was trained with SFT; train one with loss=reward"):
        annotate.run(run_of(folder), settings(folder, model=f"{place}/lm/LATEST"))
    with pytest.raises(UserError, match="was trained with GPM"):
        annotate.run(run_of(folder), settings(folder, model=f"{place}/gpm"))
    weights = f"{place}/lm/LATEST/model.safetensors"  # a file tells nothing about its run
    (folder / "w").mkdir()
    target = folder / "w" / "model.safetensors"
    target.write_bytes(Path(weights).read_bytes())
    with pytest.raises(UserError, match="has no reward head: it is a language model"):
        annotate.run(run_of(folder, "loss=reward"), settings(folder, model=str(target)))


def test_folds_are_scored_by_models_that_have_not_seen_their_prompts(folder):
    words = ("n_examples=8", "do_first_eval=false", "loss=reward", "lr=0.01")
    annotate.run(run_of(folder, *words), settings(folder, cross_fit=2))
    rows = {row["uid"]: row for row in rows_of(folder / "out" / "train.jsonl")}
    seen = set()
    for fold in (0, 1):
        place = folder / "out" / "cross_fit" / f"fold_{fold}"
        train, held = (rows_of(place / f"{name}.jsonl") for name in ("train", "test"))
        assert {r["prompt"] for r in train}.isdisjoint(r["prompt"] for r in held)
        assert len(train) + len(held) == len(rows) and not any("aux_responses" in r for r in train)
        assert all(rows[r["uid"]]["annotation"]["fold"] == fold for r in held)
        seen |= {r["uid"] for r in held}
    assert seen == set(rows)
    assert len({row["annotation"]["weights"] for row in rows.values()}) == 2
    assert json.loads((folder / "out" / "calibration.json").read_text())["split"] == "train"
    before = (folder / "out" / "train.jsonl").read_bytes()
    annotate.run(run_of(folder, *words), settings(folder, cross_fit=2))  # nothing is trained again
    assert (folder / "out" / "train.jsonl").read_bytes() == before
    with pytest.raises(
        UserError, match=r"fold_0/train.jsonl: was made from other rows or for another annotate"
    ):
        annotate.run(run_of(folder, *words), settings(folder, cross_fit=3))
    with pytest.raises(UserError, match="use fewer folds"):
        annotate.run(
            run_of(folder, *words), Settings(data=str(folder / "in"), out=str(folder / "o2"), cross_fit=50)
        )


# ---------------------------------------------------------------------------------------------- judge


def test_rows_that_the_judge_cannot_answer_lose_all_auxiliary_pairs(folder):
    def answer(body):
        return "?" if "a1" in body["messages"][1]["content"] else longer(body)

    with serving(answer) as server:
        how = JudgeSettings(url=server.url, model="m", workers=2, retries=0)
        annotate.run(run_of(folder), settings(folder, scorer="judge", judge=how, calibrate="none"))
    for i, row in enumerate(rows_of(folder / "out" / "train.jsonl")):
        if i % 3 == 2:  # the second auxiliary pair could not be judged
            assert "aux_responses" not in row and "chosen_preference" not in row
            assert "could not be read" in row["annotation"]["failed"]
        else:
            assert row["annotation"]["labelled"] == pytest.approx(2.5 / 3)
            assert row.get("aux_preferences", []) == pytest.approx([0.5 / 3] * (i % 3))
    assert len(jsonl.read(folder / "out" / "train.jsonl")) == 12


# ---------------------------------------------------------------------------------------------- oracle


def test_the_oracle_is_the_law():
    prompt = opinions.prompt_of("south", "wages", opinions.WORDINGS[0], "May", "21")
    p = oracles.opinions(prompt, ["A", "C", "junk", "", "C"])
    law = opinions.preference_probability("south", "wages", opinions.WORDINGS[0], 0, 2)
    assert p[0, 1] == law and p[1, 0] == pytest.approx(1 - law)
    assert p[1, 4] == p[2, 3] == 0.5 and p[0, 2] == 1 - opinions.NOISE and p[3, 0] == opinions.NOISE
    np.testing.assert_allclose(p + p.T, 1)
    with pytest.raises(UserError, match="not a prompt of the built-in data"):
        oracles.opinions("Q", ["A", "B"])


# ---------------------------------------------------------------------------------------------- calibration


def overconfident(n: int, temperature: float, seed: int = 0) -> Pairs:
    """Outcomes of probability sigmoid(odds / temperature), chosen first as in the files."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0, 3, n)
    wins = rng.uniform(size=n) < 1 / (1 + np.exp(-odds / temperature))
    return Pairs(
        np.where(wins, odds, -odds),
        np.ones(n),
        tuple(f"p{i // 2}" for i in range(n)),
        tuple(f"u{i}" for i in range(n)),
    )


def test_the_temperature_is_found(tmp_path):
    for temperature in (0.5, 1.0, 3.0):
        pairs = overconfident(20_000, temperature)
        fitted = calibration.fit_temperature(pairs)
        assert fitted == pytest.approx(temperature, rel=0.06)
        grid = [
            calibration.nll(pairs.odds / t, pairs.outcome).mean()
            for t in (0.98 * fitted, fitted, 1.02 * fitted)
        ]
        assert grid[1] == min(grid)
    found = calibration.calibrate(overconfident(4000, 3.0), "validation", tmp_path)
    assert found.calibrated.log_loss < found.raw.log_loss and found.calibrated.brier < found.raw.brier
    assert found.raw.expected_calibration_error > 0.1 > 0.04 > found.calibrated.expected_calibration_error
    assert found.raw.accuracy == found.calibrated.accuracy and found.raw.num_prompts == 2000


def test_the_curve_counts_by_hand():
    odds = np.log(
        np.array([0.12, 0.18, 0.15, 0.15, 0.9, 0.9]) / (1 - np.array([0.12, 0.18, 0.15, 0.15, 0.9, 0.9]))
    )
    outcome = np.array([0, 1, 0, 0, 1, 0.0])
    found = calibration.curve(odds, outcome, ["a", "a", "b", "c", "d", "e"])
    assert [b["n"] for b in found.bins] == [4, 2] and [b["observed"] for b in found.bins] == [0.25, 0.5]
    together = cluster_bootstrap([0, 1, 0, 0], list("aabc"))
    assert (found.bins[0]["observed_low"], found.bins[0]["observed_high"]) == (together.low, together.high)
    assert found.expected_calibration_error == pytest.approx((4 * 0.1 + 2 * 0.4) / 6)
    p = 1 / (1 + np.exp(-odds))
    assert found.brier == pytest.approx(((p - outcome) ** 2).mean())
    assert found.log_loss == pytest.approx(-np.log(np.where(outcome == 1, p, 1 - p)).mean())
    assert found.accuracy == pytest.approx(4 / 6)


def test_turning_the_pairs_changes_no_likelihood():
    pairs = overconfident(500, 2.0)
    sign, outcome = calibration.turned(pairs)
    assert 150 < (sign > 0).sum() < 350
    np.testing.assert_allclose(
        calibration.nll(pairs.odds * sign, outcome), calibration.nll(pairs.odds, pairs.outcome)
    )


def test_half_of_the_prompts_never_sets_its_own_temperature():
    pairs = overconfident(40, 2.0)
    changed = Pairs(np.where(np.arange(40) == 7, 50.0, pairs.odds), pairs.outcome, pairs.prompt, pairs.uid)
    ratio = calibration.cross_fitted(changed) / calibration.cross_fitted(pairs)
    moved = ~np.isclose(ratio, 1.0)
    assert moved[7] and not moved[6] and 0 < moved.sum() < 40  # 6 has the prompt of 7


def test_the_files_are_what_the_figure_reads(folder):
    function(folder, "lengths")
    found = json.loads((folder / "out" / "calibration.json").read_text())
    assert found["split"] == "validation" and found["raw"]["n"] == 4
    with (folder / "out" / "calibration.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert {row["method"] for row in table} == {"raw", "calibrated"} and len(table) == 8
    written = make_figures([f"data={folder}/out/calibration.csv", "figure=calibration", f"out={folder}"])
    assert all(path.exists() for path in written)
    row = rows_of(folder / "out" / "train.jsonl")[2]
    odds = 0.1 * (len(row["chosen"]) - len(row["rejected"]))
    assert row["chosen_preference"] == pytest.approx(sigmoid(odds / found["temperature"]))


def test_soft_labels_are_what_the_scorer_is_calibrated_on(tmp_path):
    rows = [pair(f"d:{i}", f"P{i}", "yes " * (i + 1), "no", p_chosen=0.75) for i in range(8)]
    jsonl.write(tmp_path / "in" / "train.jsonl", rows)
    function(tmp_path, "lengths", calibrate="train")
    with (tmp_path / "out" / "calibration.csv").open() as handle:
        assert {row["y"] for row in csv.DictReader(handle)} == {"0.75", "0.25"}  # as named, and turned


def test_a_scorer_that_was_trained_on_the_labels_is_warned_about(tmp_path, caplog):
    for name, kind, number in (("train", "d", 12), ("validation", "v", 40)):
        rows = [pair(f"{kind}:{i}", f"P{i}", "yes", "no") for i in range(number)]
        jsonl.write(tmp_path / "in" / f"{name}.jsonl", rows)
    with caplog.at_level(logging.WARNING, "robust_pref"):
        function(tmp_path, "remembers")
    assert "on validation: the scorer was trained on these labels, and repeats their noise" in caplog.text


def test_a_scorer_no_better_than_a_coin_is_warned_about(tmp_path, caplog):
    rng = np.random.default_rng(0)
    n = 200
    pairs = Pairs(rng.normal(size=n), np.ones(n), tuple(map(str, range(n))), tuple(map(str, range(n))))
    with caplog.at_level(logging.WARNING, "robust_pref"):
        calibration.calibrate(pairs, "validation", tmp_path).log()
    assert "no better than a coin" in caplog.text
