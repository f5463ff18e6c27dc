"""The loop itself, on random rows and a model of a few thousand parameters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.guards import NonFiniteError
from losses.pairwise import DPO, IPO, Hinge, Ramp
from tests.trainer_tools import make_trainer, parameters


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
