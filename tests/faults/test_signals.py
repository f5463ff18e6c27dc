"""SIGTERM and SIGINT end a run with a checkpoint and a code of their own; the same command then continues exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.checkpoint import find
from tests.faults.tools import TWO_RANKS, at_step, difference, finish, kill, start, words

pytestmark = pytest.mark.fault
ROOT = Path(__file__).resolve().parents[2]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize("where", ["forward", "save"])
def test_a_signal_checkpoints_and_the_same_command_continues_exactly(tmp_path, undisturbed, number, where):
    run_dir = tmp_path / "run"
    (child,) = start(words(run_dir), patch=lambda rank: at_step(3, kill(number), where)())
    assert child.wait() == CODES[number]
    assert find(run_dir)[0].examples == 10 if where == "forward" else 14
    assert "the same command continues" in child.text
    assert not (run_dir / "results.json").exists()
    finish(words(run_dir))
    assert difference(run_dir, undisturbed) == []


def during(place: str, number: int, turn: int = 2):
    """A patch that sends the signal the ``turn``-th time that the run evaluates or generates."""

    def patch(rank: int) -> None:
        from engine import sampling
        from engine.evaluation import Evaluator

        owner, name = (Evaluator, "run") if place == "evaluation" else (sampling, "generate")
        plain, calls = getattr(owner, name), [0]

        def signalled(*args, **kwargs):
            calls[0] += 1
            if calls[0] == turn:
                kill(number)()
            return plain(*args, **kwargs)

        setattr(owner, name, signalled)

    return patch


SAMPLING = ("sample_during_eval=true", "n_eval_model_samples=2", "sample_max_new_tokens=2")


def test_a_signal_during_evaluation_waits_for_its_end(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    (child,) = start(words(run_dir), patch=during("evaluation", signal.SIGTERM))
    assert child.wait() == 143
    assert find(run_dir)[0].examples == 8
    finish(words(run_dir))
    assert difference(run_dir, undisturbed) == []


def test_a_signal_during_the_first_evaluation_waits_for_a_checkpoint(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    (child,) = start(words(run_dir), patch=during("evaluation", signal.SIGTERM, 1))
    assert child.wait() == 143
    assert find(run_dir)[0].examples == 4
    finish(words(run_dir))
    assert difference(run_dir, undisturbed) == []


def test_a_signal_during_the_last_evaluation_does_not_cost_the_end(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    finish(words(run_dir), patch=during("evaluation", signal.SIGTERM, 4))
    assert (run_dir / "results.json").exists()
    assert difference(run_dir, undisturbed) == []


def test_a_signal_during_generation_waits_for_its_end(tmp_path):
    finish(words(tmp_path / "whole", *SAMPLING))
    run_dir = tmp_path / "run"
    late = words(run_dir, *SAMPLING, "do_first_eval=true")
    # the first evaluation, before the first step, draws twice: for the policy and for the reference
    (child,) = start(late, patch=during("generation", signal.SIGTERM))
    assert child.wait() == 143
    finish(late)
    assert difference(run_dir, tmp_path / "whole") == []
    for path in (tmp_path / "whole" / "samples").iterdir():
        assert path.read_bytes() == (run_dir / "samples" / path.name).read_bytes()


def test_a_second_signal_does_not_wait(tmp_path, undisturbed):
    run_dir = tmp_path / "run"

    def twice() -> None:
        from engine.guards import SignalFlag

        SignalFlag.ECHO_S = 0.05
        kill(signal.SIGTERM)()
        time.sleep(0.2)
        kill(signal.SIGTERM)()
        time.sleep(30)

    (child,) = start(words(run_dir), patch=lambda rank: at_step(3, twice)())
    assert child.wait(60) == 143
    assert find(run_dir)[0].examples == 8  # of step 2
    finish(words(run_dir))
    assert difference(run_dir, undisturbed) == []


@pytest.mark.parametrize("signalled", [(1,), (0, 1)], ids=["one rank", "all ranks"])
def test_ranks_agree_on_a_signal(tmp_path, undisturbed_ranks, signalled):
    run_dir = tmp_path / "run"
    two = words(run_dir, *TWO_RANKS)

    def patch(rank: int) -> None:
        if rank in signalled:
            at_step(3, kill(signal.SIGTERM))()

    children = start(two, ranks=2, patch=patch)
    assert [c.wait() for c in children] == [143, 143]
    assert find(run_dir)[0].examples == 10
    finish(two, ranks=2)
    assert difference(run_dir, undisturbed_ranks) == []


def test_a_second_run_in_the_same_directory_ends_at_once(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    go = tmp_path / "go"

    def wait() -> None:
        (tmp_path / "waits").write_text("")
        while not go.exists():
            time.sleep(0.01)

    (first,) = start(words(run_dir), patch=lambda rank: at_step(2, wait)())
    while not (tmp_path / "waits").exists():
        assert first.poll() is None, first.text
        time.sleep(0.01)
    log = run_dir.parent / f"{run_dir.name}.0.log"
    log.rename(tmp_path / "first.log")  # the child goes on writing there
    (second,) = start(words(run_dir))
    assert second.wait(60) == 2
    assert f"in use by pid {first.pid} on " in second.text
    go.write_text("")
    assert first.wait() == 0
    assert difference(run_dir, undisturbed) == []


# ------------------------------------------------------------------------------------- cold starts, end to end


def cold(run_words, **env: str) -> subprocess.Popen:
    """`python train.py ...` as a user types it."""
    variables = {k: v for k, v in os.environ.items() if k != "RANK"} | {"OMP_NUM_THREADS": "1"} | env
    command = [sys.executable, str(ROOT / "train.py"), *run_words]
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )


def children_of(pid: int) -> dict[int, int]:
    """rank -> pid of the launcher's children."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == pid:
                words_ = (status.parent / "environ").read_bytes().split(b"\0")
                found.update({int(w[5:]): int(status.parent.name) for w in words_ if w.startswith(b"RANK=")})
        except OSError:
            continue  # ended meanwhile
    return found


def until(condition, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


LONG = ("n_epochs=1000", "eval_every=100000", "save_every=100000")


def test_the_launcher_passes_a_signal_to_its_ranks_and_their_code_back(tmp_path):
    run_dir = tmp_path / "run"
    process = cold(words(run_dir, *TWO_RANKS, *LONG))
    rows = run_dir / "metrics.jsonl"
    until(lambda: (rows.exists() and '"train"' in rows.read_text()) or process.poll() is not None)
    ranks = children_of(process.pid)
    assert set(ranks) == {0, 1}
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143, text
    assert "error" not in text
    assert len(find(run_dir)) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
def test_the_launcher_ends_when_a_rank_hangs_and_leaves_no_child(tmp_path):
    """SIGSTOP is as deaf as a rank can be."""
    run_dir = tmp_path / "run"
    process = cold(words(run_dir, *TWO_RANKS, *LONG, "trainer.timeout_s=15"))
    rows = run_dir / "metrics.jsonl"
    until(lambda: (rows.exists() and '"train"' in rows.read_text()) or process.poll() is not None)
    ranks = children_of(process.pid)
    os.kill(ranks[1], signal.SIGSTOP)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert "error: rank 0: PeerLost: rank 0: peer lost at step " in text
    assert "rank [1] did not end" in text
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


@pytest.mark.slow
def test_torchrun_starts_ranks_too(tmp_path, undisturbed_ranks):
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "train.py",
    ]
    done = subprocess.run(
        [*command, *words(run_dir, *TWO_RANKS)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert difference(run_dir, undisturbed_ranks) == []
