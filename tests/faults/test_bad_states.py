"""Numbers that are not finite, spikes, a full disk, hostile files, a dead W&B: each is loud and none costs the run."""

from __future__ import annotations

import json
import os
import pickle
import re
import resource
import signal
from pathlib import Path

import pytest
import torch

from engine.checkpoint import find
from tests.faults.test_signals import cold
from tests.faults.tools import TWO_RANKS, difference, finish, metrics, start, words

pytestmark = pytest.mark.fault


# ---------------------------------------------------------------------------------------------- numbers


def poison(
    rank: int, what: str, steps: tuple[int, ...] = (3,), own: int = 1, factor: float = float("nan")
) -> None:
    """On rank ``own``, spoil the loss or the gradient of some steps; everywhere, check that a refused step moved nothing."""
    from engine.guards import NonFiniteError
    from engine.parallel import World
    from trainers import Trainer

    step, sum_gradients, loss_class = Trainer.step, World.sum_gradients, []

    def watched(self):
        count = self.step_count + 1
        bad = count in steps and rank == own
        before = [p.detach().clone() for p in self.parameters]
        if bad and what == "gradient":
            World.sum_gradients = lambda world, parameters: local(parameters[0].grad).mul_(factor)
        if not loss_class:
            loss_class.append(type(self.loss).__call__)
        honest = loss_class[0]

        def spoiled(loss, *args):
            out = honest(loss, *args)
            object.__setattr__(out, "losses", out.losses * factor)
            return out

        type(self.loss).__call__ = spoiled if bad and what == "loss" else honest
        try:
            result = step(self)
        except NonFiniteError:
            same = all(
                torch.equal(a, b.detach())
                for a, b in zip(map(local, before), map(local, self.parameters), strict=True)
            )
            os.write(2, b"nothing moved\n" if same else b"MOVED\n")
            raise
        if bad and what == "gradient":
            World.sum_gradients = sum_gradients
        return result

    Trainer.step = watched


def local(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_anything_moves(
    tmp_path, undisturbed_ranks, what
):
    run_dir = tmp_path / "run"
    two = words(run_dir, *TWO_RANKS)
    children = start(two, ranks=2, patch=lambda rank: poison(rank, what))
    assert [c.wait() for c in children] == [1, 1]
    for child in children:
        assert "step 3: loss or gradient is not finite" in child.text
        assert "nothing moved" in child.text
    told = json.loads((run_dir / "bad_batch-step-3.json").read_text())
    assert told["step"] == 3
    assert len(told["uids"]) == (
        1 if what == "loss" else 2
    )  # rank 1's share of a step of 2 rows; all of them
    finish(two, ranks=2)
    assert difference(run_dir, undisturbed_ranks) == []


def test_an_infinite_reward_stops_before_anything_moves(tmp_path):
    run_dir = tmp_path / "run"
    (child,) = start(words(run_dir), patch=lambda rank: poison(rank, "loss", own=0, factor=float("inf")))
    assert child.wait() == 1
    assert "nothing moved" in child.text
    assert find(run_dir)[0].examples == 8


def test_skipping_leaves_the_step_out_counts_and_gives_up(tmp_path):
    skip = "nonfinite=skip"
    finish(words(tmp_path / "some", skip), patch=lambda rank: poison(rank, "loss", (2, 3), own=0))
    rows = [r for r in metrics(tmp_path / "some") if r["kind"] == "train"]
    assert [r["skipped_steps"] for r in rows] == [0, 1, 2, 2, 2, 2]
    (child,) = start(
        words(tmp_path / "many", skip, "max_consecutive_nonfinite=2"),
        patch=lambda rank: poison(rank, "loss", (2, 3, 4), own=0),
    )
    assert child.wait() == 1
    assert "3 steps in a row, more than max_consecutive_nonfinite=2" in child.text


def test_a_spike_is_recorded_and_training_goes_on(tmp_path):
    run_dir = tmp_path / "run"

    def patch(rank: int) -> None:
        import functools

        import trainers

        trainers.SpikeGuard = functools.partial(trainers.SpikeGuard, window=2)
        poison(rank, "loss", (4,), factor=1e4)

    children = finish(words(run_dir, *TWO_RANKS), ranks=2, patch=patch)
    for child in children:
        assert "step 4: loss" in child.text
    (row,) = [json.loads(line) for line in (run_dir / "spikes.jsonl").read_text().splitlines()]
    assert row["step"] == 4
    assert "loss" in row["spiked"]
    assert len(row["uids"]) == 4


# ---------------------------------------------------------------------------------------------- disk


def full_disk_at_save(number: int) -> None:
    """No file may grow past 3000 bytes during the ``number``-th save, the rehearsal being the first (the limit acts like a full disk, without root)."""
    from engine import checkpoint

    save, calls = checkpoint.save, [0]

    def limited(*args, **kwargs):
        calls[0] += 1
        if calls[0] != number:
            return save(*args, **kwargs)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
        try:
            return save(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    checkpoint.save = limited


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_ends_every_rank_and_costs_one_save(tmp_path, undisturbed, undisturbed_ranks, ranks):
    run_dir = tmp_path / "run"
    all_words = words(run_dir, *(TWO_RANKS if ranks == 2 else ()))
    children = start(all_words, ranks=ranks, patch=lambda rank: full_disk_at_save(3))
    assert [c.wait(60) for c in children] == [1] * ranks
    assert "CheckpointError: " in children[0].text
    assert f"{run_dir / 'step-8'}: could not save" in children[0].text
    assert "bytes free" in children[0].text
    if ranks == 2:
        assert "rank 0 failed: CheckpointError" in children[1].text
        assert "Traceback" not in children[1].text
    assert [c.examples for c in find(run_dir)] == [4]
    assert not list(run_dir.glob(".tmp-*"))
    finish(all_words, ranks=ranks)
    assert difference(run_dir, undisturbed if ranks == 1 else undisturbed_ranks) == []


def test_a_directory_that_cannot_hold_a_checkpoint_is_found_before_a_model_is_loaded(tmp_path):
    def patch(rank: int) -> None:
        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        os.fsync = full

    (child,) = start(words(tmp_path / "run"), patch=patch)
    assert child.wait() == 1
    assert re.search(r"CheckpointError: \S+rehearsal\S+: could not save .*No space left", child.text)
    assert "model: " not in child.text
    assert not list((tmp_path / "run").glob(".tmp-*"))


def test_short_space_is_told_at_the_start(tmp_path, undisturbed):
    def patch(rank: int) -> None:
        from engine import checkpoint

        checkpoint.free_bytes = lambda path: 100_000

    (child,) = finish(words(tmp_path / "run"), patch=patch)
    assert "three must fit for a moment; saving may fail" in child.text
    assert difference(tmp_path / "run", undisturbed) == []


def test_an_unreadable_choice_of_checkpoint_ends_every_rank(tmp_path):
    missing = words(tmp_path / "run", *TWO_RANKS, f"resume_from={tmp_path / 'nothing'}")
    children = start(missing, ranks=2)
    assert [c.wait(60) for c in children] == [2, 1]
    assert f"resume_from={tmp_path / 'nothing'}: " in children[0].text
    assert "rank 0 failed: UserError" in children[1].text


# ---------------------------------------------------------------------------------------------- hostile files


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_archive_runs_no_code(tmp_path):
    archive, proof = tmp_path / "policy.pt", tmp_path / "code ran"
    archive.write_bytes(pickle.dumps({"state": Hostile(proof)}))
    torch.save({"state": Hostile(proof)}, tmp_path / "zipped.pt")
    for path in (archive, tmp_path / "zipped.pt"):
        (child,) = start(words(tmp_path / path.stem, f"model.archive={path}"))
        assert child.wait() == 2, child.text
        assert "refused, because reading it could run code" in child.text
        assert "safetensors" in child.text
    assert not proof.exists()


@pytest.mark.parametrize(
    "word", ["loss.class=os.system", "weighting.class=subprocess.Popen", "stopping.class=builtins.exec"]
)
def test_a_config_cannot_name_arbitrary_code(tmp_path, word):
    from tests.faults.tools import composed
    from utils import UserError

    key = word.partition("=")[0]
    with pytest.raises(UserError, match=f"{key}=.*must be a class of"):
        composed(words(tmp_path / "run", word))


# ---------------------------------------------------------------------------------------------- W&B


@pytest.mark.slow
def test_a_dead_wandb_costs_a_warning(tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    process = cold(words(run_dir, "wandb.enabled=true"), WANDB_DIR=str(tmp_path), **env)
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text
    assert "W&B" in text
    assert difference(run_dir, undisturbed) == []
