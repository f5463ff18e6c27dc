"""hh, shp, se, the hub, and what all file sources share: splits, counts, rejected rows, settings."""

from __future__ import annotations

import dataclasses
import gzip
import importlib
import json
import logging
import sys
import types
from collections import Counter
from pathlib import Path

import pytest
import yaml

from data import hh, local, se, shp
from data.names import dataset_names, parse_name
from data.pairs import ranked_pairs, shared_end, shared_length
from data.split import by_first_appearance, position, prompt_key, split_of
from utils import UserError

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = Path(__file__).parents[1] / "config" / "dataset"


def load(module, file: str, name: str | None = None, **settings):
    given = {"path": str(FIXTURES / file), "test_fraction": 0.0, **settings}
    return module.load(name or module.__name__.split(".")[1], module.Settings(**given), 0)


def texts(example):
    return example.response("chosen"), example.response("rejected")


# ---------------------------------------------------------------------------------------------- the sources


def test_hh_prompt_ends_at_the_last_shared_assistant_turn(caplog):
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        examples = load(hh, "hh.jsonl")["train"]
    # rows 1 and 4 have one prompt: they are consecutive
    assert [e.uid for e in examples] == ["hh/train:1", "hh/train:4", "hh/train:2", "hh/train:3", "hh/train:5"]
    assert all(e.prompt.endswith("\n\nAssistant:") and e.group == "hh" for e in examples)
    egg, _, tree, joke, nothing = examples
    assert texts(egg) == (" Seven minutes in boiling water.", " No idea.")
    assert tree.prompt.count("Human:") == 2 and texts(tree) == (" Oak.", " Granite.")
    # these part at the first answer: both keep their whole text
    assert joke.prompt == "\n\nHuman: Tell me a joke.\n\nAssistant:"
    assert texts(joke) == (" Why?\n\nHuman: Why what?\n\nAssistant: Exactly.", " I know none.")
    assert texts(nothing) == ("", " Something.")
    assert "hh: 1 pairs whose dialogues part before the last turn" in caplog.text


def test_hh_rows_without_a_shared_prompt_are_bad(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(
        json.dumps({"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"})
    )
    with pytest.raises(UserError, match=r"d.jsonl:1: the two dialogues share no beginning"):
        load(hh, str(path))


def test_hh_real_file(real_data_dir):
    file = real_data_dir / "hh_harmless_base_test.jsonl.gz"
    splits = load(hh, str(file), test_fraction=0.1, validation_fraction=0.1, expected_rows=2312)
    examples = [e for part in splits.values() for e in part]
    assert len(examples) == 2312
    published = [json.loads(line) for line in gzip.decompress(file.read_bytes()).splitlines()]
    for e in examples:
        row = published[int(e.uid.split(":")[1]) - 1]
        assert (e.prompt + e.response("chosen"), e.prompt + e.response("rejected")) == (
            row["chosen"],
            row["rejected"],
        )
    later_turns = [e for e in examples if any("\n\nAssistant:" in text for _, text in e.responses)]
    assert len(later_turns) == 5
    assert sum(not text.strip() for e in examples for _, text in e.responses) == 4
    prompts = {split: {e.prompt for e in part} for split, part in splits.items()}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["validation"]
    assert 160 < len(splits["test"]) < 300 and 160 < len(splits["validation"]) < 300
    # the same rows through the general reader
    general = load(local, str(file), prompt_end="\n\nAssistant:")["train"]
    assert {(e.prompt, e.responses) for e in general} == {(e.prompt, e.responses) for e in examples}


def test_shp_keeps_clear_preferences_and_puts_the_best_comment_last():
    examples = load(shp, "shp.jsonl")["train"]
    assert [e.uid.split(":")[1] for e in examples] == ["2", "1", "4", "5"]  # 3: 5 against 4 is too close
    assert examples[0].prompt == "\n\nHuman: Why is bread stale?\n\nAssistant:"
    assert [texts(e) for e in examples[:3]] == [
        (" It dries.", " Age."),
        (" Starch.", " Magic."),
        (" Yes.", " No."),
    ]
    assert all(e.meta == {} for e in examples)
    assert len(load(shp, "shp.jsonl", min_score_ratio=1.0)["train"]) == 5
    with pytest.raises(UserError, match=r"min_score_ratio=0\.5: must be at least 1"):
        shp.Settings(min_score_ratio=0.5)


def test_shp_group_field_and_label(tmp_path):
    row = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9, "score_B": 1}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({**row, "domain": "cooking"}))
    (example,) = load(shp, str(path), group_field="domain")["train"]
    assert example.group == "cooking"
    for label in (2, True, "1"):
        path.write_text(json.dumps({**row, "labels": label}))
        with pytest.raises(UserError, match=r"d\.jsonl:1: labels: "):
            load(shp, str(path))


def test_se_pairs_by_score_with_the_best_answer_last():
    examples = load(se, "se.jsonl")["train"]
    first = [e for e in examples if e.uid.startswith("se/train:1#")]
    code = " Call it:\n\n<code>sum(xs)\n  # fast\n</code>"
    assert [texts(e) for e in first] == [(code, " Use a loop."), (code, " Count.")]  # the tie gives no pair
    assert first[0].prompt == "\n\nHuman: How do I sum a list?\n\nAssistant:"
    assert [e.uid for e in examples if ":3" in e.uid or ":4" in e.uid] == []  # one answer; a tie
    (last,) = [e for e in examples if ":5" in e.uid]
    assert last.prompt == "\n\nHuman: List <code>a[0]</code>?\n\nAssistant:"
    assert texts(last) == (" first\n\nitem", " none")
    ties = load(se, "se.jsonl", ties="later_wins")["train"]
    assert len(ties) == len(examples) + 2
    assert texts(next(e for e in ties if ":4" in e.uid)) == (" No", " Yes")


def test_se_answers_are_checked(tmp_path):
    path = tmp_path / "d.jsonl"
    for answers, problem in (
        ([{"text": "x", "pm_score": None}], r"answers\[0\].pm_score: a finite number is due, found null"),
        ([{"text": "x"}], r"answers\[0\]: no pm_score; found \['text'\]"),
        (["x"], r"answers\[0\]: an object with text and pm_score"),
        (None, "answers: a list is due, found null"),
    ):
        path.write_text(json.dumps({"question": "q", "answers": answers}))
        with pytest.raises(UserError, match="d.jsonl:1: " + problem):
            load(se, str(path))


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a  b\n c</p><p>d</p>", "a b c\n\nd"),
        ("x &amp; <i>y</i> &#8217;", "x & y \u2019"),
        ("<pre><code>if a &lt; b:\n\n    go()</code></pre>", "<code>if a < b:\n\n    go()</code>"),
        ("<p>use <code>a  b</code> now</p>", "use <code>a  b</code> now"),
        ("<code>open", "<code>open</code>"),
        ("a<br>b<style>p {}</style>", "a\n\nb"),
        ("", ""),
    ],
)
def test_html_becomes_text_and_keeps_code(html, text):
    assert se.plain_text(html) == text


# ---------------------------------------------------------------------------------------------- the hub


@pytest.fixture
def fake_hub(monkeypatch):
    """A stand-in for the ``datasets`` library; returns the calls and the splits to give out."""
    calls, splits = [], {}

    def load_dataset(hub, **options):
        calls.append((hub, options))
        if not splits:
            raise ConnectionError("no network,\n try later")
        return splits

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return calls, splits


def rows(file: str):
    return [json.loads(line) for line in (FIXTURES / file).read_text().splitlines()]


def test_hub_splits_are_used_and_overlaps_leave_train(fake_hub, caplog):
    calls, splits = fake_hub
    splits.update(train=rows("hh.jsonl"), test=rows("hh.jsonl")[:1])
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        found = hh.load(
            "hh_harmless", hh.Settings(hub_folder="harmless-base", revision="abc", test_fraction=0.5), 0
        )
    assert calls == [
        (
            "Anthropic/hh-rlhf",
            {"name": None, "data_dir": "harmless-base", "revision": "abc", "streaming": False},
        )
    ]
    assert [e.uid for e in found["test"]] == ["hh_harmless/test:1"]
    # rows 1 and 4 of train have the test row's prompt
    assert [e.uid for e in found["train"]] == [f"hh_harmless/train:{i}" for i in (2, 3, 5)]
    assert "2 train examples dropped: their prompt is also in a held-out split" in caplog.text
    assert found["train"][0].group == "hh_harmless"


def test_hub_is_streamed_when_only_some_rows_are_wanted(fake_hub):
    calls, splits = fake_hub
    splits.update(train=iter(rows("se.jsonl")))
    found = se.load("se", se.Settings(max_rows=2, test_fraction=0.0), 0)
    assert calls[0][1]["streaming"] is True
    assert {e.uid.split("#")[0] for e in found["train"]} == {"se/train:1", "se/train:2"}


def test_hub_null_is_a_missing_column_and_errors_name_the_row(fake_hub):
    _, splits = fake_hub
    splits.update(train=[{"chosen": "a", "rejected": None}])
    with pytest.raises(UserError, match=r"Anthropic/hh-rlhf\[train\]:1: rejected: no such column"):
        hh.load("hh", hh.Settings(), 0)


def test_hub_failure_is_one_message_that_says_what_to_do(fake_hub):
    with pytest.raises(UserError) as caught:
        hh.load("hh", hh.Settings(), 0)
    message = str(caught.value)
    assert message.startswith(
        "data.hh.hub=Anthropic/hh-rlhf (revision newest): could not be loaded (ConnectionError"
    )
    assert message.endswith("set data.hh.path= to a local file") and "\n" not in message


def test_hub_that_breaks_off_or_has_no_train_split_is_an_error(fake_hub):
    _, splits = fake_hub

    def breaks_off():
        yield rows("hh.jsonl")[0]
        raise TimeoutError("read timed out")

    splits.update(train=breaks_off())
    with pytest.raises(
        UserError, match=r"could not be loaded \(TimeoutError: read timed out\); set data.hh.path="
    ):
        hh.load("hh", hh.Settings(), 0)
    splits.clear()
    splits.update(all=rows("hh.jsonl"))
    with pytest.raises(UserError, match="it has the splits all but no train"):
        hh.load("hh", hh.Settings(), 0)


def test_local_without_a_path_says_so():
    with pytest.raises(UserError, match=r"data.local_a.path is not set"):
        local.load("local_a", local.Settings(), 0)


# ---------------------------------------------------------------------------------------------- splits


def write_pairs(path: Path, prompts) -> str:
    lines = [{"prompt": p, "chosen": " a", "rejected": " b", "extra": i} for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def by_split(splits):
    return {split: {prompt_key(e.prompt) for e in part} for split, part in splits.items()}


def test_split_is_by_prompt_and_adding_rows_moves_no_others(tmp_path):
    few = [f"prompt {i}" for i in range(300)]
    settings = {"test_fraction": 0.2, "validation_fraction": 0.1}
    before = by_split(load(local, write_pairs(tmp_path / "a.jsonl", few), **settings))
    more = [f"new {i}" for i in range(200)] + few[::-1] + few  # every prompt twice, elsewhere
    after = by_split(load(local, write_pairs(tmp_path / "b.jsonl", more), **settings))
    assert not before["train"] & before["test"] and not before["test"] & before["validation"]
    for split, prompts in before.items():
        assert {p for p in after[split] if p.startswith("prompt")} == prompts
    assert 35 < len(before["test"]) < 85 and 12 < len(before["validation"]) < 50
    other = by_split(load(local, write_pairs(tmp_path / "a.jsonl", few), split_seed=1, **settings))
    assert other["test"] != before["test"]


def test_raising_the_validation_fraction_leaves_the_test_split_alone():
    keys = [f"k{i}" for i in range(2000)]
    tested = {v: {k for k in keys if split_of(0, k, 0.1, v) == "test"} for v in (0.0, 0.3)}
    assert tested[0.0] == tested[0.3]
    share = sum(position(0, k) < 0.1 for k in keys) / len(keys)
    assert abs(share - 0.1) < 0.02


def test_given_files_are_the_splits_and_share_no_prompt(tmp_path, caplog):
    train = write_pairs(tmp_path / "train.jsonl", ["a", "b", "c", "a", "d"])
    test = write_pairs(tmp_path / "test.jsonl", ["b", "e"])
    validation = write_pairs(tmp_path / "val.jsonl", ["e", "c", "f"])
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        found = load(local, train, test_path=test, validation_path=validation, test_fraction=0.5)
    assert by_split(found) == {"train": {"a", "d"}, "validation": {"c", "f"}, "test": {"b", "e"}}
    assert [e.uid for e in found["train"]] == ["local/train:1", "local/train:4", "local/train:5"]
    assert "1 validation examples dropped" in caplog.text and "2 train examples dropped" in caplog.text
    assert "10 rows with keys that are not used" in caplog.text


def test_max_and_expected_rows(tmp_path):
    path = write_pairs(tmp_path / "a.jsonl", "abcde")
    assert len(load(local, path, max_rows=3)["train"]) == 3
    assert len(load(local, path, expected_rows=5)["train"]) == 5
    with pytest.raises(UserError, match=r"a.jsonl: 5 rows, but data.local.expected_rows=6: the file is cut"):
        load(local, path, expected_rows=6)
    with pytest.raises(UserError, match="no rows"):
        (tmp_path / "empty.jsonl").write_text("\n")
        load(local, str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match=r"data.local.path=nowhere.jsonl: no such file"):
        local.load("local", local.Settings(path="nowhere.jsonl"), 0)
    with pytest.raises(UserError, match=r"data.local.test_path=nowhere.jsonl: no such file"):
        load(local, path, test_path="nowhere.jsonl")


def test_rejected_rows_are_written_or_logged(tmp_path, caplog, monkeypatch):
    path = Path(write_pairs(tmp_path / "a.jsonl", "abcde"))
    path.write_text(path.read_text() + '{"prompt": null}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:6: no chosen and rejected"):
        load(local, str(path))
    target = tmp_path / "run" / "rejected.jsonl"
    settings = {"on_bad_row": "quarantine", "max_bad_fraction": 0.2}
    with caplog.at_level(logging.INFO, logger="robust_pref"):
        assert len(load(local, str(path), rejected_path=str(target), **settings)["train"]) == 5
    (entry,) = [json.loads(line) for line in target.read_text().splitlines()]
    assert entry["where"] == f"{path}:6" and "no chosen and rejected" in entry["reason"]
    assert f"local: 1 rows rejected, see {target}" in caplog.text
    target.unlink()
    monkeypatch.setenv("RANK", "1")  # only rank 0 writes
    load(local, str(path), rejected_path=str(target), **settings)
    assert not target.exists()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="robust_pref"):
        load(local, str(path), **settings)
    assert f"rejected {path}:6" in caplog.text


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"test_fraction": 1.0}, r"data.<name>.test_fraction=1.0: must be in \[0, 1\)"),
        ({"validation_fraction": -0.1}, "validation_fraction=-0.1"),
        ({"test_fraction": 0.5, "validation_fraction": 0.5}, "nothing is left to train on"),
        (
            {"on_bad_row": "quarantin"},
            "on_bad_row=quarantin: must be one of raise, quarantine; did you mean 'quarantine'",
        ),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction=2.0: must be in"),
        ({"max_rows": 0}, "max_rows=0: must be at least 1"),
        ({"max_rows": 5, "expected_rows": 5}, "a part cannot be the whole"),
        ({"truncation_mode": "keep"}, "truncation_mode=keep: must be one of"),
        ({"test_path": "x"}, "test_path=x: needs data.<name>.path="),
        ({"prompt_end": ""}, "prompt_end: must not be empty"),
    ],
)
def test_settings_are_checked(settings, problem):
    with pytest.raises(UserError, match=problem):
        local.Settings(**settings)


# ---------------------------------------------------------------------------------------------- small parts


def test_every_dataset_file_has_exactly_the_settings_and_a_comment_for_each():
    names = dataset_names()
    assert set(names) >= {"hh", "shp", "se", "local", "opinions", "goqa", "goqma", "oqa"}
    for name in names:
        text = (CONFIG / f"{name}.yaml").read_text()
        values = yaml.safe_load(text)
        assert values.pop("name") == name
        settings = importlib.import_module(f"data.{values.pop('source')}").Settings
        assert list(values.keys() - {f.name for f in dataclasses.fields(settings)}) == []
        assert list({f.name for f in dataclasses.fields(settings)} - values.keys()) == []
        settings(**values)
        lines = text.splitlines()
        for key in values:
            at = next(i for i, line in enumerate(lines) if line.startswith(f"{key}:"))
            assert lines[at - 1].startswith("# "), f"{name}: {key} has no comment"
        # what is written is the default, so that a file and the bare class are the same data (but for named variants)
        for f in dataclasses.fields(settings):
            default = f.default_factory() if f.default is dataclasses.MISSING else f.default
            variant = name.startswith("world_") or (name, f.name) == ("goqma", "mode")
            assert values[f.name] == default or variant, f"{name}: {f.name}"


def test_names():
    known = ("goqa", "goqma", "oqa", "hh", "local", "local_news")
    assert parse_name("hh", known) == ("hh", None)
    assert parse_name("goqa_3", known) == ("goqa", "3")
    assert parse_name("oqa_SEX_Male", known) == ("oqa", "SEX_Male")
    assert parse_name("local_news", known) == ("local_news", None)
    assert parse_name("local_news_2", known) == ("local_news", "2")
    for wrong in ("gopa_3", "hhh", "goqa_", "hh-1"):
        with pytest.raises(UserError, match=f"datasets=\\[{wrong}\\]: no such data set"):
            parse_name(wrong, known)
    assert parse_name("goqma_12") == ("goqma", "12")


def test_small_helpers():
    assert shared_length(["abcd", "abx", "abcy"]) == 2
    assert shared_length(["same", "same"]) == 4
    assert shared_end(("a: b: c", "a: b: d"), ":") == 5
    assert shared_end(("x", "x"), ":") is None
    assert ranked_pairs([1.0, 3.0, 2.0]) == [(2, 0), (1, 0), (1, 2)]
    assert ranked_pairs([1.0, 1.0]) == [] and ranked_pairs([1.0, 1.0], "later_wins") == [(1, 0)]
    assert by_first_appearance([3, 1, 13, 2, 11], lambda x: x % 10) == [3, 13, 1, 11, 2]
    messages = ({"role": "user", "content": "a"},)
    assert prompt_key(messages) != prompt_key("a") and prompt_key(messages) == prompt_key(
        ({"content": "a", "role": "user"},)
    )
    assert Counter(len(str(position(0, str(i)))) > 0 for i in range(5)) == {True: 5}
