"""Plain text, chats and implicit prompts, in both stages, from rows to a trained model; and what the reward model reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import run_data
from commands import annotate, sample
from data.schema import Batch
from engine import models
from engine.scoring import Scorer
from tests.vrpo_tools import local, run_of, trained
from utils import UserError

ROLES = ("chosen", "rejected", "aux_1", "aux_2")
STAGES = {
    "vrpo": ("loss=vrpo", "loss.beta=0.1", "assert_sft_step=false"),
    "vrpo_reward": ("loss=vrpo_reward",),
}
COLOURS = ("blue", "red", "grey", "black", "green", "white")


def row_of(form: str, i: int) -> dict:
    """The i-th row in one of the formats; its prompt mentions its number."""
    texts = {k: COLOURS[(i + j) % 6] for j, k in enumerate(("chosen", "rejected", "a_1", "a_2"))}
    prompt = f"Sky number {i}?"
    if form == "standard":
        row = {"prompt": prompt, **texts}
    elif form == "implicit":
        row = {k: f"{prompt} {text}." for k, text in texts.items()}
    else:
        user = [{"role": "user", "content": prompt}]
        row = {k: [{"role": "assistant", "content": text}] for k, text in texts.items()}
        if form == "implicit_chat":
            row = {k: user + completion for k, completion in row.items()}
        else:
            row["prompt"] = user
    four = {
        "chosen_preference": 0.75,
        "rejected_preference": 0.25,
        "a_1_preference": 0.5,
        "a_2_preference": 0.5,
    }
    return {"uid": f"row-{i}", "group": "g", **row, **four}


def data_in(folder: Path, form: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    for name, numbers in (("train", range(16)), ("validation", range(16, 20)), ("test", range(20, 24))):
        lines = [json.dumps(row_of(form, i)) + "\n" for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return local(folder)


FORMS = ("standard", "chat", "implicit", "implicit_chat")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("form", FORMS)
def test_every_format_trains_in_both_stages(tmp_path, form, stage):
    data = data_in(tmp_path / "data", form)
    trained(tmp_path, "run", *STAGES[stage], "lr=0.01", "n_epochs=2", data=data)
    lines = [
        json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 4 and {s["train/vrpo/plain"] for s in steps} == {0.0}
    assert all(s["train/vrpo/g"] == 0.75 for s in steps)
    if stage == "vrpo":
        assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert abs(steps[-1]["train/loss"] - math.log(2)) > 1e-4
    results = json.loads((tmp_path / "runs" / "run" / "results.json").read_text())
    assert set(results["splits"]) == {"validation", "test"}


@pytest.mark.parametrize("stage", STAGES)
def test_auxiliary_responses_without_preferences_are_refused_before_a_model_is_loaded(
    tmp_path, monkeypatch, stage
):
    """What commands.sample wrote, and no commands.annotate: in training rows and in those of an evaluation."""
    monkeypatch.setattr(models, "build_policy", None)
    for split, number in (("test", 4), ("train", 16)):
        data = data_in(tmp_path / "data", "standard")
        bare = [{k: v for k, v in row_of("standard", i).items() if "_pref" not in k} for i in range(number)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
        told = f"local/{split}:1: has auxiliary responses but no chosen_preference, like {number} of {number} {split} rows"
        with pytest.raises(UserError, match=told):
            trained(tmp_path, split, *STAGES[stage], data=data)
    fresh = ("fresh_pairs.num_pairs=1", "fresh_pairs.scorer=function", "fresh_pairs.function=a:b")
    run = run_of(tmp_path, *STAGES[stage], *fresh, data=data)
    rows = run_data.load_data(run, models.load_tokenizer(run.model)).rows
    run_data.check_preferences(run, rows)  # those of train are made anew


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("form", FORMS)
def test_the_reward_model_reads_prompt_and_response(tmp_path, form, layout):
    """Decoded from what enters the model's body; the reward is read at the response's last token."""
    run = run_of(tmp_path, "loss=vrpo_reward", data=data_in(tmp_path / "data", form))
    tokenizer = models.load_tokenizer(run.model)
    rows = run_data.load_data(run, tokenizer).rows["train"][:2]
    model = models.build_policy(run.model, output="reward", seed=0, device="cpu", tokenizer=tokenizer)
    seen: list[str] = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.extend(
            tokenizer.decode(ids) for ids in kwargs["input_ids"].tolist()
        ),
        with_kwargs=True,
    )
    values = Scorer(model, layout=layout, output="reward")(Batch.collate(rows), ROLES).values
    handle.remove()
    text = "\n".join(seen)
    for i in range(2):
        times = text.count(f"Sky number {i}?")
        assert times == (1 if layout == "shared_prefix" else 4)
        assert all(COLOURS[(i + j) % 6] in text for j in range(4))
    # the same responses after another prompt have other rewards
    swapped = replace(rows[0], prompt=rows[1].prompt, prompt_key=rows[1].prompt_key)
    moved = Scorer(model, layout=layout, output="reward")(Batch.collate([swapped]), ROLES).values
    assert (moved - values[:4]).abs().min() > 1e-6


def assistant_lengths(prompt, responses, row):
    """Scores of a chat: messages for labelled and drawn responses alike."""
    assert prompt[0]["role"] == "user" and row["group"] == "g"
    return [len(message["content"]) for (message,) in responses]


@pytest.mark.parametrize("stage", STAGES)
def test_a_chat_goes_the_whole_way(tmp_path, stage):
    """SFT, samples, annotation, training: messages in every file, the template's tokens around every response."""
    data = data_in(tmp_path / "data", "chat")
    sft = f"model.archive={trained(tmp_path, 'sft', 'loss=sft', 'loss.sft_on=all', 'lr=0.01', data=data)}"
    drawn, made = tmp_path / "s", tmp_path / "a"
    sample.run(
        run_of(tmp_path, sft, data=data),
        sample.Settings(out=str(drawn), num_pairs=3, max_new_tokens=4, check=0),
    )
    function = "tests.test_vrpo_formats:assistant_lengths"
    annotate.run(
        run_of(tmp_path),
        annotate.Settings(data=str(drawn), out=str(made), scorer="function", function=function),
    )
    row = json.loads((made / "train.jsonl").read_text().splitlines()[0])
    assert row["prompt"] == [{"role": "user", "content": "Sky number 0?"}] and row["uid"].endswith(":1")
    assert [message["role"] for pair in row["aux_responses"] for (message,) in pair] == ["assistant"] * 6
    gaps = [len(a[0]["content"]) - len(b[0]["content"]) for a, b in row["aux_responses"]]
    t = row["annotation"]["temperature"]
    assert row["aux_preferences"] == pytest.approx([1 / (1 + math.exp(-gap / t)) for gap in gaps], abs=1e-6)
    words = (*STAGES[stage], sft, "lr=0.01")
    trained(tmp_path, "run", *words, data=local(made))
    fresh = ("fresh_pairs.num_pairs=2", "fresh_pairs.max_new_tokens=4", "fresh_pairs.scorer=function")
    trained(tmp_path, "fresh", *words, *fresh, f"fresh_pairs.function={function}", data=data)
    run = run_of(tmp_path, *words, data=local(made))
    tokenizer = models.load_tokenizer(run.model)
    first = run_data.load_data(run, tokenizer).rows["train"][0]
    assert tokenizer.decode(first.prompt) == "<bos><|user|>Sky number 0?<|assistant|>"
    for ids, text, finished in zip(
        first.responses[2:],
        [message["content"] for pair in row["aux_responses"] for (message,) in pair],
        [flag for pair in row["aux_finished"] for flag in pair],
        strict=True,
    ):
        assert tokenizer.decode(ids) == text + ("<eos>" if finished else "")
