"""Multiruns, what they leave behind, and what of a run reaches tables and W&B."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from omegaconf import DictConfig

import assembly
import train
from commands import summarize
from config.compose import compose
from engine import metric_names, results, stats
from engine.evaluation import accuracy_interval
from plot_scripts import make_figures
from tests.test_metrics import FakeClient
from utils import UserError, log, without_nan

SMALL = [
    "model=tiny-llama", "data.opinions.num_train=30", "data.opinions.num_validation=10", "data.opinions.num_test=20",
    "batch_size=10", "n_examples=20", "eval_every=10", "lr=1e-3", "assert_sft_step=false",
]  # fmt: skip


@contextlib.contextmanager
def logging_restored() -> Iterator[None]:
    """Hydra's own set-up raises the root's level and disables every logger it finds."""
    root = logging.getLogger()
    loggers = [x for x in root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    before = root.level, list(root.handlers), [x.disabled for x in loggers]
    try:
        yield
    finally:
        root.setLevel(before[0])
        root.handlers[:] = before[1]
        for logger, disabled in zip(loggers, before[2], strict=True):
            logger.disabled = disabled


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """train.py -m over two losses and two seeds, in this process; one loss fails in all its jobs."""
    root = tmp_path_factory.mktemp("sweep")
    words = [
        *SMALL,
        "wandb.enabled=false",
        f"run_root={root}",
        f"cache_dir={root}/cache",
        "exp_name=two",
    ]
    told: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: told.append(record.getMessage())
    with pytest.MonkeyPatch.context() as patch, logging_restored():
        patch.setattr(sys, "argv", ["train.py", "-m", *words, "seed=0,1", "loss=ipo,gr_ipo,hinge", "loss.beta=0.5",
                                    "weighting.step_size=0.02", "loss.length_norm=token"])  # fmt: skip
        patch.setattr(train, "failures", [])
        patch.setattr(
            train, "setup_logging", lambda: (log.addHandler(handler), setattr(log, "disabled", False))
        )
        # one job finds its directory taken by other settings
        other = compose(
            [*words, "seed=1", "loss=hinge", "loss.beta=0.1", f"run_dir={root}/two/loss=hinge/seed=1"]
        )
        assembly.run_training(other)
        assert train.exit_code(train.compose_and_run) == 2
    log.removeHandler(handler)
    (failed,) = told
    assert "loss=hinge" in failed and "seed=1" in failed and "loss.beta" in failed
    return root / "two"


def test_a_job_that_fails_is_named_and_the_others_go_on(sweep):
    done = sorted(str(p.parent.relative_to(sweep)) for p in sweep.rglob("results.json"))
    assert done == [f"loss={loss}/seed={seed}" for loss in ("gr_ipo", "hinge", "ipo") for seed in (0, 1)]


def test_a_signal_ends_the_whole_sweep(tmp_path, monkeypatch):
    started: list[DictConfig] = []

    def stopped(cfg):
        started.append(cfg)
        raise SystemExit(143)

    monkeypatch.setattr(train, "job", stopped)
    monkeypatch.setattr(train, "failures", [])
    words = ["train.py", "-m", *SMALL, f"run_root={tmp_path}", "seed=0,1", "loss=ipo", "loss.beta=0.5"]
    monkeypatch.setattr(sys, "argv", words)
    with logging_restored():
        assert train.exit_code(train.compose_and_run) == 143
    assert [cfg.seed for cfg in started] == [0]


def test_settings_of_one_method_do_not_stop_the_others(sweep):
    """weighting.step_size is for gr_ipo alone; outside a multirun over methods it would be an error."""
    text = (sweep / "loss=gr_ipo" / "seed=0" / "config.yaml").read_text()
    assert "step_size: 0.02" in text
    assert "step_size" not in (sweep / "loss=ipo" / "seed=0" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"weighting\.step_size"):
        compose(["loss=ipo", "weighting.step_size=0.02", "loss.beta=1", "assert_sft_step=false"])
    with pytest.raises(UserError, match=r"weighting\.step_sise"):  # no method has it
        compose(
            [
                "loss=ipo",
                "weighting.step_sise=1",
                "loss.beta=1",
                "assert_sft_step=false",
                "multirun_keys=[loss]",
            ]
        )


def test_a_table_and_a_figure_come_from_one_command_each(sweep, tmp_path):
    made = summarize.main([str(sweep), f"out={tmp_path}"])
    assert {p.name for p in made} >= {"summary.csv", "differences.csv"}
    with (tmp_path / "summary.csv").open() as handle:
        table = list(csv.DictReader(handle))
    assert {row["method"] for row in table} == {"ipo", "gr_ipo", "hinge"} and {row["n"] for row in table} == {
        "2"
    }
    files = make_figures.main(["figure=worst_group", f"runs={sweep}", f"out={tmp_path}"])
    assert any(p.suffix == ".png" and p.stat().st_size > 10_000 for p in files)


def test_a_job_returns_the_watched_metric(sweep, tmp_path):
    words = [
        *SMALL,
        "wandb.enabled=false",
        "loss=ipo",
        "loss.beta=0.5",
        "loss.length_norm=token",
        "exp_name=two",
    ]
    words += [f"run_root={sweep.parent}", "seed=1", "multirun_keys=[loss,seed]"]
    outcome = assembly.run_training(compose(words))  # finished: its results again
    found = json.loads((sweep / "loss=ipo" / "seed=1" / "results.json").read_text())
    assert outcome.metric == found["metric"] == found["splits"]["validation"]["metrics"]["eval/loss"]


def test_paths_of_jobs_need_no_quotes():
    """Hydra alone refuses the second "="."""
    run = compose(["model.archive=runs/two/loss=ipo/seed=0/LATEST", "run_dir='a=b'", "++lr=0.5"])
    assert (run.model.archive, run.config.run_dir, run.config.lr) == (
        "runs/two/loss=ipo/seed=0/LATEST",
        "a=b",
        0.5,
    )


def test_sweeping_over_experiments_names_their_folders():
    words = ["assert_sft_step=false", "exp_name=e", "multirun_keys=[experiment,seed]"]
    for name in ("group_robust_opinions_ipo", "group_robust_opinions_gr_ipo"):
        run = compose([f"experiment={name}", *words])
        assert run.config.run_dir == f"runs/e/experiment={name}/seed=0"
        assert "experiment" not in run.plain


def test_experiments_of_one_figure_differ_in_what_they_say_alone():
    runs = {
        name: compose([f"experiment=group_robust_{name}", "assert_sft_step=false", "exp_name=e"])
        for name in ("goqa_ipo", "goqa_gr_ipo", "opinions_ipo", "opinions_gr_ipo", "opinions_is")
    }

    def differences(a: str, b: str) -> set[str]:
        first, second = runs[a].plain, runs[b].plain
        return {k for k in {*first, *second} if first.get(k) != second.get(k)}

    assert differences("goqa_ipo", "goqa_gr_ipo") == {"loss", "weighting", "lr"}
    assert runs["goqa_ipo"].loss == runs["goqa_gr_ipo"].loss
    assert differences("opinions_ipo", "opinions_is") == {"weighting"}
    assert differences("opinions_ipo", "opinions_gr_ipo") == {"loss", "weighting"}


# ------------------------------------------------------------------------------------------------ results.csv


def test_results_csv_has_every_number_of_every_evaluation(sweep):
    run_dir = sweep / "loss=gr_ipo" / "seed=0"
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in logged if row["kind"] == "eval"]
    with (run_dir / "results.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    assert tuple(table[0]) == results.COLUMNS
    place = {(r["step"], r["split"], r["group"], r["metric"]): r for r in table}
    assert len(place) == len(table)
    assert {r["group"] for r in table} >= {"all", "worst_group", "mean_group", "north", "plain"}
    counted = 0
    for row in evaluations:
        for name, value in row.items():
            split, metric, group, bound = metric_names.parts(name)
            if split and metric not in results.COUNTS:
                line = place[str(row["step"]), row["split"], group.removeprefix("group_") or "all", metric]
                assert float(line[bound or "value"]) == value
                counted += 1
    assert counted == sum(r[c] != "" for r in table for c in ("value", "ci_low", "ci_high")) > 300
    north = place["2", "test", "north", "rewards/accuracies"]
    low, value, high = (float(north[c]) for c in ("ci_low", "value", "ci_high"))
    assert int(north["n"]) == 4 and low <= value <= high and low < high
    for metric, worst in (("loss", max), ("rewards/accuracies", min)):
        cells = {g: place["2", "test", g, metric] for g in ("north", "south", "coast", "hills", "plain")}
        sizes = {g: int(cell["n"]) for g, cell in cells.items()}
        owner = worst(cells, key=lambda g: float(cells[g]["value"]))
        assert int(place["2", "test", "worst_group", metric]["n"]) == sizes[owner]
        assert int(place["2", "test", "mean_group", metric]["n"]) == sum(sizes.values())


def test_the_printed_table_has_a_column_of_accuracies_where_there_are_some(tmp_path):
    def printed(**row):
        table = [{"group": "all", "n": 7, "loss": 0.5, **row}]
        return results.render(
            {
                "exp_name": "x",
                "status": "finished",
                "examples": 8,
                "splits": {"test": {"prefix": "test", "table": table}},
            },
            tmp_path,
        ).splitlines()[3:5]

    assert [line.split() for line in printed()] == [["group", "loss", "n"], ["all", "0.5000", "7"]]
    head, row = printed(accuracy=0.5, ci_low=0.25, ci_high=0.75)
    assert (
        "reward accuracy [95% interval]" in head and "0.500 [0.250, 0.750]" in row and len(head) == len(row)
    )
    for nothing in (math.nan, None):  # of one prompt; as it is computed, and as results.json has it
        row = printed(accuracy=0.5, ci_low=nothing, ci_high=nothing)[1]
        assert row.split() == ["all", "0.5000", "0.500", "7"]


def test_results_json_has_null_where_one_prompt_gives_no_interval():
    records = [{"prompt_key": "p", "weight": 1.0, "loss": 0.5, "rewards/accuracies": x} for x in (0.0, 1.0)]
    table = {"table": [results.group_row(records, 0.5)], "more": (math.nan, 1.0, "NaN")}
    assert json.loads(json.dumps(without_nan(table), allow_nan=False)) == {
        "table": [{"n": 2, "prompts": 1, "loss": 0.5, "accuracy": 0.5, "ci_low": None, "ci_high": None}],
        "more": [None, 1.0, "NaN"],
    }


def test_repeated_prompts_that_all_agree_still_have_an_interval():
    """A bootstrap of equal values has no width."""
    records = [{"rewards/accuracies": 1.0, "prompt_key": key} for key in "aabbc"]
    found, fewer = (
        accuracy_interval(records),
        stats.wilson_bounds(25 / 9, 25 / 9),
    )  # (2 + 2 + 1)^2 / (4 + 4 + 1)
    assert (found.estimate, found.low, found.high, found.n) == (1.0, *fewer, 3)
    records[0]["rewards/accuracies"] = 0.0
    assert accuracy_interval(records) == stats.cluster_bootstrap([0, 1, 1, 1, 1], list("aabbc"), seed=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eval/rewards/accuracies/group_a/b/ci_low", ("eval", "rewards/accuracies", "group_a/b", "ci_low")),
        ("test/loss/worst_group", ("test", "loss", "worst_group", "")),
        ("train_eval/logps/chosen", ("train_eval", "logps/chosen", "", "")),
        ("lr", ("", "lr", "", "")),
    ],
)
def test_a_name_comes_apart(name, expected):
    assert metric_names.parts(name) == expected


# ------------------------------------------------------------------------------------------------ W&B


def test_wandb_is_told_where_the_run_comes_from_and_gets_the_final_model(tmp_path, monkeypatch):
    fake = FakeClient()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_MODE", "online")
    words = [
        "wandb.artifact=true",
        f"run_root={tmp_path}",
        "exp_name=folder/run",
        "multirun_keys=[loss,seed]",
    ]
    run = compose([*SMALL, *words])
    assembly.run_training(run)
    ((_, options),) = fake.of("init")
    provenance = json.loads((Path(run.config.run_dir) / "provenance.json").read_text())
    assert options["config"]["provenance"] == provenance and "commit" in provenance["git"]
    assert options["config"]["loss"]["name"] == "sft"
    assert options["name"] == "folder/run/loss=sft/seed=0"
    ((_, name, kind, files),) = fake.of("artifact")
    names = {Path(f).name for f in files}
    assert (name, kind) == ("folder-run", "model")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert not {"manifest.json", "optimizer.safetensors"} & names
