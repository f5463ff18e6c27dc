"""run_sft.sh, run_multi.sh, run_multi_robust.sh: what reaches train.py, and that it is the paper's settings (Ramesh et al. 2024, Table 2)."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from config.compose import compose
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("run_sft.sh", "run_multi.sh", "run_multi_robust.sh", "robust_opinions.sh")


def calls(place: Path, script: str, *words: str) -> list[list[str]]:
    """The words of each call of Python after the first two (-u train.py), in a checkout whose Python writes them down."""
    (place / "scripts").mkdir()
    for name in (*SCRIPTS, "seeds.sh", "compare.sh", "usage.sh"):
        shutil.copy(ROOT / "scripts" / name, place / "scripts" / name)
    (place / "scripts" / "setup.sh").write_text("exit 0\n")
    python = place / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done >>calls; echo -- >>calls\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["sh", f"scripts/{script}", *words], cwd=place, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(done.stderr)
    written = (place / "calls").read_text().split("--\n")[:-1]
    return [call.strip("\n").split("\n")[2:] for call in written]


@pytest.mark.parametrize(
    ("script", "seeds", "loss", "expected"),
    [
        ("run_sft.sh", [0], "SFT", {"lr": 1e-4, "optimizer": "RMSprop", "n_epochs": 1, "warmup_steps": 150}),
        ("run_multi.sh", [0, 1, 2, 3, 4], "IPO", {"lr": 3e-5, "optimizer": "AdamW", "n_epochs": 30}),
        ("run_multi_robust.sh", [0, 1, 2, 3, 4], "IPO", {"lr": 6e-5, "optimizer": "AdamW", "n_epochs": 30}),
    ],
)
def test_by_default_the_scripts_run_the_paper(tmp_path, script, seeds, loss, expected):
    archive = [] if script == "run_sft.sh" else ["--model.archive", "runs/sft_seed0/LATEST"]
    runs = [compose(call) for call in calls(tmp_path, script, *archive)]
    assert [run.config.seed for run in runs] == seeds
    run = runs[0]
    assert {key: getattr(run.config, key) for key in expected} == expected
    config = run.config
    assert (config.batch_size, config.gradient_accumulation_steps, config.eval_batch_size) == (16, 2, 8)
    assert (type(run.loss).__name__, run.model.name_or_path) == (loss, "google/gemma-2b")
    countries = run.datasets[0].settings.countries
    assert countries == ["Nigeria", "Egypt", "India (Current national sample)", "China", "Japan"]
    assert run.datasets[0].settings.train_frac == 0.8
    if loss == "IPO":
        assert run.loss.beta == 0.01 and run.model.archive == "runs/sft_seed0/LATEST"
        assert run.stopping.watched() == "eval/loss/worst_group" and run.stopping.watched_mode() == "min"
        assert run.stopping.watched_patience(config.eval_every) == 4 and run.stopping.min_lr == 1e-8
    robust = script == "run_multi_robust.sh"
    assert type(run.weighting).__name__ == ("GroupRobust" if robust else "Uniform")
    if robust:  # the reference's 5e-7 at batch 16
        assert run.weighting.step_size == 16 * 5e-7
        assert run.weighting.adaptive_step_size and run.weighting.step_factor == 0.5


def test_the_reference_s_flags_and_hydra_s_overrides_mix(tmp_path):
    words = [
        "--model",
        "tiny",
        "--model_archive",
        "A B",
        "--seeds",
        "3 5",
        "--loss.step_size=1e-7",
        "--exp_name",
        "x",
    ]
    words += ["datasets=[goqa_4,goqa_8]", "n_epochs=2", "stopping=none"]
    found = calls(tmp_path, "run_multi_robust.sh", *words)
    runs = [compose(call) for call in found]
    assert [run.config.seed for run in runs] == [3, 5]
    assert [run.config.exp_name for run in runs] == ["x_seed3", "x_seed5"]
    run = runs[1]
    assert run.model.archive == "A B" and run.weighting.step_size == 1e-7 and run.config.n_epochs == 2
    assert run.config.datasets == ["goqa_4", "goqa_8"] and type(run.stopping).__name__ == "NoStopping"


def test_the_flags_of_the_reference_s_scripts_all_arrive(tmp_path):
    words = [
        "--model",
        "tiny",
        "--datasets",
        "goqa_0,goqa_4",
        "--step_sizes",
        "1e-6,2e-6",
        "--nseeds",
        "1",
        "--exp_name=x",
    ]
    words += [
        "--divide_by_totalcount",
        "False",
        "--train_frac",
        "0.4",
        "--loss",
        "ripo",
        "--label_smoothing",
        "0",
    ]
    words += [
        "--gradient_accumulation_steps",
        "4",
        "--batch_size",
        "8",
        "--eval_batch_size",
        "4",
        "--lr",
        "1e-3",
    ]
    words += [
        "--scheduler_metric",
        "accuracy",
        "--adaptive_step_size",
        "False",
        "--sample_during_eval",
        "False",
    ]
    words += [
        "--eval_only_once",
        "False",
        "--optimizer",
        "Adam",
        "--trainer",
        "GroupTrainerEarlyStop",
        "--min_lr",
        "1e-6",
    ]
    words += ["--model_archive", "A", "--loss_beta", "0.02", "--step_factor", "0.1", "--n_epochs", "2"]
    words += [
        "--eval_every",
        "192",
        "--eval_train_every",
        "192",
        "--use_kfoldsplit",
        "True",
        "--patience_factor",
        "0.2",
    ]
    runs = [compose(call) for call in calls(tmp_path, "run_multi_robust.sh", *words)]
    assert [(r.config.seed, r.weighting.step_size) for r in runs] == [
        (0, 1e-6),
        (1, 1e-6),
        (0, 2e-6),
        (1, 2e-6),
    ]
    assert [run.config.exp_name for run in runs[1:3]] == ["x_step1e-6_seed1", "x_step2e-6_seed0"]
    run = runs[1]
    config, weighting, stopping = run.config, run.weighting, run.stopping
    assert config.datasets == ["goqa_0", "goqa_4"]
    assert [(d.settings.train_frac, d.settings.kfold) for d in run.datasets] == [(0.4, 1), (0.4, 1)]
    assert (weighting.normalizer, weighting.adaptive_step_size, weighting.step_factor) == (
        "in_batch_mean",
        False,
        0.1,
    )
    assert (stopping.watched_mode(), stopping.min_lr, stopping.watched_patience(192)) == ("max", 1e-6, 2)
    assert (config.batch_size, config.gradient_accumulation_steps, config.eval_batch_size) == (8, 4, 4)
    assert (config.lr, config.n_epochs, config.optimizer, config.eval_every) == (1e-3, 2, "Adam", 192)
    assert config.eval_train_data and not config.eval_only_once and not config.sample_during_eval
    assert (run.loss.beta, run.model.archive) == (0.02, "A")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--step_sizes", "1,2"], "--exp_name"),
        (["--seed", "1"], "--seeds"),
        (["--loss_beta"], "--loss_beta: a value is missing"),
        (["--nseeds", "many"], "--nseeds many: must be a number"),
        (["--seeds", "0 x"], "--seeds x: must be whole numbers"),
        (["--seeds", ""], "no seed is named"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        calls(tmp_path, "run_multi_robust.sh", *words)
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("way", ["shown", "hidden"])
def test_the_comparison_of_weightings_passes_its_data_to_every_step(tmp_path, way):
    train, _, figure, *exact = calls(tmp_path, "robust_opinions.sh", way, "run_root=R", "lr=0.1")
    names = {"shown": "robust_opinions", "hidden": "robust_opinions_hidden"}
    assert figure == [f"runs=R/{names[way]}", f"out=R/{names[way]}/figures"]
    words = [word for word in train if word.partition("=")[0] not in ("-m", "experiment", "seed")]
    run = compose(["experiment=group_robust_opinions_gr_ipo", *words])
    assert (run.config.lr, run.config.exp_name) == (0.1, names[way])
    assert run.datasets[0].settings.group_in_prompt == (way == "shown")
    if way == "hidden":
        (words,) = exact
        assert words[-1] == "tradeoff.runs=R/robust_opinions_hidden"
        told = compose([*words[:-1], "assert_sft_step=false", "datasets=[opinions]"]).datasets[0].settings
        assert told.group_sizes == run.datasets[0].settings.group_sizes == [0.6, 0.25, 0.1, 0.05]
        assert not told.group_in_prompt


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda p: p.name)
def test_help_prints_the_head_of_the_script_and_does_nothing(path, tmp_path):
    if path.name == "usage.sh":  # the others source it
        return
    done = subprocess.run(
        ["sh", path, "a=1", "--help"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    head = path.read_text("utf-8").partition("\nset -eu")[0].splitlines()[1:]
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [line.removeprefix("#").removeprefix(" ") for line in head]
