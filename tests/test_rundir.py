"""The run directory: locks, settings that may not change, secrets, going back to a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from pathlib import Path

import pytest
import yaml

from engine import rundir
from engine.rundir import (
    check_config,
    differences,
    flatten,
    lock,
    prepare,
    provenance,
    redact,
    set_aside,
    truncate,
    truncate_metrics,
    write_facts,
)
from tests.test_checkpoint import in_child
from utils import UserError, make_folder

CONFIG = {
    "seed": 0,
    "lr": 1e-5,
    "loss": {"name": "dpo", "beta": 0.1},
    "datasets": ["hh"],
    "wandb": {"tags": []},
}


def with_(**changes) -> dict:
    return {**CONFIG, **changes}


# ----------------------------------------------------------------------------------------------- directory


def test_the_directory_is_made_and_left_empty(tmp_path):
    assert list(prepare(tmp_path / "runs" / "a").iterdir()) == []
    assert prepare(tmp_path / "runs" / "a") == tmp_path / "runs" / "a"


def test_a_directory_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run_dir=.*file: cannot write there \(File exists\)"):
        prepare(tmp_path / "file")
    with pytest.raises(UserError, match=r"run_dir=.*Not a directory"):
        prepare(tmp_path / "file" / "below")

    def denied(self: Path, data: bytes) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(UserError, match=r"cannot write there.*Permission denied"):
        prepare(tmp_path / "denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write there"):
        prepare(tmp_path)


# ---------------------------------------------------------------------------------------------------- lock


@pytest.mark.fault
def test_a_second_process_is_told_who_holds_the_directory(tmp_path):
    me = f"pid {os.getpid()} on {socket.gethostname()}"

    def second() -> None:
        with pytest.raises(UserError, match=re.escape(me)), lock(tmp_path):
            raise AssertionError("two processes hold the directory")

    with lock(tmp_path):
        assert in_child(second) == 0
    with lock(tmp_path):  # free again
        pass


@pytest.mark.fault
def test_a_killed_process_holds_nothing(tmp_path):
    def killed() -> None:
        with lock(tmp_path):
            os.kill(os.getpid(), 9)

    assert in_child(killed) == -9
    with lock(tmp_path):
        assert f"pid {os.getpid()}" in (tmp_path / ".lock").read_text()


# ------------------------------------------------------------------------------------------------ settings


def test_the_same_settings_continue_and_others_are_refused_with_the_difference(tmp_path):
    assert check_config(tmp_path, CONFIG) == []
    write_facts(tmp_path, CONFIG, {})
    assert check_config(tmp_path, json.loads(json.dumps(CONFIG))) == []
    changed = with_(lr=2e-5, loss={"name": "ipo", "tau": 1.0})
    with pytest.raises(UserError) as caught:
        check_config(tmp_path, changed)
    text = str(caught.value)
    for line in ("lr: 1e-05 -> 2e-05", "loss.name: 'dpo' -> 'ipo'", "loss.beta: 0.1 -> '(absent)'"):
        assert f"  {line}\n" in text
    assert "exp_name=" in text
    assert "fresh=true" in text
    assert "resume_allow=[loss.beta,loss.name,loss.tau,lr]" in text


def test_named_keys_and_groups_may_change(tmp_path):
    write_facts(tmp_path, CONFIG, {})
    changed = with_(lr=2e-5, loss={"name": "ipo", "beta": 0.2}, wandb={"tags": ["x"]})
    allowed = check_config(tmp_path, changed, allow=["lr", "loss"], ignore=["wandb"])
    assert allowed == ["loss.beta: 0.1 -> 0.2", "loss.name: dpo -> ipo", "lr: 1e-05 -> 2e-05"]
    with pytest.raises(UserError, match=r"resume_allow=\[lr\]"):
        check_config(tmp_path, changed, allow=["loss", "l"], ignore=["wandb"])


@pytest.mark.parametrize("number", [1e-5, 0.1, 5e-7, 1e22, 123456789.123456789, 5e-324, 1 / 3])
def test_floats_survive_the_file(tmp_path, number):
    write_facts(tmp_path, with_(lr=number), {})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == number
    assert check_config(tmp_path, with_(lr=number)) == []


def test_values_that_look_like_others_survive_the_file(tmp_path):
    config = with_(a="1e-5", b="null", c="true", d=None, e=[], f={}, g=(1, 2), h="\u00e9\u2028x", i="0123")
    write_facts(tmp_path, config, {})
    assert check_config(tmp_path, config) == []


@pytest.mark.parametrize("damage", ["{", "- 1\n", ""])
def test_a_damaged_config_is_named(tmp_path, damage):
    (tmp_path / "config.yaml").write_text(damage)
    with pytest.raises(UserError, match=r"config.yaml: .*fresh=true"):
        check_config(tmp_path, CONFIG)


def test_differences_are_told_by_dotted_key():
    assert flatten({"a": {"b": {"c": 1}}, "d": {}}) == {"a.b.c": 1, "d": {}}
    assert differences({"a": None}, {}) == {"a": (None, "(absent)")}


# ------------------------------------------------------------------------------------------------- secrets


def made_by(command, *, seed, root):
    return provenance(config_hash="c1", config_hash_no_seed="c0", command=command, seed=seed, root=root)


def test_secrets_are_hidden_by_name_and_by_value(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "verysecretvalue")
    config = with_(
        wandb={"key": "abc123", "tags": ["verysecretvalue"], "project": "p"},
        hub={"hf_token": "hf_xyz"},
        data={"prompt_key": "question", "tokenize": "separate", "key": None},
    )
    assert redact(config)["wandb"] == {"key": "***", "tags": ["***"], "project": "p"}
    assert redact(config)["data"] == config["data"]
    command = ["train.py", "wandb.key=abc123", "+hub.hf_token=hf_xyz", "data.prompt_key=question", "lr=1"]
    facts = made_by(command, seed=0, root=tmp_path)
    assert facts["command"] == [
        "train.py",
        "wandb.key=***",
        "+hub.hf_token=***",
        "data.prompt_key=question",
        "lr=1",
    ]
    write_facts(tmp_path, config, facts)
    for path in tmp_path.iterdir():
        for secret in ("abc123", "hf_xyz", "verysecretvalue"):
            assert secret not in path.read_text()
    assert check_config(tmp_path, config) == []  # the stored file has *** and still is the same run


# ---------------------------------------------------------------------------------------------- provenance


def test_provenance_tells_what_was_run_and_keeps_the_first_start(tmp_path):
    first = made_by(["train.py"], seed=3, root=Path(__file__).parent)
    assert set(first) >= {
        "git",
        "versions",
        "config_hash",
        "config_hash_no_seed",
        "command",
        "seed",
        "started",
    }
    assert first["versions"]["torch"]
    assert (first["config_hash"], first["config_hash_no_seed"]) == ("c1", "c0")
    write_facts(tmp_path, CONFIG, first)
    write_facts(tmp_path, with_(lr=2e-5), {**first, "command": ["again"]}, examples=64)
    stored = json.loads((tmp_path / "provenance.json").read_text())
    assert stored["command"] == ["train.py"]
    assert [(r["examples"], r["command"]) for r in stored["resumed"]] == [(64, ["again"])]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["lr"] == 2e-5
    write_facts(tmp_path, CONFIG, first)  # a new start from nothing
    assert "resumed" not in json.loads((tmp_path / "provenance.json").read_text())


# -------------------------------------------------------------------------------------------------- resume


def rows(path: Path) -> list[int]:
    return [json.loads(line)["examples"] for line in path.read_text().splitlines()]


def write_rows(path: Path, counts: list[int], torn: str = "") -> None:
    path.write_text("".join(json.dumps({"examples": n}) + "\n" for n in counts) + torn)


def test_metrics_go_back_to_the_offset_of_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [8, 16, 16, 24])
    offset = len(b'{"examples": 8}\n{"examples": 16}\n')
    assert truncate_metrics(path, examples=16, offset=offset) == offset
    assert rows(path) == [8, 16]  # the second row at 16 came after the checkpoint at 16
    assert truncate_metrics(path, examples=16, offset=offset) == offset
    assert truncate_metrics(path, examples=0, offset=0) == 0
    assert path.read_text() == ""
    assert truncate_metrics(tmp_path / "absent.jsonl", examples=16, offset=4) == 0


@pytest.mark.parametrize("offset", [None, 5, 9999])
def test_without_a_good_offset_rows_after_the_count_go(tmp_path, offset):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, [8, 16, 16, 24], torn='{"examples": 2')
    truncate_metrics(path, examples=16, offset=offset)
    assert rows(path) == [8, 16, 16]
    path.write_text('{"examples": 8}\nnonsense\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a row"):
        truncate_metrics(path, examples=16, offset=offset)


def make_run(run_dir: Path) -> None:
    for folder in ("records", "samples", "step-8", "figures"):
        (run_dir / folder).mkdir()
    for name in ("records/eval-0.jsonl", "records/eval-8.jsonl", "records/train_eval-16.jsonl", "samples/8.jsonl",
                 "samples/16.jsonl", "results.json", "results.csv", "config.yaml", "keep.txt"):  # fmt: skip
        (run_dir / name).write_text("{}")
    (run_dir / "LATEST").symlink_to("step-8")
    write_rows(run_dir / "metrics.jsonl", [8, 16])


def test_a_run_goes_back_to_its_checkpoint(tmp_path):
    make_run(tmp_path)
    truncate(tmp_path, examples=8)
    left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jsonl"))
    assert left == ["metrics.jsonl", "records/eval-0.jsonl", "records/eval-8.jsonl", "samples/8.jsonl"]
    assert rows(tmp_path / "metrics.jsonl") == [8]
    assert not list(tmp_path.glob("results.*"))
    truncate(tmp_path, examples=0, metrics_offset=0)
    assert [p.name for p in tmp_path.rglob("*.jsonl")] == ["metrics.jsonl"]
    assert rows(tmp_path / "metrics.jsonl") == []


def test_fresh_moves_the_old_run_aside_and_deletes_nothing(tmp_path):
    assert set_aside(tmp_path) is None
    make_run(tmp_path)
    with lock(tmp_path):
        assert set_aside(tmp_path) == tmp_path / "previous-1"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "keep.txt", "previous-1"]
    assert (tmp_path / "previous-1" / "records" / "eval-8.jsonl").exists()
    assert (tmp_path / "previous-1" / "LATEST").resolve().name == "step-8"
    (tmp_path / "config.yaml").write_text("{}")
    assert set_aside(tmp_path) == tmp_path / "previous-2"


def test_every_file_of_a_run_is_known_to_fresh():
    assert {"metrics.jsonl", "config.yaml", "provenance.json", "step-*", "LATEST"} <= set(rundir.OURS)


def test_an_output_folder_that_cannot_be_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made a folder"):
        make_folder(tmp_path / "file" / "out")
    assert make_folder(tmp_path / "a" / "b").is_dir()
