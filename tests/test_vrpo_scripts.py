"""The pipeline scripts: which words reach which stage (with a stand-in for Python), and the whole way once (slow)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.vrpo_tools import COMMON, DATA

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def place(tmp_path) -> Path:
    """A checkout with the scripts and a Python that writes its words down; a file ``fail`` names a program that fails."""
    (tmp_path / "scripts").mkdir()
    for name in ("usage.sh", "run_vrpo.sh", "run_vrpo_two_stage.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    (tmp_path / "scripts" / "setup.sh").write_text("exit 0\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done >>calls; echo -- >>calls\n'
        'case " $* " in *" $(cat fail 2>/dev/null || echo nothing) "*) exit 3 ;; esac\n'
    )
    python.chmod(0o755)
    return tmp_path


def calls(place: Path, script: str, *words: str, code: int = 0) -> list[list[str]]:
    (place / "calls").unlink(missing_ok=True)
    done = subprocess.run(
        ["sh", f"scripts/{script}", *words], cwd=place, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    if not (place / "calls").exists():
        return [[done.stderr]]
    return [part.strip("\n").split("\n") for part in (place / "calls").read_text().split("--\n")[:-1]]


def test_words_go_to_the_stages_they_concern(place):
    words = (
        "model=tiny", "datasets=[hh]", "data.hh.path=my file.jsonl", "data.bos=never", "seed=3", "loss.lam=auto",
        "weighting=group_robust", "sample.num_pairs=4", "annotate.batch_size=8", "sft:lr=1e-3", "train:lr=1e-4", "exp_name=x",
    )  # fmt: skip
    sft, sample, annotate, train = calls(place, "run_vrpo.sh", *words)
    for call in (sft, sample, annotate, train):
        assert {"model=tiny", "seed=3", "data.bos=never"} <= set(call)
    assert {"loss=sft", "loss.sft_on=all", "exp_name=x_sft", "lr=1e-3", "data.hh.path=my file.jsonl"} <= set(
        sft
    )
    assert {
        "sample.num_pairs=4",
        "sample.out=runs/x_sampled",
        "model.archive=runs/x_sft/LATEST",
        "datasets=[hh]",
    } <= set(sample)
    assert {"annotate.data=runs/x_sampled", "annotate.out=runs/x_annotated", "annotate.cross_fit=2", "annotate.batch_size=8"} <= set(annotate)  # fmt: skip
    assert {"loss=vrpo", "loss.beta=0.1", "loss.lam=auto", "weighting=group_robust", "exp_name=x", "lr=1e-4", "datasets=[local]"} <= set(train)  # fmt: skip
    assert "data.local.path=runs/x_annotated/train.jsonl" in train
    for call, absent in (
        (sft, ("loss.lam", "weighting", "sample.", "annotate.", "train:", "lr=1e-4", "exp_name=x\n")),
        (sample, ("loss", "weighting", "annotate.", "lr=")),
        (annotate, ("loss", "weighting", "sample.", "lr=", "datasets=", "data.hh")),
        (train, ("sample.", "annotate.", "lr=1e-3", "data.hh", "datasets=[hh]", "loss.sft_on")),
    ):
        assert not [word for word in call if word.startswith(absent)]
    assert all(call.count("exp_name=x") == (call is train) for call in (sft, sample, annotate, train))


def test_a_scorer_of_ones_own_replaces_cross_fitting_and_two_stages_train_rewards(place):
    *_, annotate, train = calls(
        place, "run_vrpo_two_stage.sh", "annotate.scorer=function", "annotate.function=a:b", "run_root=r"
    )
    assert "annotate.cross_fit=2" not in annotate and "annotate.function=a:b" in annotate
    assert train.count("loss=vrpo_reward") and not [w for w in train if w.startswith("loss.beta")]
    assert "exp_name=vrpo_reward" in train and "data.local.path=r/vrpo_reward_annotated/train.jsonl" in train
    *_, train = calls(place, "run_vrpo.sh", "loss.beta=0.5", "loss.base=ipo")
    assert "loss.beta=0.5" in train and "loss.beta=0.1" not in train


def test_a_validation_file_is_used_where_there_is_one(place):
    (place / "runs" / "vrpo_annotated").mkdir(parents=True)
    (place / "runs" / "vrpo_annotated" / "validation.jsonl").touch()
    *_, train = calls(place, "run_vrpo.sh")
    assert "data.local.validation_path=runs/vrpo_annotated/validation.jsonl" in train


def test_a_stage_that_fails_ends_the_script_and_flags_are_refused(place):
    (place / "fail").write_text("commands.sample")
    assert len(calls(place, "run_vrpo.sh", code=3)) == 2
    ((message,),) = calls(place, "run_vrpo.sh", "--model", "tiny", code=2)
    assert "--model: write key=value" in message


@pytest.mark.slow
def test_the_whole_way_runs_to_the_end_and_continues(tmp_path):
    words = [
        *COMMON,
        *DATA,
        f"run_root={tmp_path}",
        f"cache_dir={tmp_path}/cache",
        "sample.max_new_tokens=4",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = ["sh", "scripts/run_vrpo.sh", *words, "exp_name=w"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert results["status"] == "finished" and results["loss"] == "vrpo"
    annotated = (tmp_path / "w_annotated" / "train.jsonl").read_bytes()
    (tmp_path / "w" / "results.json").unlink()
    again = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert (tmp_path / "w_annotated" / "train.jsonl").read_bytes() == annotated
    assert "24 rows, 24 of them already there" in again.stderr and (tmp_path / "w" / "results.json").exists()
