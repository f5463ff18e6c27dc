"""The log of a run: whole lines, exact restarts, older names, and a W&B that may be down, slow or broken."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import metric_names
from engine.metric_names import base, direction, older_names, our_names
from engine.metrics import MetricsLog, Mirror, WandbSettings, write_jsonl
from tests.test_checkpoint import in_child
from utils import UserError, log

ROOT = Path(__file__).resolve().parents[1]
OFF = WandbSettings(enabled=False)
IDENTITY = {"name": "run", "group": "abc", "job_type": "dpo"}


@pytest.fixture
def logged():
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


def open_log(run_dir: Path, wandb: WandbSettings = OFF, **options) -> MetricsLog:
    return MetricsLog(run_dir, wandb=wandb, config={"lr": 1e-5}, identity=IDENTITY, **options)


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ the file


def test_a_row_is_one_line_of_plain_numbers(tmp_path):
    metrics = open_log(tmp_path)
    values = {
        "train/loss": torch.tensor(0.5),
        "train/rewards/margins": np.float64(0.1),
        "lr": 1e-7,
        "spikes": 0,
    }
    metrics.write("train", step=1, examples=8, values=values, epoch=0, time=1.5)
    metrics.close()
    metrics.close()
    assert rows(tmp_path) == [
        {"kind": "train", "epoch": 0, "time": 1.5, "step": 1, "examples": 8, "train/loss": 0.5,
         "train/rewards/margins": 0.1, "lr": 1e-7, "spikes": 0}
    ]  # fmt: skip


def test_undefined_is_left_out_and_infinite_is_named(tmp_path):
    metrics = open_log(tmp_path)
    metrics.write(
        "train",
        step=1,
        examples=8,
        values={"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0, "e": None},
    )
    metrics.close()
    assert rows(tmp_path) == [{"kind": "train", "step": 1, "examples": 8, "d": 1.0, "nonfinite": ["b", "c"]}]


def test_other_ranks_touch_nothing(tmp_path):
    metrics = open_log(tmp_path, active=False)
    metrics.write("train", step=1, examples=8, values={"a": 1.0})
    metrics.samples(8, [{"model": "policy"}])
    metrics.artifact([tmp_path], "x")
    assert metrics.state_dict()["offset"] == 0
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_a_restart_cuts_the_file_back_to_the_checkpoint_and_never_doubles_a_row(tmp_path):
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    for run_dir, stops in ((whole, []), (cut, [3, 4, 9])):
        run_dir.mkdir()
        state, step = None, 0
        for stop in [*stops, 12]:
            metrics = open_log(run_dir, state=state, examples=8 * step)
            while step < stop:
                step += 1
                metrics.write("train", step=step, examples=8 * step, values={"train/loss": 1 / step})
                if step % 3 == 0:
                    metrics.write(
                        "eval", step=step, examples=8 * step, values={"eval/loss": 1 / step}, split="eval"
                    )
            state = json.loads(json.dumps(metrics.state_dict()))
            if (
                stop != 12
            ):  # work that the checkpoint does not know, at the same count and after it, and a torn line
                metrics.write("eval", step=step, examples=8 * step, values={"test/loss": 9.0}, split="test")
                metrics.write("train", step=step + 1, examples=8 * step + 8, values={"train/loss": 9.0})
                with metrics.path.open("a") as handle:
                    handle.write('{"kind": "tr')
            metrics.close()
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert len(rows(cut)) == 16


def test_a_start_from_nothing_drops_the_rows_of_a_dead_attempt(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"examples": 0}\n')
    open_log(tmp_path).close()
    assert rows(tmp_path) == []


def test_the_mirror_goes_on_in_the_same_run_but_not_from_another_directory(tmp_path):
    first = open_log(tmp_path)
    first.write("train", step=1, examples=8, values={"a": 1.0})
    state = first.state_dict()
    first.close()
    again = open_log(tmp_path, state=state, examples=8)
    assert again.wandb_id == first.wandb_id
    again.close()
    (tmp_path / "other").mkdir()
    other = open_log(tmp_path / "other", state=state, examples=8)
    assert other.wandb_id != first.wandb_id
    other.close()


def test_best_values_follow_the_direction_and_survive_restarts(tmp_path):
    metrics = open_log(tmp_path)
    for step, (loss, accuracy) in enumerate([(2.0, 0.5), (1.0, 0.7), (3.0, 0.6)], 1):
        values = {
            "eval/loss": loss,
            "eval/rewards/accuracies/worst_group": accuracy,
            "eval/rewards/accuracies/worst_group/ci_low": accuracy - 0.1,
            "eval/logps/chosen": -loss,
        }
        metrics.write("eval", step=step, examples=8 * step, values=values)
    metrics.write("train", step=4, examples=32, values={"train/loss": 0.0})
    expected = {"eval/loss": [1.0, 16], "eval/rewards/accuracies/worst_group": [0.7, 16]}
    assert metrics.best == expected
    again = open_log(tmp_path, state=json.loads(json.dumps(metrics.state_dict())), examples=32)
    again.write("eval", step=5, examples=40, values={"eval/loss": 1.5})
    assert again.best == expected
    metrics.close()
    again.close()


@pytest.mark.fault
def test_a_kill_while_logging_leaves_whole_lines(tmp_path):
    def body() -> None:
        metrics = open_log(tmp_path)
        threading.Timer(0.15, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        step = 0
        while True:
            step += 1
            metrics.write(
                "train", step=step, examples=step, values={f"train/m{i}": i / step for i in range(200)}
            )

    assert in_child(body) == -signal.SIGKILL
    found = rows(tmp_path)
    assert len(found) > 5
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))


@pytest.mark.fault
def test_a_full_disk_is_loud_and_tears_nothing(tmp_path):
    def body() -> None:
        import resource

        metrics = open_log(tmp_path)
        metrics.write("train", step=1, examples=8, values={"a": 1.0})
        resource.setrlimit(resource.RLIMIT_FSIZE, (80, 80))
        with pytest.raises(OSError, match=r"metrics\.jsonl: cannot append"):
            metrics.write("train", step=2, examples=16, values={"a": 1.0})

    assert in_child(body) == 0
    assert [row["step"] for row in rows(tmp_path)] == [1]


def test_samples_are_one_file_per_count(tmp_path):
    metrics = open_log(tmp_path)
    drawn = [
        {"model": "policy", "prompt": "a\u2028\n", "sample": "\u00e9"},
        {"model": "reference", "prompt": "a", "sample": "b"},
    ]
    metrics.samples(8, drawn)
    metrics.samples(16, [])
    metrics.close()
    text = (tmp_path / "samples" / "8.jsonl").read_bytes()
    assert [json.loads(line) for line in text.split(b"\n")[:-1]] == drawn
    assert not (tmp_path / "samples" / "16.jsonl").exists()
    with pytest.raises(ValueError, match="JSON"):
        write_jsonl(tmp_path / "x.jsonl", [{"a": math.nan}])
    assert not (tmp_path / "x.jsonl").exists()


# --------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "metric", "better"),
    [
        ("eval/loss", "loss", "min"),
        ("train/loss/group_win_rate", "loss", "min"),
        ("eval/rewards/accuracies/group_a/b", "rewards/accuracies", "max"),
        ("eval/rewards/accuracies/group_loss/ci_low", "rewards/accuracies", "max"),
        ("test/rewards/accuracies/worst_group/ci_high", "rewards/accuracies", "max"),
        ("train_eval/policy_accuracies/mean_group", "policy_accuracies", "max"),
        ("eval/rewards/margins", "rewards/margins", None),
        ("eval/rewards/rejected/group_loss", "rewards/rejected", None),
        ("grad_norm", "grad_norm", None),
        ("eval/group_counts/group_loss", "group_counts", None),
        ("loss", "loss", "min"),
    ],
)
def test_what_is_better_is_read_from_the_metric_and_never_from_a_group_name(name, metric, better):
    assert base(name) == metric
    assert direction(name) == better


@pytest.mark.parametrize("validation", [True, False])
def test_older_names_are_one_to_one(validation):
    groups = ["goqa_0", "goqa_1", "a/b"]
    names = older_names(groups, validation=validation)
    assert len(set(names.values())) == len(names)
    assert our_names(groups, validation=validation) == {v: k for k, v in names.items()}


def test_older_names_are_those_that_the_older_programs_wrote():
    names = older_names(["nigeria", "egypt"])
    assert {names[k] for k in names if k.startswith("train/")} == {
        "loss/train", "rewards_train/chosen", "rewards_train/rejected", "rewards_train/margins",
        "rewards_train/accuracies", "logps_train/chosen", "logps_train/rejected",
        *(f"rewards_train/{m}_{i}" for m in ("group_acc", "group_loss", "group_count", "weights") for i in (0, 1)),
    }  # fmt: skip
    for ours, theirs in {
        "step": "counters/updates",
        "examples": "counters/examples",
        "test/rewards/accuracies": "rewards_eval/accuracies",
        "test/loss/group_egypt": "loss/eval_1",
        "eval/loss/worst_group": "worst_case_loss/vald",
        "eval/rewards/accuracies/worst_group": "worst_case_rewards_vald/accuracies",
        "eval/rewards/accuracies/mean_group": "average_rewards_vald/accuracies",
        "test/policy_accuracies/group_nigeria": "logps_pol_eval/accuracies_0",
        "test/reference_accuracies/group_nigeria": "logps_ref_eval/accuracies_0",
        "train_eval/logps/chosen/group_egypt": "logps_train/chosen_1",
        "train/weights/egypt": "rewards_train/weights_1",
    }.items():
        assert names[ours] == theirs
    assert older_names([], validation=False)["eval/rewards/margins"] == "rewards_eval/margins"
    assert set(metric_names.OLDER_SAMPLES.values()) == {"policy_samples", "reference_samples"}


# --------------------------------------------------------------------------------------------------- mirror


def test_the_mode_never_needs_an_answer(tmp_path, monkeypatch, logged):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert WandbSettings().resolved_mode() == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert WandbSettings().resolved_mode() == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert WandbSettings().resolved_mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert WandbSettings().resolved_mode() == "online"
    assert WandbSettings(enabled=False).resolved_mode() == "disabled"
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert WandbSettings().resolved_mode() == "offline"
    assert WandbSettings(mode="online").resolved_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "nonsense")
    assert WandbSettings().resolved_mode() == "offline"
    assert logged == [
        "WANDB_MODE=nonsense: not one of online, offline, disabled, run, dryrun; logging offline"
    ]
    with pytest.raises(UserError, match=r"wandb\.mode=sometimes"):
        WandbSettings(mode="sometimes")
    with pytest.raises(UserError, match=r"wandb\.init_timeout"):
        WandbSettings(init_timeout=0)


class FakeArtifact:
    def __init__(self, name: str, type: str) -> None:
        self.name, self.type, self.files = name, type, []

    def add_file(self, path: str) -> None:
        self.files.append(path)

    def wait(self, timeout: float) -> None:
        assert timeout > 600


class FakeRun:
    offline = False

    def __init__(self, client: FakeClient) -> None:
        self.client, self.summary = client, {}

    def define_metric(self, *args, **kwargs) -> None:
        self.client.calls.append(("define_metric", args, kwargs))

    def log(self, values: dict) -> None:
        self.client.calls.append(("log", values))
        if self.client.fault == "log":
            raise RuntimeError("server says no\nsecond line")

    def log_artifact(self, artifact: FakeArtifact) -> FakeArtifact:
        self.client.calls.append(("artifact", artifact.name, artifact.type, artifact.files))
        return artifact

    def finish(self, exit_code: int) -> None:
        self.client.calls.append(("finish", exit_code))
        if self.client.fault == "finish":
            time.sleep(30)


class FakeClient(types.ModuleType):
    """Stands in for the wandb module; ``fault`` is the call that fails."""

    def __init__(self, fault: str | None = None) -> None:
        super().__init__("wandb")
        self.fault, self.calls, self.run = fault, [], FakeRun(self)
        self.Settings = dict
        self.Table = dict
        self.Artifact = FakeArtifact

    def teardown(self) -> None:
        self.calls.append(("teardown",))

    def init(self, **options) -> FakeRun:
        self.calls.append(("init", options))
        if self.fault == "init" and options["mode"] == "online":
            raise ConnectionError("refused")
        return self.run

    def of(self, kind: str) -> list:
        return [call for call in self.calls if call[0] == kind]


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")

    def install(fault: str | None = None) -> FakeClient:
        fake = FakeClient(fault)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def drive(run_dir: Path, **settings) -> MetricsLog:
    options = {"project": "p", "init_timeout": 0.2, "finish_timeout": 0.2, **settings}
    metrics = open_log(run_dir, WandbSettings(**options), groups=["a", "b"])
    accuracy = "eval/rewards/accuracies/worst_group"
    worst = {accuracy: 0.25, f"{accuracy}/ci_low": 0.125}
    for step in (1, 2):
        metrics.write(
            "eval",
            step=step,
            examples=8 * step,
            values={"eval/loss": step * 1.0, "eval/loss/group_b": 3.0, **worst},
        )
    metrics.samples(16, [{"model": "policy", "prompt": "x", "sample": "y"}] * 5)
    metrics.close()
    assert [row["step"] for row in rows(run_dir)] == [1, 2]
    return metrics


def test_everything_reaches_the_mirror(tmp_path, client, logged):
    fake = client()
    metrics = drive(tmp_path, legacy_names=True, table_rows=3, tags=("t",), entity="e")
    options = fake.of("init")[0][1]
    assert {k: options[k] for k in ("id", "mode", "resume", "group", "job_type", "tags", "entity", "project")} == {
        "id": metrics.wandb_id, "mode": "online", "resume": "allow", "group": "abc", "job_type": "dpo", "tags": ["t"],
        "entity": "e", "project": "p",
    }  # fmt: skip
    assert ("define_metric", ("*",), {"step_metric": "examples"}) in fake.calls
    first = fake.of("log")[0][1]
    assert first == {"step": 1, "examples": 8, "eval/loss": 1.0, "eval/loss/group_b": 3.0, "counters/updates": 1,
                     "counters/examples": 8, "loss/vald": 1.0, "loss/vald_1": 3.0,
                     "eval/rewards/accuracies/worst_group": 0.25, "eval/rewards/accuracies/worst_group/ci_low": 0.125,
                     "worst_case_rewards_vald/accuracies": 0.25}  # fmt: skip
    logged_tables = [call[1] for call in fake.of("log") if any(isinstance(v, dict) for v in call[1].values())]
    groups, _, samples = logged_tables
    assert groups == {
        "examples": 8,
        "eval_groups": {"columns": ["group", "loss", "rewards/accuracies", "rewards/accuracies/ci_low"],
                        "data": [["b", 3.0, None, None], ["worst_group", None, 0.25, 0.125]]},
    }  # fmt: skip
    assert samples["examples"] == 16
    assert len(samples["policy_samples"]["data"]) == 3
    assert fake.run.summary == {
        "best/eval/loss": 1.0, "best/eval/loss/group_b": 3.0, "best/eval/rewards/accuracies/worst_group": 0.25,
    }  # fmt: skip
    assert fake.of("finish") == [("finish", 0)]
    assert logged == []


@pytest.mark.fault
@pytest.mark.parametrize("fault", ["init", "log", "finish"])
def test_whatever_fails_the_run_goes_on_after_one_warning(tmp_path, client, logged, fault, monkeypatch):
    monkeypatch.setattr(Mirror, "TEARDOWN_S", 0.2)
    fake = client(fault)
    start = time.monotonic()
    drive(tmp_path)
    assert time.monotonic() - start < 5
    assert len(logged) == 1
    if fault == "init":
        assert "logging offline" in logged[0]
        assert [options["mode"] for _, options in fake.of("init")] == ["online", "offline"]
        assert len(fake.of("log")) == 5  # two evaluations, their tables by group, the samples
    if fault == "log":
        assert logged == ["W&B stopped (RuntimeError: server says no); metrics.jsonl goes on"]


def test_without_the_client_the_run_goes_on_after_one_warning(tmp_path, monkeypatch, logged):
    monkeypatch.setitem(sys.modules, "wandb", None)
    for mode in ("online", "offline"):
        drive(tmp_path, mode=mode)
    assert len(logged) == 2
    assert all("ModuleNotFoundError" in line and "metrics.jsonl goes on" in line for line in logged)


def test_a_model_can_be_uploaded(tmp_path, client):
    fake = client()
    metrics = open_log(tmp_path, WandbSettings())
    metrics.artifact([tmp_path / "model", tmp_path / "config"], "run-model")
    metrics.close(exit_code=3)
    assert fake.of("artifact") == [
        ("artifact", "run-model", "model", [str(tmp_path / "model"), str(tmp_path / "config")])
    ]
    assert fake.of("finish") == [("finish", 3)]


def test_disabled_means_that_the_client_is_not_even_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    drive(tmp_path, enabled=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    drive(tmp_path)


# the real client, each in a process of its own: it starts a service and an exit hook
SCRIPT = """
import sys, time
from pathlib import Path
from engine.metrics import MetricsLog, WandbSettings
start = time.monotonic()
log = MetricsLog(Path(sys.argv[1]), wandb=WandbSettings(legacy_names=True, init_timeout=2.0, finish_timeout=2.0),
                 config={"lr": 1e-5, "wandb": {"key": "verysecretkey"}}, groups=["a"],
                 identity={"name": "n", "group": "config0hash", "job_type": "dpo"})
for step in range(1, 4):
    log.write("eval", step=step, examples=8 * step, values={"eval/loss": 1.0 / step, "eval/loss/group_a": 2.0}, split="eval")
print("training was held up for", time.monotonic() - start)
log.samples(24, [{"model": "policy", "prompt": "x", "sample": "sampledtext"}])
log.close()
"""


def run_real(run_dir: Path, **env: str) -> tuple[subprocess.CompletedProcess, float]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    clean |= {
        "NETRC": str(run_dir / "no-netrc"),
        "WANDB_CACHE_DIR": str(run_dir),
        "WANDB_CONFIG_DIR": str(run_dir),
        **env,
    }
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(run_dir)], cwd=ROOT, env=clean, stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(run_dir)] == [1, 2, 3]
    held_up = float(done.stdout.split()[-1])
    assert held_up < 1.5  # mostly the import of the client, beside the training
    return done, time.monotonic() - start


def offline_bytes(run_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in (run_dir / "wandb").glob("offline-run-*/*.wandb"))


def test_without_a_key_the_real_client_works_offline_and_hides_secrets(tmp_path):
    pytest.importorskip("wandb")
    done, _ = run_real(tmp_path)
    assert done.stderr == ""
    stored = offline_bytes(tmp_path)
    for expected in (
        b"eval/loss/group_a",
        b"loss/vald_0",
        b"config0hash",
        b"best/eval/loss",
        b"policy_samples",
    ):
        assert expected in stored
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"verysecretkey" not in path.read_bytes(), path


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("server", ["refuses", "silent"])
def test_a_dead_server_costs_one_warning(tmp_path, server):
    pytest.importorskip("wandb")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)  # the kernel accepts; nobody ever answers
        port = 9 if server == "refuses" else listener.getsockname()[1]
        done, seconds = run_real(tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_API_KEY="f" * 40)
    ours = [line for line in done.stderr.splitlines() if "W&B" in line and "wandb:" not in line]
    assert len(ours) == 1
    assert "logging offline" in ours[0]
    assert b"eval/loss/group_a" in offline_bytes(tmp_path)
    assert seconds < 15
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"f" * 40 not in path.read_bytes(), path
