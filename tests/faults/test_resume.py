"""A run continued from any position ends like one never interrupted; leaving any part of its state out is noticed."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.faults.tools import TWO_RANKS, at_step, difference, finish, kill, metrics, start, words

pytestmark = pytest.mark.fault

# The learning rate is cut after the evaluations at steps 2 and 5 (nothing counts as an improvement), so the checkpoint of
# step 4 lies just before a cut, that of step 3 at the end of an epoch, that of step 2 just after an evaluation.
ADAPTIVE = ("stopping=plateau", "stopping.patience=0", "stopping.threshold=100.0", "stopping.factor=0.5")
ADAPTIVE += ("stopping.restore_best=false", "weighting.adaptive_step_size=true", "warmup_steps=3")
SLOW = pytest.mark.slow


@pytest.fixture(scope="session")
def adaptive(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("adaptive") / "run"
    finish(words(run_dir, *ADAPTIVE))
    rates = [row["lr"] for row in metrics(run_dir) if row["kind"] == "train"]
    assert rates[5] == rates[4] / 2  # a cut between steps 5 and 6
    return run_dir


def interrupted(run_dir: Path, step: int, *more: str) -> None:
    """Killed just after the checkpoint of ``step`` was committed."""
    (child,) = start(words(run_dir, *more), patch=lambda rank: at_step(step + 1, kill(signal.SIGKILL))())
    assert child.wait() == -signal.SIGKILL, child.text[-2000:]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_run_continues_bit_equal_from_every_position(tmp_path, adaptive, step):
    interrupted(tmp_path / "run", step, *ADAPTIVE)
    (child,) = finish(words(tmp_path / "run", *ADAPTIVE))
    assert "(bit-exact)" in child.text
    assert difference(tmp_path / "run", adaptive) == []


@pytest.mark.parametrize("step", [pytest.param(2, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
def test_also_with_accumulation(tmp_path, step):
    more = (*ADAPTIVE, "gradient_accumulation_steps=4")
    finish(words(tmp_path / "whole", *more))
    interrupted(tmp_path / "run", step, *more)
    finish(words(tmp_path / "run", *more))
    assert difference(tmp_path / "run", tmp_path / "whole") == []


def forget(part: str) -> None:
    """Continue without one part of the state, as if it were not in the checkpoint."""
    import assembly
    from trainers import Trainer

    if part == "optimizer":
        assembly.restore_optimizer = lambda *args, **kwargs: None
        return
    load = Trainer.load_state_dict

    def load_without(self, state, here):
        own = {
            "weighting": self.weighting,
            "schedule": self.parts.schedule,
            "stopper": self.parts.stopper,
            "spike": self.spike,
        }
        load(self, {**state, part: own[part].state_dict()}, here)

    Trainer.load_state_dict = load_without


@pytest.mark.parametrize("part", ["optimizer", "weighting", "schedule", "stopper", "spike"])
def test_leaving_a_part_of_the_state_out_would_be_noticed(tmp_path, adaptive, part):
    interrupted(tmp_path / "run", 4, *ADAPTIVE)
    finish(words(tmp_path / "run", *ADAPTIVE), patch=lambda rank: forget(part))
    assert difference(tmp_path / "run", adaptive) != []


def test_a_wrong_data_position_would_be_noticed(tmp_path, adaptive):
    """Batches are computed from (seed, step) and nothing else: another step, another run."""

    def shift(rank: int) -> None:
        from data.plan import Plan

        rows = Plan.step_rows
        Plan.step_rows = lambda self, step: rows(self, step - 1 if step == 4 else step)

    interrupted(tmp_path / "run", 4, *ADAPTIVE)
    finish(words(tmp_path / "run", *ADAPTIVE), patch=shift)
    assert difference(tmp_path / "run", adaptive) != []


# ---------------------------------------------------------------------------------------------- world size


def numbers(run_dir: Path) -> list[tuple]:
    """(loss, gradient norm, group weights) of each step."""
    rows = [row for row in metrics(run_dir) if row["kind"] == "train"]
    return [
        (r["train/loss"], r["grad_norm"], *(v for k, v in sorted(r.items()) if "/weights/" in k))
        for r in rows
    ]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_continues_to_rounding_and_says_so(tmp_path, adaptive, before, after):
    run_dir = tmp_path / "run"
    many = {1: ADAPTIVE, 2: (*ADAPTIVE, *TWO_RANKS)}
    deaths = start(
        words(run_dir, *many[before]), ranks=before, patch=lambda rank: at_step(4, kill(signal.SIGKILL))()
    )
    assert {child.wait() for child in deaths} <= {-signal.SIGKILL, 1}
    children = finish(words(run_dir, *many[after]), ranks=after)
    modes = "fsdp -> none" if before == 2 else "none -> fsdp"
    promise = f"not bit-exact, equal to rounding: parallel: {modes}; world_size: {before} -> {after}"
    assert promise in children[0].text
    seen, expected = numbers(run_dir), numbers(adaptive)
    assert len(seen) == len(expected) == 6
    assert len(expected[0]) >= 7
    for one, other in zip(seen, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-9)


# ---------------------------------------------------------------------------------------------- other settings


def test_other_settings_are_refused_with_the_difference_or_let_through_by_name(tmp_path):
    run_dir = tmp_path / "run"
    interrupted(run_dir, 2)
    other = ("lr=0.02", "loss.beta=0.1")
    (child,) = start(words(run_dir, *other))
    assert child.wait() == 2
    assert "lr: 0.01 -> 0.02" in child.text
    assert "loss.beta: 0.3 -> 0.1" in child.text
    assert "model: " not in child.text  # refused before anything was loaded
    (child,) = start(words(run_dir, *other, "resume_allow=[lr,loss.beta]"))
    assert child.wait() == 0
    assert "resume_allow: lr: 0.01 -> 0.02" in child.text


def with_data(edit):
    """A patch for ``start``: ``edit`` changes the examples, {split: [those of each data set]}, after they are read."""

    def patch(rank: int) -> None:
        import run_data

        load = run_data.load_examples

        def changed(run):
            found = load(run)
            edit(found)
            return found

        run_data.load_examples = changed

    return patch


@pytest.mark.parametrize("change", ["edited", "reordered", "removed"])
def test_other_data_under_the_same_settings_is_refused(tmp_path, change):
    run_dir = tmp_path / "run"
    interrupted(run_dir, 2)

    def edit(found):
        examples = found["train"][0]
        if change == "edited":
            first = examples[0]
            responses = tuple((role, text + " no") for role, text in first.responses)
            examples[0] = dataclasses.replace(first, responses=responses)
        elif change == "reordered":
            examples[0], examples[5] = examples[5], examples[0]
        else:
            del examples[3]

    (child,) = start(words(run_dir), patch=with_data(edit))
    assert child.wait() == 2, child.text
    assert "the data changed since the checkpoint" in child.text


def test_evaluating_often_or_never_trains_the_same_model(tmp_path, undisturbed):
    quiet = words(tmp_path / "run", "eval_every=1000", "do_first_eval=false")
    finish(quiet)
    found = [
        json.loads((d / "LATEST/training/state.json").read_text()) for d in (tmp_path / "run", undisturbed)
    ]
    assert found[0]["weighting"] == found[1]["weighting"]
    for name in ("model.safetensors", "training/optimizer.safetensors"):
        one, other = ((d / "LATEST" / name).read_bytes() for d in (tmp_path / "run", undisturbed))
        assert one == other


def test_the_same_command_after_the_end_shows_the_results_and_changes_nothing(tmp_path, undisturbed):
    shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    (child,) = finish(words(tmp_path / "run"))
    assert "finished after 20 examples" in child.text
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*") if p.is_file()}
    lock = tmp_path / "run" / ".lock"
    assert {**before, lock: 0} == {**after, lock: 0}


def test_other_evaluation_rows_are_told(tmp_path):
    run_dir = tmp_path / "run"
    interrupted(run_dir, 2)

    def edit(found):
        validation = found["validation"][0]
        validation.append(dataclasses.replace(validation[0], uid="once more"))

    (child,) = start(words(run_dir), patch=with_data(edit))
    assert child.wait() == 0, child.text
    assert "not bit-exact, equal to rounding: evaluation_rows.validation: " in child.text
