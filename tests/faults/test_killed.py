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
    hit = 1 if point == "save.prune" else 3  # the rehearsal at the start passes every other point once
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
    hit = 1 if point == "save.prune" else 3  # the rehearsal at the start passes every other point once
    two = words(run_dir, *TWO_RANKS)
    children = start(two, ranks=2, env={"CRASH_AT": f"{point}:{hit}"})
    assert [c.wait() for c in children] == [-signal.SIGKILL, 1]
    assert re.search(r"peer lost at step \d", children[1].text)
    finish(two, ranks=2)
    assert difference(run_dir, undisturbed_ranks) == []


@pytest.fixture(scope="session")
def durations(tmp_path_factory) -> dict[int, float]:
    """Seconds that a whole run takes now, by its number of ranks."""
    found = {}
    for ranks in (1, 2):
        begin = time.monotonic()
        finish(words(tmp_path_factory.mktemp("duration") / "run", *RANKS[ranks]), ranks=ranks)
        found[ranks] = time.monotonic() - begin
    return found


RANKS = {1: (), 2: TWO_RANKS}
FAST = {(1, 0), (1, 1), (2, 0)}


@pytest.mark.parametrize(
    ("ranks", "seed"),
    [
        pytest.param(ranks, seed, marks=() if (ranks, seed) in FAST else pytest.mark.slow)
        for ranks in RANKS
        for seed in range(20)
    ],
)
def test_a_kill_at_any_time_costs_nothing_but_time(
    tmp_path, undisturbed, undisturbed_ranks, durations, ranks, seed
):
    run_dir = tmp_path / "run"
    all_words = words(run_dir, *RANKS[ranks])
    for attempt in range(2):
        draw = stream(seed, "kill", attempt)
        children = start(all_words, ranks=ranks)
        time.sleep(durations[ranks] * float(draw.uniform(0.1, 1.0)))
        victim = children[int(draw.integers(ranks))]
        os.kill(victim.pid, signal.SIGKILL)
        codes = [child.wait(90) for child in children]
        assert set(codes) <= {0, 1, -signal.SIGKILL}, [child.text[-2000:] for child in children]
        for child, code in zip(children, codes, strict=True):
            assert code != 1 or "peer lost at" in child.text, child.text[-2000:]
    finish(all_words, ranks=ranks)
    assert difference(run_dir, undisturbed if ranks == 1 else undisturbed_ranks) == []


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
