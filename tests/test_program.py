"""The program as a user runs it: whole runs of a few steps through the same code as `python train.py`, and a few cold starts."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import assembly
import run_data
import trainers
from config.compose import CONFIG_DIR, compose
from utils import UserError

ROOT = CONFIG_DIR.parent
SMALL = [
    "model=tiny-llama", "data.opinions.num_train=40", "data.opinions.num_validation=10", "data.opinions.num_test=10",
    "batch_size=16", "n_examples=32", "eval_every=16", "wandb.enabled=false", "lr=1e-3",
]  # fmt: skip


def start(root: Path, *words: str):
    """One run in this process; returns (its directory, outcome)."""
    run = compose([*SMALL, f"run_root={root}", f"cache_dir={root}/cache", *words])
    return Path(run.config.run_dir), assembly.run_training(run)


def lines(run_dir: Path, kind: str) -> list[dict]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    run_dir, _ = start(tmp_path_factory.mktemp("sft"), "loss.sft_on=all", "exp_name=sft")
    return run_dir / "LATEST"


def test_an_sft_run_leaves_everything_behind(sft):
    run_dir = sft.parent
    for name in ("config.yaml", "provenance.json", "passport.json", "metrics.jsonl", "results.json"):
        assert (run_dir / name).is_file(), name
    assert len(lines(run_dir, "train")) == 2
    assert [row["split"] for row in lines(run_dir, "eval")] == ["eval", "test"] * 3
    assert list((run_dir / "records").glob("test-*.jsonl"))


def test_training_rows_are_evaluated_with_the_others_each_time(tmp_path):
    run_dir, _ = start(tmp_path, "eval_train_data=true", "eval_splits=[validation]", "n_examples=16")
    found = [(row["examples"], row["split"]) for row in lines(run_dir, "eval")]
    assert found == [(0, "eval"), (0, "train_eval"), (16, "train_eval"), (16, "eval"), (16, "test")]


def test_the_table_of_results_has_the_losses_of_the_metrics(tmp_path):
    run_dir, _ = start(tmp_path, "loss.unit=token", "n_examples=16")
    for found in json.loads((run_dir / "results.json").read_text())["splits"].values():
        losses = {row["group"]: row["loss"] for row in found["table"]}
        prefix = f"{found['prefix']}/loss"
        assert losses.pop("all") == found["metrics"][prefix] and losses
        assert losses == {g: found["metrics"][f"{prefix}/group_{g}"] for g in losses}


PREFERENCE = [
    ("dpo", ["loss.beta=0.1"], np.log(2)),
    ("ipo", ["loss.beta=0.5"], 1.0),
    ("rdpo_noise", ["loss.beta=0.1", "loss.flip_rate=0.1"], np.log(2)),
    ("hinge", ["loss.beta=0.1"], 1.0),
    ("gr_dpo", ["loss.beta=0.1"], np.log(2)),
    ("ripo", ["loss.beta=0.5", "loss.step_size=0.1"], 1.0),
    ("vrpo", ["loss.beta=0.1"], np.log(2)),
]


@pytest.mark.parametrize(("loss", "words", "start_value"), PREFERENCE, ids=[p[0] for p in PREFERENCE])
def test_every_preference_loss_starts_at_its_known_value_and_runs(tmp_path, sft, loss, words, start_value):
    run_dir, outcome = start(tmp_path, f"loss={loss}", *words, f"model.archive={sft}")
    first, last = lines(run_dir, "eval")[0], lines(run_dir, "train")[-1]
    assert first["eval/loss"] == pytest.approx(start_value, abs=1e-5)
    assert abs(first["eval/rewards/margins"]) < 1e-5
    assert lines(run_dir, "train")[0]["train/loss"] == pytest.approx(start_value, abs=1e-5)
    assert last["step"] == 2 and last["examples"] == 32
    assert outcome.metric is not None


@pytest.mark.parametrize("loss", ["reward", "gpm"])
def test_reward_models_train_and_open_in_transformers(tmp_path, sft, loss):
    run_dir, _ = start(tmp_path, f"loss={loss}", f"model.archive={sft}")
    assert "test/rewards/accuracies" in lines(run_dir, "eval")[-1]
    AutoModelForSequenceClassification.from_pretrained(run_dir / "LATEST")


def test_base_evaluates_only(tmp_path, sft):
    run_dir, _ = start(
        tmp_path, "loss=base", f"model.archive={sft}", "eval_only_once=true", "stopping=plateau"
    )
    assert not lines(run_dir, "train") and lines(run_dir, "eval") and not list(run_dir.glob("step-*"))


def test_the_checkpoint_opens_in_plain_transformers_with_the_same_log_probs(tmp_path, sft):
    run_dir, _ = start(tmp_path, "loss=dpo", "loss.beta=0.1", f"model.archive={sft}")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "LATEST")
    run = compose([*SMALL, "loss=dpo", "loss.beta=0.1", f"model.archive={sft}"])
    row = run_data.load_data(run, tokenizer).rows["test"][0]
    ids = torch.tensor(np.concatenate([row.prompt, row.responses[0]]))[None].long()
    with torch.no_grad():
        logps = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
    ours = json.loads((run_dir / "records" / "test-32.jsonl").read_text().splitlines()[0])
    assert ours["uid"] == row.uid
    assert float(logps[len(row.prompt) - 1 :].sum()) == pytest.approx(ours["logps/chosen"], abs=1e-4)


def test_lora_trains_adapters_and_writes_a_merged_export(tmp_path, sft):
    run_dir, _ = start(
        tmp_path,
        "loss=dpo",
        "loss.beta=0.1",
        "model.use_lora=true",
        "model.lora_rank=2",
        f"model.archive={sft}",
    )
    assert lines(run_dir, "train")[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert (run_dir / "LATEST" / "adapter_model.safetensors").is_file()
    AutoModelForCausalLM.from_pretrained(run_dir / "merged")


def test_sampling_during_evaluation_writes_both_models(tmp_path, sft):
    words = ["sample_during_eval=true", "n_eval_model_samples=3", "sample_max_new_tokens=4"]
    run_dir, _ = start(tmp_path, "loss=dpo", "loss.beta=0.1", f"model.archive={sft}", *words)
    rows = [json.loads(line) for line in (run_dir / "samples" / "0.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["policy"] * 3 + ["reference"] * 3


def test_early_stopping_cuts_the_rates_and_stops(tmp_path, sft):
    words = [
        "trainer=GroupTrainerEarlyStop",
        "stopping.patience=0",
        "stopping.threshold=0.9",
        "stopping.min_lr=1e-5",
    ]
    words += [
        "loss=gr_dpo",
        "loss.beta=0.1",
        "weighting.adaptive_step_size=true",
        "weighting.step_factor=0.25",
    ]
    run_dir, _ = start(
        tmp_path, *words, f"model.archive={sft}", "n_examples=400", "n_epochs=null", "warmup_steps=0"
    )
    results = json.loads((run_dir / "results.json").read_text())
    assert results["status"] == "stopped" and results["examples"] == 32  # cuts at 16 and 32
    rates = [(row["lr"], row["train/step_size"]) for row in lines(run_dir, "train")]
    assert rates == [pytest.approx(pair) for pair in ((1e-3, 0.01), (1e-4, 0.0025))]


def test_the_watched_metric_of_a_run_with_one_group_is_its_own(tmp_path, sft):
    rows = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "datasets=[local]",
        f"data.local.path={tmp_path}/rows.jsonl",
        "data.local.validation_fraction=0.2",
    ]
    words += ["~data.opinions", "stopping=plateau", "loss=dpo", "loss.beta=0.1", f"model.archive={sft}"]
    run_dir, outcome = start(tmp_path, *words)
    last = [row for row in lines(run_dir, "eval") if row["split"] == "eval"][-1]
    assert outcome.metric == last["eval/loss"]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_best_evaluation_is_what_remains_and_the_end_of_the_plan_has_one(tmp_path, sft, mode):
    words = ["stopping=plateau", "stopping.metric=eval/loss", f"stopping.mode={mode}", "lr=1e-2"]
    run_dir, outcome = start(tmp_path, "loss=dpo", "loss.beta=0.1", f"model.archive={sft}", *words)
    rows = [row for row in lines(run_dir, "eval") if row["split"] == "eval"]
    losses = {row["examples"]: row["eval/loss"] for row in rows if "restored_from" not in row}
    best = {"min": min, "max": max}[mode](losses, key=losses.__getitem__)
    assert (
        list(losses) == [0, 16, 32] and best == {"min": 32, "max": 16}[mode]
    )  # the last is the best, and is not
    assert [row["restored_from"] for row in rows[3:]] == ([] if best == 32 else [best])
    assert outcome.metric == losses[best]
    with (run_dir / "results.csv").open(newline="") as handle:
        table = [
            [r[c] for c in ("step", "split", "group", "metric", "restored_from")]
            for r in csv.DictReader(handle)
        ]
    assert len(set(map(tuple, table))) == len(table) and {r[-1] for r in table} == {
        "",
        *(["16"] if best == 16 else []),
    }
    kept, middle = (load_file(run_dir / f / "model.safetensors") for f in ("LATEST", "step-16"))
    assert all(torch.equal(kept[k], middle[k]) for k in middle) == (best == 16)


@pytest.mark.parametrize(
    ("words", "missing", "told"),
    [
        (["weighting=importance"], "train", r"group 'b' has 0 training examples .* drop the group"),
        (["weighted_batches=true"], "train", "weighted_batches=true: group b has no training rows"),
        (["weighting=group_robust"], "test", "no test row of group b: .* add rows or drop the group$"),
        (["stopping=plateau"], "validation", r"no validation row of group b: .* another stopping\.metric"),
        (["stopping=plateau", "stopping.metric=eval/loss"], "validation", None),
        (["stopping=plateau"], "test", None),
        (
            ["stopping=plateau", "eval_splits=[test]"],
            "test",
            r"stopping\.metric=eval/loss/worst_group: will not be there",
        ),
        (["stopping=plateau", "stopping.metric=train_eval/loss"], "test", "40 validation"),
        ([], "test", None),
    ],
)
def test_a_group_that_is_not_trained_on_or_measured_is_told_before_a_model_is_loaded(
    tmp_path, monkeypatch, words, missing, told
):
    class Loading(Exception):
        pass

    def load(*args, **kwargs):
        raise Loading

    monkeypatch.setattr(assembly.models, "build_policy", load)
    for split in ("train", "validation", "test"):
        rows = [
            {"prompt": f"{split} {group} {i}?", "chosen": "yes", "rejected": "no", "group": group}
            for group in ("a" if split == missing else "ab")
            for i in range(20)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = [f"data.local.path={tmp_path}/train.jsonl"]
    files += [f"data.local.{split}_path={tmp_path}/{split}.jsonl" for split in ("validation", "test")]
    fixed = ["model=tiny-llama", "loss=ipo", "loss.beta=0.1", "assert_sft_step=false", "wandb.enabled=false"]
    run = compose([*fixed, f"run_root={tmp_path}", "datasets=[local]", *files, *words])
    with pytest.raises(UserError if told else Loading, match=told):
        assembly.run_training(run)


# the worst evaluation, step-16, is what remains
KEEPS_WORST = ["loss=dpo", "loss.beta=0.1", "lr=1e-2", "stopping=plateau", "stopping.metric=eval/loss", "stopping.mode=max"]  # fmt: skip


def test_a_finished_run_goes_on_where_more_epochs_are_allowed(tmp_path, sft):
    words = [*KEEPS_WORST, f"model.archive={sft}", "exp_name=x"]
    run_dir, _ = start(tmp_path, *words)
    more = ["n_examples=64", "n_epochs=2"]
    start(tmp_path, *words, *more, "resume_allow=[n_examples,n_epochs]")
    rows = [row for row in lines(run_dir, "eval") if row["split"] == "eval"]
    assert [row["examples"] for row in rows[:6]] == [0, 16, 32, 32, 56, 64]
    assert ["restored_from" in row for row in rows[:6]] == [False, False, False, True, False, False]
    assert json.loads((run_dir / "results.json").read_text())["examples"] == 64
    before = (run_dir / "metrics.jsonl").read_bytes()
    start(tmp_path, *words, *more)  # finished again
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_a_damaged_best_checkpoint_is_told_and_can_be_made_again(tmp_path, sft, monkeypatch):
    def damage_then_finish(trainer, finish=trainers.Trainer.finish):
        weights = trainer.parts.run_dir / "step-16" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"!")
        finish(trainer)

    words = [*KEEPS_WORST, f"model.archive={sft}", "exp_name=x"]
    with monkeypatch.context() as patch:
        patch.setattr(trainers.Trainer, "finish", damage_then_finish)
        with pytest.raises(UserError, match=r"cannot be restored: .*step-16.* delete .*step-16 and start"):
            start(tmp_path, *words)
    shutil.rmtree(tmp_path / "x" / "step-16")
    run_dir, _ = start(tmp_path, *words)
    assert lines(run_dir, "eval")[-1]["restored_from"] == 16


def test_a_run_that_resumes_from_a_finished_one_elsewhere_ends_as_that_did(tmp_path, sft):
    words = [*KEEPS_WORST, f"model.archive={sft}"]
    there, first = start(tmp_path, *words, "exp_name=x")
    here, second = start(tmp_path, *words, "exp_name=y", f"resume_from={there}")
    assert first.metric == second.metric and (here / "LATEST" / "model.safetensors").is_file()
    more = ["n_examples=64", "n_epochs=2", "resume_allow=[n_examples,n_epochs]"]
    start(tmp_path, *words, *more, "exp_name=z", f"resume_from={there}")  # its best is not in this directory


def test_the_same_command_shows_the_finished_results(tmp_path, sft, capsys):
    run_dir, _ = start(tmp_path, "exp_name=x")
    capsys.readouterr()
    before = (run_dir / "metrics.jsonl").read_bytes()
    start(tmp_path, "exp_name=x")
    assert "finished after 32 examples" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_other_settings_in_the_same_directory_are_refused_with_the_difference(tmp_path):
    start(tmp_path, "exp_name=x")
    with pytest.raises(UserError, match=r"lr: 0.001 -> 0.5"):
        start(tmp_path, "exp_name=x", "lr=0.5")
    start(tmp_path, "exp_name=x", "lr=0.5", "fresh=true")


def test_a_finished_run_goes_on_when_it_is_prolonged(tmp_path, sft, capsys):
    run_dir, _ = start(tmp_path, "exp_name=x", "n_examples=16")
    start(tmp_path, "exp_name=x", "resume_allow=[n_examples]")
    assert "finished after 32 examples" in capsys.readouterr().out
    assert [row["examples"] for row in lines(run_dir, "train")] == [16, 32]
    whole, _ = start(tmp_path, "exp_name=whole")
    ours, theirs = (load_file(d / "LATEST" / "model.safetensors") for d in (run_dir, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("words", [("n_examples=40",), ("batch_size=8",), ("n_examples=16",)])
def test_a_checkpoint_that_is_at_no_step_of_the_plan_is_refused(tmp_path, words):
    other, _ = start(tmp_path, "exp_name=other", "n_examples=24")  # its last step has 8 rows
    with pytest.raises(
        UserError, match=r"2 steps took 24 rows, in this run they take (32|16) .*multiple of batch_size"
    ):
        start(tmp_path, "exp_name=new", *words, f"resume_from={other}/LATEST")


def test_another_runs_checkpoint_is_gone_on_from_with_a_directory_of_its_own(tmp_path, sft):
    words = ["stopping=plateau", "loss=dpo", "loss.beta=0.1", f"model.archive={sft}", "n_epochs=null"]
    first, _ = start(tmp_path, *words, "exp_name=first", "lr=0.5", "warmup_steps=0", "n_examples=32")
    assert lines(first, "eval")[-1]["restored_from"] == 0
    run_dir, _ = start(tmp_path, *words, "exp_name=second", "n_examples=64", f"resume_from={first}/LATEST")
    rows = lines(run_dir, "eval")
    assert rows[0]["examples"] == 56 and "restored_from" not in rows[0]  # epochs have 40 rows
    best = min((row for row in rows if row["split"] == "eval"), key=lambda row: row["eval/loss/worst_group"])
    assert (run_dir / f"step-{best['examples']}").is_dir()
    same, _ = start(tmp_path, *words, "exp_name=third", "n_examples=32", f"resume_from={first}/LATEST")
    assert (same / "LATEST" / "model.safetensors").is_file() and lines(same, "eval")


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["reference=live"], True),
        (["reference=cached", "cache_dir={tmp_path}/gone"], True),
        (["reference=cached"], False),  # its values were kept
        (["reference=cached", "model.use_lora=true"], True),
    ],
)
def test_a_reference_that_changed_since_the_run_began_is_refused(tmp_path, sft, words, refused):
    shutil.copytree(sft, tmp_path / "archive", ignore=shutil.ignore_patterns("manifest.json", "training"))
    fixed = ["exp_name=x", "loss=dpo", "loss.beta=0.1", f"model.archive={tmp_path}/archive"]
    fixed += [word for word in words if not word.startswith("cache_dir")]
    start(tmp_path, *fixed, "n_examples=16")
    path = tmp_path / "archive" / "model.safetensors"
    save_file({k: 1.01 * v for k, v in load_file(path).items()}, path, metadata={"format": "pt"})
    more = [word.format(tmp_path=tmp_path) for word in words if word.startswith("cache_dir")]
    with pytest.raises(UserError, match="the reference has other weights") if refused else nullcontext():
        start(tmp_path, *fixed, *more, "resume_allow=[n_examples]")


def test_cached_and_live_references_give_one_trajectory(tmp_path, sft):
    words = ["loss=dpo", "loss.beta=0.1", f"model.archive={sft}"]
    runs = [
        start(tmp_path, *words, f"reference={mode}", f"exp_name={mode}")[0] for mode in ("live", "cached")
    ]
    a, b = ([row["train/loss"] for row in lines(run_dir, "train")] for run_dir in runs)
    assert a == pytest.approx(b, abs=1e-6)


FP32 = ["model.policy_dtype=float32", "model.reference_dtype=float32"]


def test_bf16_arithmetic_keeps_fp32_weights(tmp_path, sft):
    run_dir, _ = start(tmp_path, "loss=dpo", "loss.beta=0.1", f"model.archive={sft}", "precision=bf16", *FP32)
    assert lines(run_dir, "train")[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-2)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("words", [["weighted_batches=true"], ["microbatch_tokens=200"], ["sep_pairs=true"]])
def test_batching_options_run(tmp_path, sft, words):
    run_dir, _ = start(tmp_path, "loss=gr_dpo", "loss.beta=0.1", f"model.archive={sft}", *words)
    assert lines(run_dir, "train")[-1]["examples"] == 32


def test_two_data_sets_mix_by_weight(tmp_path, sft):
    words = ["datasets=[opinions,opinions_b]", "data.opinions_b.num_train=40", "data.opinions_b.data_seed=1", "data.mix_weights={opinions: 3, opinions_b: 1}"]  # fmt: skip
    run_dir, _ = start(tmp_path, *words, "data.opinions_b.num_validation=10", "data.opinions_b.num_test=10")
    assert lines(run_dir, "train")


def test_the_global_generators_are_never_drawn_from(tmp_path, sft):
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the global one is what must not move
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    start(
        tmp_path,
        "loss=dpo",
        "loss.beta=0.1",
        f"model.archive={sft}",
        "sample_during_eval=true",
        "sample_max_new_tokens=2",
    )
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


# ------------------------------------------------------------------------------------------------ cold starts


def cold(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "train.py", *words], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def test_a_typo_exits_with_2_and_one_line(tmp_path):
    done = cold("loss=dpo", "loss.betta=1", f"run_root={tmp_path}")
    assert done.returncode == 2 and "did you mean 'beta'" in done.stderr and "Traceback" not in done.stderr


def test_an_audit_shows_the_passport_and_loads_no_model(tmp_path):
    done = cold(*SMALL, "audit=true", f"run_root={tmp_path}")
    assert done.returncode == 0 and "north" in done.stdout and not list(tmp_path.rglob("model.safetensors"))


def test_the_original_readme_command_runs(tmp_path, sft):
    """README of the DPO repository with only model, data path and archive changed."""
    data = tmp_path / "hh.jsonl"
    rows = [
        {"chosen": f"\n\nHuman: question {i}?\n\nAssistant: a good answer {i}", "rejected": f"\n\nHuman: question {i}?\n\nAssistant: bad"}
        for i in range(90)
    ]  # fmt: skip
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cold(
        "model=tiny-llama", "datasets=[hh]", f"data.hh.path={data}", "loss=dpo", "loss.beta=0.1", "exp_name=x",
        "gradient_accumulation_steps=2", "batch_size=64", "eval_batch_size=32", "trainer=BasicTrainer",
        "sample_during_eval=false", f"model.archive={sft}", f"run_root={tmp_path}", WANDB_MODE="disabled",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "finished after" in done.stdout and (tmp_path / "x" / "LATEST" / "model.safetensors").is_file()
