"""Auxiliary samples: what is drawn, what is written, what training reads, and continuing after a kill."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ks_2samp, kstwobign

import run_data
import run_models
from commands import rows as jsonl
from commands import sample, two_sample
from commands.sample import Settings
from data.schema import Example
from engine import models, sampling
from losses.pairwise import DPO
from losses.vrpo import VarianceReduced
from tests.vrpo_tools import COMMON, DATA, local, run_of, trained
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> Path:
    """24 training rows with M = 2 pairs of at most 6 tokens from an untrained model."""
    folder = tmp_path_factory.mktemp("sample")
    sample.run(
        run_of(folder), Settings(out=str(folder / "out"), num_pairs=2, max_new_tokens=6, batch_size=16)
    )
    return folder


def test_rows_carry_the_labelled_pair_and_2m_responses(drawn):
    rows = rows_of(drawn / "out" / "train.jsonl")
    run = run_of(drawn)
    (examples,) = run_data.load_examples(run)["train"]
    assert len(rows) == 24 == len({row["uid"] for row in rows})
    for row, example in zip(rows, examples, strict=True):
        assert (row["uid"], row["prompt"], row["group"]) == (example.uid, example.prompt, example.group)
        assert [row["chosen"], row["rejected"]] == [text for _, text in example.responses]
        assert (
            [len(pair) for pair in row["aux_responses"]]
            == [2, 2]
            == [len(pair) for pair in row["aux_finished"]]
        )
        assert row["aux_from"]["temperature"] == 1.0 and row["aux_from"]["num_pairs"] == 2
    assert all("aux_responses" not in row for row in rows_of(drawn / "out" / "validation.jsonl"))
    assert len(rows_of(drawn / "out" / "test.jsonl")) == 5


def test_what_is_drawn_is_a_function_of_seed_uid_and_index_alone(drawn, tmp_path):
    run = run_of(drawn)
    tokenizer = models.load_tokenizer(run.model)
    data = run_data.load_data(run, tokenizer, VarianceReduced(0.1))
    model = models.build_reference(run.model, device="cpu", tokenizer=tokenizer)
    row = data.rows["train"][5]
    alone = sampling.generate(
        model,
        tokenizer,
        [row.prompt] * 4,
        max_new_tokens=6,
        seed=0,
        keys=[(row.uid, i) for i in range(4)],
        batch_size=1,
    )
    found = rows_of(drawn / "out" / "train.jsonl")[5]
    texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for s in alone]
    written = [text for pair in found["aux_responses"] for text in pair]
    flags = [flag for pair in found["aux_finished"] for flag in pair]
    assert [t if f else t.rstrip("\ufffd") for t, f in zip(texts, flags, strict=True)] == written
    for size in (3, 64):
        out = tmp_path / str(size)
        sample.run(run, Settings(out=str(out), num_pairs=2, max_new_tokens=6, batch_size=size, check=0))
        assert (out / "train.jsonl").read_bytes() == (drawn / "out" / "train.jsonl").read_bytes()
    other = run_of(drawn, "seed=1")
    sample.run(other, Settings(out=str(tmp_path / "seed"), num_pairs=2, max_new_tokens=6, check=0))
    assert rows_of(tmp_path / "seed" / "train.jsonl")[5]["aux_responses"] != found["aux_responses"]


def test_the_model_temperature_and_top_p_are_those_asked_for(tmp_path):
    archive = trained(tmp_path, "sft", "loss=sft", "n_examples=16", "lr=0.01", "do_first_eval=false")
    few = "data.opinions.num_train=5"
    run, out = run_of(tmp_path, f"model.archive={archive}", few), tmp_path / "out"
    law = {"temperature": 0.7, "top_p": 0.8}
    sample.run(run, Settings(out=str(out), max_new_tokens=8, check=0, **law))
    written = [text for row in rows_of(out / "train.jsonl") for pair in row["aux_responses"] for text in pair]
    tokenizer = models.load_tokenizer(run.model)
    rows = run_data.load_data(run, tokenizer, DPO(beta=1.0)).rows["train"]
    keys = [(row.uid, i) for row in rows for i in (0, 1)]

    def texts(archive: str | None, **law: float) -> list[str]:
        model = models.build_reference(run.model, archive=archive, device="cpu", tokenizer=tokenizer)
        prompts = [row.prompt for row in rows for _ in (0, 1)]
        how = {"max_new_tokens": 8, "seed": 0, "keys": keys, "batch_size": 8, **law}
        drawn = sampling.generate(model, tokenizer, prompts, **how)
        found = [(tokenizer.decode(s.ids, skip_special_tokens=True), s.finished) for s in drawn]
        return [text if finished else text.rstrip("\ufffd") for text, finished in found]

    assert texts(archive, **law) == written
    for other in (texts(None, **law), texts(archive, top_p=0.8), texts(archive, temperature=0.7)):
        assert other != written
    with pytest.raises(UserError, match=r"made with other settings \(weights: "):  # drawn from another model
        sample.run(run_of(tmp_path, few), Settings(out=str(out), max_new_tokens=8, check=0, **law))


def test_training_reads_them_with_an_eos_only_where_the_model_ended(drawn):
    run = run_of(drawn, data=local(drawn / "out"))
    tokenizer = models.load_tokenizer(run.model)
    data = run_data.load_data(run, tokenizer, VarianceReduced(0.1))
    seen = {True: 0, False: 0}
    for row, written in zip(data.rows["train"], rows_of(drawn / "out" / "train.jsonl"), strict=True):
        assert row.roles == ("chosen", "rejected", *("aux_1", "aux_2") * 2)
        flags = [True, True, *(flag for pair in written["aux_finished"] for flag in pair)]
        for ids, finished in zip(row.responses, flags, strict=True):
            assert (ids[-1] == tokenizer.eos_token_id) == finished
            seen[finished] += 1
    assert min(seen.values()) > 5  # both kinds occur
    assert {r.roles for r in data.rows["validation"]} == {("chosen", "rejected")}


def test_a_response_may_take_the_room_that_the_prompt_leaves(tmp_path):
    run = run_of(tmp_path, "data.opinions.num_train=8")
    sample.run(run, Settings(out=str(tmp_path / "out"), check=0))
    tokenizer = models.load_tokenizer(run.model)
    data = run_data.load_data(run_of(tmp_path, data=local(tmp_path / "out")), tokenizer, VarianceReduced(0.1))
    for row in data.rows["train"]:
        assert len(row.prompt) + max(map(len, row.responses)) <= 96
    limits = {sample.room(row, run, Settings(out="x")) for row in data.rows["train"]}
    assert limits == {96 - len(row.prompt) for row in data.rows["train"]}


def test_an_interrupted_command_continues_to_the_same_file(drawn, tmp_path):
    whole = (drawn / "out" / "train.jsonl").read_bytes()
    settings = Settings(out=str(tmp_path / "out"), num_pairs=2, max_new_tokens=6, batch_size=16, check=0)
    sample.run(run_of(drawn), settings)
    file = tmp_path / "out" / "train.jsonl"
    for size in (0, len(whole) // 3, len(whole) - 1):
        file.write_bytes(whole[:size])  # killed in the middle of a line
        sample.run(run_of(drawn), settings)
        assert file.read_bytes() == whole
    before = file.stat().st_mtime_ns
    sample.run(run_of(drawn), settings)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"made with other settings \(.*num_pairs: 2 -> 1"):
        sample.run(run_of(drawn), Settings(out=str(tmp_path / "out"), max_new_tokens=6, check=0))
    with pytest.raises(UserError, match=r"made with other settings \(.*rows:"):
        sample.run(run_of(drawn, "data.opinions.data_seed=1"), settings)


def test_rows_whose_labels_were_edited_are_not_kept(tmp_path):
    """Same prompts and so the same draws, but the labelled pairs in the file would be the old ones."""
    data = tmp_path / "data.jsonl"
    words = ["datasets=[local]", f"data.local.path={data}"]
    row = {"prompt": "P", "chosen": "yes", "rejected": "no", "p_chosen": 0.9}
    settings = Settings(out=str(tmp_path / "out"), max_new_tokens=3, check=0)
    for changed in ({}, {"chosen": "no", "rejected": "yes"}, {"p_chosen": 0.6}, {"weight": 2.0}):
        data.write_text("".join(json.dumps(row | changed | {"prompt": f"P{i}"}) + "\n" for i in range(4)))
        if not changed:
            sample.run(run_of(tmp_path, data=words), settings)
            continue
        with pytest.raises(UserError, match=r"made with other settings \(rows:"):
            sample.run(run_of(tmp_path, data=words), settings)


@pytest.mark.slow
@pytest.mark.fault
def test_kill_9_loses_nothing(tmp_path):
    words = [
        *COMMON,
        *DATA,
        "data.opinions.num_train=300",
        "sample.num_pairs=2",
        "sample.batch_size=4",
        "sample.check=0",
    ]
    command = [sys.executable, "-m", "commands.sample", *words]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    whole = tmp_path / "whole"
    subprocess.run(
        [*command, f"sample.out={whole}"], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    cut, kills = tmp_path / "cut", 0
    file = cut / "train.jsonl"
    for wanted in (1, 90, 200):
        process = subprocess.Popen(
            [*command, f"sample.out={cut}"], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < wanted):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run(
        [*command, f"sample.out={cut}"], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    assert kills and file.read_bytes() == (whole / "train.jsonl").read_bytes()


def test_chat_rows_are_written_as_messages():
    chat = ({"role": "user", "content": "Hi"},)
    example = Example("d/train:0", chat, (("chosen", "yes"), ("rejected", "no")), "g", scalars={"p_chosen": 0.5, "chosen_preference": 0.3})  # fmt: skip
    row = jsonl.to_row(example)
    jsonl.add_auxiliary(row, ["a", "b"], [True, False])
    assert row["chosen"] == [{"role": "assistant", "content": "yes"}]
    assert row["aux_responses"] == [
        [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]
    ]
    assert row["p_chosen"] == 0.5 and "chosen_preference" not in row  # of another scorer


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_pairs": 0}, "sample.num_pairs=0: must be at least 1"),
        ({"max_new_tokens": 0}, "sample.max_new_tokens=0"),
        ({"check": -1}, "sample.check=-1"),
        ({"temperature": 0.0}, "sample.temperature=0.0: must be > 0"),
        ({"temperature": float("nan")}, "sample.temperature=nan"),
        ({"top_p": 0.0}, "sample.top_p=0.0: must be in"),
    ],
)
def test_wrong_settings_are_user_errors(how, message):
    with pytest.raises(UserError, match=message):
        Settings(out="x", **how)


def test_a_split_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no split 'dev'; there are \['train', 'validation', 'test'\]"):
        sample.run(run_of(tmp_path), Settings(out=str(tmp_path), splits=("dev",)))


# ---------------------------------------------------------------------------------------------- one law or two


def test_ks_distance_and_limit_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for a, b in (
        (rng.normal(size=50), rng.normal(0.3, 1, 70)),
        (rng.integers(0, 4, 80), rng.integers(0, 5, 60)),
    ):
        assert two_sample.ks_distance(a, b) == pytest.approx(ks_2samp(a, b).statistic)
    exact = kstwobign.isf(0.001) * np.sqrt(1 / 300 + 1 / 200)
    assert two_sample.ks_limit(300, 200) == pytest.approx(exact, rel=1e-3)


def test_labelled_responses_of_another_law_are_noticed(drawn, caplog):
    run = run_of(drawn)
    found = json.loads((drawn / "out" / "two_sample-train.json").read_text())
    assert found["differs"] and found["num_rows"] == 24  # letters, against the garbage of an untrained model
    # the limit counts rows, not their responses, which depend on each other
    assert all(s["limit"] == pytest.approx(two_sample.ks_limit(24, 24)) for s in found["statistics"])
    assert found["gap"] > 5 and found["statistics"][0]["name"] == "tokens"
    scorer = run_models.build_scorer(run, models.build_reference(run.model, device="cpu"))
    labelled = jsonl.read(drawn / "out" / "train.jsonl")
    with caplog.at_level(logging.WARNING, "robust_pref"):
        sample.check_laws(
            run, Settings(out=str(drawn / "out")), "train", scorer, models.load_tokenizer(run.model)
        )
    assert "differ in tokens and log pi_ref" in caplog.text and "loss.sft_on=all" in caplog.text
    # the second auxiliary pair in place of the labelled one: one law
    same = [
        Example(
            one.example.uid, one.example.prompt,
            tuple(zip(("chosen", "rejected", "aux_1", "aux_2"), [t for _, t in one.example.responses[2:]], strict=True)),
            one.example.group, response_scalars={"finished": one.example.response_scalars["finished"][2:]},
        )
        for one in labelled
    ]  # fmt: skip
    result = two_sample.compare(same, models.load_tokenizer(run.model), sample.tokenization(run), scorer, 256)
    assert not result.differs and result.gap_low < 0 < result.gap_high


# ---------------------------------------------------------------------------------------------- vLLM


class StandIn:
    """What commands.sample uses of vLLM: every prompt is answered by a fixed response, cut where max_tokens says so."""

    def __init__(self, answer: list[int]) -> None:
        self.answer, self.made, self.asked = answer, [], []
        self.SamplingParams = lambda **how: how

    def LLM(self, path: str, **how):
        self.made.append((path, how))
        return self

    def generate(self, prompts, parameters):
        self.asked += list(zip(prompts, parameters, strict=True))
        cut = [self.answer[: how["max_tokens"]] for how in parameters]
        outputs = [
            SimpleNamespace(token_ids=ids, finish_reason="stop" if ids == self.answer else "length")
            for ids in cut
        ]
        return [SimpleNamespace(outputs=[output]) for output in outputs]


def test_vllm_is_asked_for_the_same_prompts_and_its_answers_are_kept(tmp_path, monkeypatch):
    archive = trained(tmp_path, "sft", "loss=sft", "n_examples=8", "do_first_eval=false")
    run = run_of(tmp_path, f"model.archive={archive}")
    tokenizer = models.load_tokenizer(run.model)
    stand_in = StandIn([*tokenizer.encode("Yes.", add_special_tokens=False), tokenizer.eos_token_id])
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    how = Settings(out=str(tmp_path / "out"), engine="vllm", num_pairs=2, check=0)
    sample.run(run, how)
    ((path, made),) = stand_in.made
    assert (Path(path) / "model.safetensors").is_file()
    assert made == {"dtype": "float32", "trust_remote_code": False}
    rows, data = rows_of(tmp_path / "out" / "train.jsonl"), run_data.load_data(run, tokenizer, DPO(beta=1.0))
    assert [row["aux_responses"] for row in rows] == [[["Yes.", "Yes."]] * 2] * 24
    assert all(
        row["aux_finished"] == [[True, True]] * 2 and row["aux_from"]["engine"] == "vllm" for row in rows
    )
    prompts = [p["prompt_token_ids"] for p, _ in stand_in.asked]
    assert prompts == [row.prompt.tolist() for row in data.rows["train"] for _ in range(4)]
    assert len({how["seed"] for _, how in stand_in.asked}) == 96
    assert {(how["temperature"], how["top_p"]) for _, how in stand_in.asked} == {(1.0, 1.0)}
    sample.run(run, Settings(out=str(tmp_path / "cut"), engine="vllm", max_new_tokens=2, check=0))
    assert rows_of(tmp_path / "cut" / "train.jsonl")[0]["aux_responses"] == [["Ye", "Ye"]]
    assert rows_of(tmp_path / "cut" / "train.jsonl")[0]["aux_finished"] == [[False, False]]


def test_without_vllm_or_a_whole_model_it_says_what_to_do(tmp_path, monkeypatch):
    how = Settings(out=str(tmp_path / "out"), engine="vllm")
    with pytest.raises(UserError, match=r"model\.archive=None: vLLM reads whole models"):
        sample.run(run_of(tmp_path), how)
    archive = trained(tmp_path, "sft", "loss=sft", "n_examples=8", "do_first_eval=false")
    monkeypatch.setitem(sys.modules, "vllm", None)  # not installed
    monkeypatch.setattr(models, "build_reference", None)  # and told before a model is loaded
    with pytest.raises(UserError, match=r"pip install vllm, or sample\.engine=hf"):
        sample.run(run_of(tmp_path, f"model.archive={archive}"), how)
