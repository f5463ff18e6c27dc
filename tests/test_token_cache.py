"""Rows from the token cache are those that would be made; nothing stale or damaged is read; writers do not disturb each other."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

import preference_datasets
import run_data
from config.compose import compose
from data.schema import Example
from data.token_cache import TokenCache
from preference_datasets import Counts, Tokenization, get_batch_iterator, tokenize
from scripts.make_tokenizer import ASSET

SETTINGS = Tokenization(max_length=40, max_prompt_length=20)
CHAT = ({"role": "user", "content": "Héllo \U0001f600"},)


def example(i, **changes):
    made = Example(
        uid=f"d/train:{i}",
        prompt=f"question {i // 2} {'x' * (9 * (i % 4))}",
        responses=(
            ("chosen", f"yes {i}"),
            ("rejected", "" if i % 3 else "no"),
            ("aux_1", "maybe"),
            ("aux_2", "no"),
        ),
        group="ab"[i % 2],
        weight=1 / (i + 3),
        scalars={"p_chosen": 0.1 * i, "margin": float("nan")} if i % 2 else {},
        response_scalars={"aux_preference": (float("nan"), float("nan"), 1 / 3, 2 / 3)},
    )
    return replace(made, **changes)


EXAMPLES = [example(i) for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


def rows_of(tokenizer, cache, examples=EXAMPLES, settings=SETTINGS, counts=None, **changes):
    given = {"groups": ("a", "b"), "roles": ("chosen", "rejected"), **changes}
    return tokenize(examples, tokenizer, settings, counts=counts or Counts(), cache=cache, **given)


def assert_equal(rows, expected):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        for name in ("uid", "roles", "group", "prompt_key", "weight"):
            assert getattr(row, name) == getattr(other, name)
            assert type(getattr(row, name)) is type(getattr(other, name))
        for a, b in zip((row.prompt, *row.responses), (other.prompt, *other.responses), strict=True):
            assert a.dtype == b.dtype == np.int32 and np.array_equal(a, b) and not a.flags.writeable
        assert repr(row.scalars) == repr(other.scalars)  # NaN included
        assert repr(row.response_scalars) == repr(other.response_scalars)


@pytest.mark.parametrize("roles", [("chosen", "rejected"), None, ("chosen",)])
def test_rows_counts_and_shared_prompts_are_those_that_are_made(tokenizer, tmp_path, roles):
    expected_counts, cache = Counts(), TokenCache(tmp_path)
    expected = rows_of(tokenizer, None, counts=expected_counts, roles=roles)
    for hits in (0, 1, 2):
        counts = Counts()
        rows = rows_of(tokenizer, cache, counts=counts, roles=roles)
        assert (cache.hits, cache.misses) == (hits, 1)
        assert_equal(rows, expected)
        assert counts.table == expected_counts.table and counts.lines() == expected_counts.lines()
        assert rows[2].prompt is not rows[4].prompt
        same = [row.prompt for row in rows if row.prompt_key == rows[0].prompt_key]
        assert all(prompt is same[0] for prompt in same)


def test_chats_and_no_rows_at_all_are_cached_too(tokenizer, tmp_path):
    chats = [example(0, prompt=CHAT, scalars={}), example(1, prompt=({**CHAT[0], "content": "b"},))]
    chat_tokenizer = AutoTokenizer.from_pretrained(ASSET)
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    for examples in (chats, []):
        cache = TokenCache(tmp_path)
        expected = rows_of(chat_tokenizer, None, examples)
        assert_equal(rows_of(chat_tokenizer, cache, examples), expected)
        assert_equal(rows_of(chat_tokenizer, cache, examples), expected)
        assert (cache.hits, cache.misses) == (1, 1)


CHANGES = {
    "a prompt": {"examples": [example(0, prompt="other"), *EXAMPLES[1:]]},
    "a response": {
        "examples": [example(0, responses=(("chosen", "a"), *EXAMPLES[0].responses[1:])), *EXAMPLES[1:]]
    },
    "a uid": {"examples": [example(0, uid="d/train:x"), *EXAMPLES[1:]]},
    "a weight": {"examples": [example(0, weight=0.5), *EXAMPLES[1:]]},
    "a scalar": {"examples": [example(0, scalars={"p_chosen": 0.7}), *EXAMPLES[1:]]},
    "a response's scalar": {
        "examples": [example(0, response_scalars={"finished": (0.0, 1.0, 1.0, 1.0)}), *EXAMPLES[1:]]
    },
    "a group": {"examples": [example(0, group="b"), *EXAMPLES[1:]]},
    "the order": {"examples": EXAMPLES[::-1]},
    "one row less": {"examples": EXAMPLES[:-1]},
    "max_length": {"settings": replace(SETTINGS, max_length=41)},
    "max_prompt_length": {"settings": replace(SETTINGS, max_prompt_length=19)},
    "truncation": {"settings": replace(SETTINGS, truncation="keep_end")},
    "bos": {"settings": replace(SETTINGS, bos="never")},
    "mode": {"settings": replace(SETTINGS, mode="joint")},
    "roles": {"roles": ("chosen",)},
    "groups": {"groups": ("b", "a")},
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_rows_depend_on_is_in_the_key(tokenizer, tmp_path, change):
    cache = TokenCache(tmp_path)
    rows_of(tokenizer, cache)
    changed = rows_of(tokenizer, cache, **CHANGES[change])
    assert (cache.hits, cache.misses) == (0, 2)
    assert_equal(changed, rows_of(tokenizer, None, **CHANGES[change]))


def test_another_tokenizer_of_the_same_name_or_other_code_is_a_miss(tokenizer, tmp_path, monkeypatch):
    cache = TokenCache(tmp_path)
    rows_of(tokenizer, cache)
    other = AutoTokenizer.from_pretrained(ASSET)
    assert_equal(rows_of(other, cache), rows_of(tokenizer, None))
    assert (cache.hits, cache.misses) == (1, 1)
    other.add_tokens(["question"])
    assert_equal(rows_of(other, cache), rows_of(other, None))
    assert (cache.hits, cache.misses) == (1, 2)
    template = AutoTokenizer.from_pretrained(ASSET)
    template.chat_template = "{{ messages }}"
    rows_of(template, cache)
    assert (cache.hits, cache.misses) == (1, 3)
    monkeypatch.setattr(preference_datasets, "CODE", preference_datasets.CODE[:1])
    rows_of(tokenizer, cache)
    assert (cache.hits, cache.misses) == (1, 4)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_told_in_one_line_and_made_again(tokenizer, tmp_path, caplog, damage):
    cache = TokenCache(tmp_path)
    expected = rows_of(tokenizer, cache)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-9], "empty": b""}[damage])
    with caplog.at_level(logging.WARNING, logger="robust_pref"):
        assert_equal(rows_of(tokenizer, cache), expected)
    (warning,) = [r.getMessage() for r in caplog.records if "token_cache" in r.getMessage()]
    assert str(path) in warning and "damaged" in warning
    assert_equal(rows_of(tokenizer, cache), expected)
    assert (cache.hits, cache.misses) == (1, 2)


def test_a_folder_that_cannot_be_written_costs_a_warning_and_no_run(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING, logger="robust_pref"):
        rows = rows_of(tokenizer, TokenCache(tmp_path / "file" / "tokens"))
    assert_equal(rows, rows_of(tokenizer, None))
    assert any("cannot be written" in r.getMessage() for r in caplog.records)


def test_a_crash_while_writing_leaves_nothing_that_is_read(tokenizer, tmp_path, monkeypatch):
    cache = TokenCache(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        rows_of(tokenizer, cache)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.arrow"))
    assert_equal(rows_of(tokenizer, cache), rows_of(tokenizer, None))


def test_concurrent_writers_leave_one_good_file(tokenizer, tmp_path):
    caches = [TokenCache(tmp_path) for _ in range(6)]
    barrier = threading.Barrier(len(caches))
    found = {}

    def work(i):
        barrier.wait()
        for _ in range(5):
            found[i] = rows_of(tokenizer, caches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(caches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = rows_of(tokenizer, None)
    for i in range(len(caches)):
        assert_equal(found[i], expected)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".arrow"


def test_a_file_is_a_data_set_that_others_can_open(tokenizer, tmp_path):
    rows = rows_of(tokenizer, TokenCache(tmp_path))
    (path,) = tmp_path.iterdir()
    table = datasets.Dataset.from_file(str(path))
    assert table["uid"][:] == [row.uid for row in rows]
    assert table["prompt"][3] == rows[3].prompt.tolist()
    assert table["responses"][3] == [ids.tolist() for ids in rows[3].responses]


def test_a_run_trains_on_identical_batches_with_the_cache_and_without(tokenizer, tmp_path):
    words = [
        "model=tiny",
        "data.opinions.num_train=60",
        "batch_size=16",
        "loss=dpo",
        "loss.beta=0.1",
        "assert_sft_step=false",
    ]

    def batches(*more):
        run = compose([*words, *more])
        data = run_data.load_data(run, tokenizer)
        plan = run_data.build_plan(run, data)
        assert [e.uid for e in data.examples["train"]] == [row.uid for row in data.rows["train"]]
        return plan.fingerprint, [batch for _, batch in get_batch_iterator(data.rows["train"], plan)]

    (off, expected), (cold, first), (warm, second) = (
        batches(f"token_cache={folder}") for folder in ("null", tmp_path, tmp_path)
    )
    assert off == cold == warm
    for got in (first, second):
        for batch, other in zip(got, expected, strict=True):
            assert batch.uids == other.uids and batch.roles == other.roles
            assert batch.group.equal(other.group) and batch.weight.equal(other.weight)
            for a, b in zip(batch.prompts + batch.responses, other.prompts + other.responses, strict=True):
                assert np.array_equal(a, b)
