"""SIGKILL, at named places and at any: the same command ends where a run that was never disturbed ends, bit for bit."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from engine.checkpoint import CRASH_POINTS, find
from tests.faults.tools import TWO_RANKS, at_step, difference, finish, kill, start, words
from utils import stream

pytestmark = pytest.mark.fault


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_during_a_save_loses_at_most_that_save(tmp_path, undisturbed, point):
    run_dir = tmp_path / "run"
    hit = 1 if point == "save.prune" else 2
    (child,) = start(words(run_dir), env={"CRASH_AT": f"{point}:{hit}"})
    assert child.wait() == -signal.SIGKILL
    saved = [c.examples for c in find(run_dir)]
    assert saved[0] == 10 if point == "save.prune" else saved[0] in (8, 4)
    finish(words(run_dir))
    assert difference(run_dir, undisturbed) == []
    assert not list(run_dir.glob(".tmp-*"))


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(p, marks=() if p in ("save.sealed", "save.renamed") else pytest.mark.slow)
        for p in CRASH_POINTS
    ],
)
def test_a_kill_of_rank_0_during_a_save_ends_rank_1_too(tmp_path, undisturbed_ranks, point):
    run_dir = tmp_path / "run"
    hit = 1 if point == "save.prune" else 2
    two = words(run_dir, *TWO_RANKS)
    children = start(two, ranks=2, env={"CRASH_AT": f"{point}:{hit}"})
    assert [c.wait() for c in children] == [-signal.SIGKILL, 1]
    assert re.search(r"peer lost at step \d", children[1].text)
    finish(two, ranks=2)
    assert difference(run_dir, undisturbed_ranks) == []


@pytest.fixture(scope="session")
def duration(tmp_path_factory) -> float:
    """Seconds that a whole run takes now."""
    begin = time.monotonic()
    finish(words(tmp_path_factory.mktemp("duration") / "run"))
    return time.monotonic() - begin


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=pytest.mark.slow if s > 2 else ()) for s in range(20)]
)
def test_a_kill_at_any_time_costs_nothing_but_time(tmp_path, undisturbed, duration, seed):
    run_dir = tmp_path / "run"
    for attempt in range(2):
        (child,) = start(words(run_dir))
        time.sleep(duration * float(stream(seed, "kill", attempt).uniform(0.1, 1.0)))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    finish(words(run_dir))
    assert difference(run_dir, undisturbed) == []


@pytest.mark.parametrize("where", ["forward", "backward", "save"])
def test_a_killed_rank_ends_the_other_which_names_the_step(tmp_path, undisturbed_ranks, where):
    run_dir = tmp_path / "run"
    two = words(run_dir, *TWO_RANKS)
    death = at_step(3, kill(signal.SIGKILL), where)
    children = start(two, ranks=2, patch=lambda rank: death() if rank == 1 else None)
    assert [c.wait(60) for c in children] == [1, -signal.SIGKILL]
    step = 4 if where == "save" else 3  # after step 3 the next one is due
    assert f"rank 0: peer lost at step {step}: " in children[0].text
    assert "Traceback" not in children[0].text
    finish(two, ranks=2)
    assert difference(run_dir, undisturbed_ranks) == []


def test_a_hanging_rank_ends_the_other_at_the_timeout(tmp_path):
    run_dir = tmp_path / "run"
    two = words(run_dir, *TWO_RANKS, "trainer.timeout_s=6")
    marker = tmp_path / "hangs"

    def hang() -> None:
        marker.write_text("")
        time.sleep(300)

    children = start(two, ranks=2, patch=lambda rank: at_step(3, hang)() if rank == 1 else None)
    while not marker.exists():
        assert children[1].poll() is None, children[1].text
        time.sleep(0.02)
    begin = time.monotonic()
    try:
        assert children[0].wait(60) == 1
    finally:
        os.kill(children[1].pid, signal.SIGKILL)
        children[1].wait()
    assert 4 < time.monotonic() - begin < 20
    assert "rank 0: peer lost at step 3: " in children[0].text


def test_a_rank_that_raises_says_so_itself(tmp_path):
    run_dir = tmp_path / "run"

    def fail() -> None:
        raise ValueError("opinions/train:7: this row is no good")

    children = start(
        words(run_dir, *TWO_RANKS),
        ranks=2,
        patch=lambda rank: at_step(2, fail)() if rank == 1 else None,
    )
    assert [c.wait(60) for c in children] == [1, 1]
    assert "[rank 1] ValueError: opinions/train:7: this row is no good" in children[1].text
    assert "peer lost at step 2" in children[0].text


def test_metrics_hold_whole_rows_of_each_step_once(undisturbed: Path):
    from tests.faults.tools import metrics

    rows = metrics(undisturbed)
    assert [r["step"] for r in rows if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [(r["step"], r["split"]) for r in rows if r["kind"] == "eval"] == [
        (0, "eval"), (2, "eval"), (5, "eval"), (6, "eval"), (6, "test"),
    ]  # fmt: skip


def test_a_kill_between_the_last_save_and_the_results_logs_nothing_twice(tmp_path, undisturbed):
    run_dir = tmp_path / "run"

    def patch(rank: int) -> None:
        import assembly

        assembly._Session.report = lambda self, summary, merge: kill(signal.SIGKILL)()

    (child,) = start(words(run_dir), patch=patch)
    assert child.wait() == -signal.SIGKILL
    assert find(run_dir)[0].examples == 20
    finish(words(run_dir))
    assert difference(run_dir, undisturbed) == []
    assert (run_dir / "results.json").exists()
