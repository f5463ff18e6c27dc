"""The loop itself, on random rows and a model of a few thousand parameters."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from engine.guards import NonFiniteError
from losses.pairwise import DPO, IPO, Hinge, Ramp
from losses.sft import SFT
from tests.trainer_tools import make_rows, make_trainer, parameters
from weighting import GroupRobust


def spoil(trainer, value: float) -> None:
    """The reference gives ``value`` for the first response of every micro-batch."""
    honest = trainer.reference

    def spoiled(batch, roles):
        scored = honest(batch, roles)
        first = torch.arange(len(scored.logps)) == 0
        return replace(scored, logps=torch.where(first, value, scored.logps))

    trainer.reference = spoiled


@pytest.mark.parametrize(
    "loss", [DPO(0.1), IPO(0.1), Hinge(0.1), Ramp(0.1)], ids=lambda loss: type(loss).__name__
)
def test_a_loss_that_is_not_a_number_moves_nothing_also_where_its_gradient_is_finite(tmp_path, loss):
    trainer = make_trainer(tmp_path / "raise", loss)
    before = parameters(trainer)
    spoil(trainer, float("nan"))
    with pytest.raises(NonFiniteError):
        trainer.step()
    assert torch.equal(parameters(trainer), before)
    skipping = make_trainer(tmp_path / "skip", loss, nonfinite="skip")
    spoil(skipping, float("nan"))
    metrics = skipping.step()
    assert metrics["skipped_steps"] == 1 and torch.equal(parameters(skipping), before)
    assert metrics["train/loss"] != metrics["train/loss"]  # no mean over the examples that have a loss


@pytest.mark.parametrize("unit", ["example", "token"])
def test_group_weights_follow_the_losses_of_examples_whatever_the_mean_is_over(tmp_path, unit):
    rows = [replace(r, responses=r.responses[:1], roles=("target",), weight=1.0) for r in make_rows()]
    settings = GroupRobust(step_size=0.01, max_exponent=100.0)
    trainer = make_trainer(tmp_path, SFT(unit=unit), rows=rows, weighting=settings)
    indices = trainer.parts.plan.step_rows(0)
    losses, groups = trainer.losses(indices), np.array([rows[i].group for i in indices])
    sums = np.array([losses[groups == g].sum() for g in range(3)])
    expected = np.exp(0.01 * sums / (len(indices) * trainer.parts.plan.group_probs))
    trainer.step()
    assert trainer.weighting.alpha == pytest.approx(expected / expected.sum(), rel=1e-9)


def test_a_step_that_is_left_out_changes_no_state_and_still_counts(tmp_path):
    trainer = make_trainer(tmp_path, DPO(0.1), nonfinite="skip", weighting=GroupRobust(step_size=0.5))
    spoil(trainer, float("nan"))
    before = trainer.weighting.state_dict()
    trainer.step()
    assert trainer.weighting.state_dict() == before and not trainer.parts.optimizer.state
    assert trainer.state_dict()["guard"] == {"skipped": 1, "consecutive": 1}
    assert (trainer.step_count, trainer.examples) == (1, 6)
