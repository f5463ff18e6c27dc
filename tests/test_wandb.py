"""A training with the real W&B client: no network, no key, no terminal, no home; and what the loader makes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from plot_scripts import load
from plot_scripts.draw import draw_figure, read_figure
from tests.wandb_offline import OfflineApi, OfflineRun

pytest.importorskip("wandb")
ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    "model=tiny-llama", "data.opinions.num_train=30", "data.opinions.num_validation=10", "data.opinions.num_test=20",
    "batch_size=10", "n_examples=20", "eval_every=10", "lr=1e-3", "assert_sft_step=false", "loss=gr_ipo", "loss.beta=0.5",
    "sample_during_eval=true", "n_eval_model_samples=3", "sample_max_new_tokens=4", "wandb.tags=[small]", "wandb.artifact=true",
]  # fmt: skip
# whatever asks for the network fails at once
NO_NETWORK = "import socket\ndef refuse(*_, **__): raise OSError('no network')\nsocket.getaddrinfo = refuse\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    root = tmp_path_factory.mktemp("offline")
    (root / "sitecustomize.py").write_text(NO_NETWORK)
    kept = ("PATH", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k in kept} | {
        "PYTHONPATH": str(root),
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "train.py",
        *WORDS,
        f"run_root={root}",
        f"cache_dir={root}/cache",
        "exp_name=run",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
                          start_new_session=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "run", done


def test_training_logs_offline_without_a_word(trained):
    folder, done = trained
    told = [
        line for line in done.stderr.splitlines() if "wandb:" in line or " INFO " in line or " ERROR " in line
    ]
    assert told == []
    assert not (ROOT / ".wandb_cache").exists()
    run = OfflineRun(folder)
    provenance = json.loads((folder / "provenance.json").read_text())
    assert (run.name, run.job_type, run.tags, run.state) == ("run", "gr_ipo", ["small"], "finished")
    assert run.group == provenance["config_hash_no_seed"][:12]
    assert run.config["provenance"] == provenance
    assert run.defined == [("*", "examples")]


def test_best_and_last_are_in_the_summary(trained):
    folder, _ = trained
    run = OfflineRun(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["test/loss"] for row in rows if "test/loss" in row]
    assert run.summary["test/loss"] == losses[-1] and len(losses) == 3
    assert run.summary["best/test/loss"] == min(losses)
    accuracies = [row["test/rewards/accuracies"] for row in rows if "test/rewards/accuracies" in row]
    assert run.summary["best/test/rewards/accuracies"] == max(accuracies)


def test_tables_of_samples_and_of_groups_are_on_disk_to_be_synced(trained):
    folder, _ = trained
    found: dict[str, list[dict]] = {}
    for row in OfflineRun(folder).history:
        for name, value in row.items():
            if isinstance(value, dict) and value.get("_type") == "table-file":
                (path,) = folder.glob(f"wandb/offline-run-*/files/{value['path']}")
                found.setdefault(name, []).append(json.loads(path.read_text()))
    assert {name: len(tables) for name, tables in found.items()} == dict.fromkeys(
        ("eval_groups", "test_groups", "policy_samples", "reference_samples"), 3
    )
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in logged if row.get("split") == "test"][-1]
    table = found["test_groups"][-1]
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    names = [
        key.removeprefix("test/loss/").removeprefix("group_") for key in last if key.startswith("test/loss/")
    ]
    assert [r["group"] for r in rows] == names and {"north", "plain", "worst_group", "mean_group"} <= set(
        names
    )
    for name, metric in (
        ("group_south", "loss"),
        ("group_south", "rewards/accuracies"),
        ("worst_group", "loss"),
    ):
        (row,) = (r for r in rows if r["group"] == name.removeprefix("group_"))
        assert row[metric] == last[f"test/{metric}/{name}"]
    samples = [json.loads(line) for line in (folder / "samples" / "20.jsonl").read_text().splitlines()]
    mine = [row["sample"] for row in samples if row["model"] == "policy"]
    table = found["policy_samples"][-1]
    assert [row[table["columns"].index("sample")] for row in table["data"]] == mine and len(mine) == 3


def test_what_the_client_recorded_gives_the_table_and_the_figure_of_the_directory(trained, tmp_path):
    folder, _ = trained
    here = load.load_directories([folder])
    cache = tmp_path / "cache"
    there = load.load_wandb("team", "project", api=OfflineApi([folder]), cache=cache)
    assert list(there.table.columns) == [
        "run",
        "config_hash",
        "seed",
        "step",
        "examples",
        "split",
        "group",
        "metric",
        "value",
    ]
    order = ["split", "metric", "group", "examples"]
    tables = [x.table.sort_values(order, ignore_index=True) for x in (here, there)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    for name in ("worst_group", "group_robust_training", "log_ratios"):
        drawn = [
            draw_figure(read_figure(name)[1], name, tmp_path / source, loaded)
            for source, loaded in (("directory", here), ("wandb", there), ("cached", load.load_wandb("team", "project", cache=cache)))
        ]  # fmt: skip
        for paths in zip(*(d[:3] for d in drawn), strict=True):
            assert len({path.read_bytes() for path in paths}) == 1, paths
