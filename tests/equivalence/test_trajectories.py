"""One trajectory, however a step is cut, laid out or referenced. Plain SGD, so that a difference is not blown up by a division."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import trainers
from data.schema import Batch
from losses.pairwise import DPO, IPO
from losses.sft import SFT
from tests.trainer_tools import make_rows, make_trainer, parameters
from weighting import GroupRobust, Uniform

SETUPS = {
    "dpo": (DPO(beta=0.3), Uniform()),
    "gr_ipo": (IPO(beta=0.2), GroupRobust(step_size=0.05)),
}
CUTS = [
    {"gradient_accumulation_steps": 2},
    {"gradient_accumulation_steps": 3},
    {"microbatch_tokens": 30},
    {"layout": "padded"},
    {"layout": "padded", "gradient_accumulation_steps": 6},
]


def run(folder: Path, loss, weighting, **changes):
    trainer = make_trainer(
        folder, loss, weighting=weighting, optimizer="SGD", lr=0.05, do_first_eval=False, **changes
    )
    assert trainer.train() == "finished"
    return trainer


@pytest.mark.parametrize("name", SETUPS)
def test_a_step_does_not_depend_on_how_it_is_cut(tmp_path, name):
    loss, weighting = SETUPS[name]
    whole = run(tmp_path / "whole", loss, weighting)
    start = parameters(make_trainer(tmp_path / "start", loss))
    moved = (parameters(whole) - start).abs().max()
    assert moved > 1e-3
    for i, cut in enumerate(CUTS):
        other = run(tmp_path / str(i), loss, weighting, **cut)
        assert (parameters(other) - parameters(whole)).abs().max() < 1e-12, cut
        for key, value in whole.weighting.metrics().items():
            assert other.weighting.metrics()[key] == pytest.approx(value, abs=1e-12), (cut, key)


@pytest.mark.parametrize("cut", [1, 3])
def test_weights_and_soft_labels_of_examples_enter_the_group_losses(tmp_path, cut):
    """The first update of alpha, worked out from the rows: h = 0 would hide the labels, so policy and reference differ."""
    eta, eps, beta = 0.5, 0.1, 0.7
    trainer = make_trainer(
        tmp_path, DPO(beta=beta, label_smoothing=eps), weighting=GroupRobust(step_size=eta),
        gradient_accumulation_steps=cut,
    )  # fmt: skip
    rows = [trainer.parts.rows[i] for i in trainer.parts.plan.step_rows(0)]
    batch = Batch.collate(rows)
    with torch.no_grad():
        scored = [
            scorer(batch, ("chosen", "rejected")) for scorer in (trainer.policy, trainer.reference.scorer)
        ]
    ratios = (scored[0].logps - scored[1].logps).numpy()
    h = ratios[scored[0].index("chosen")] - ratios[scored[0].index("rejected")]
    assert np.median(np.abs(h)) > 0.1
    estimates = np.zeros(3)
    for row, margin in zip(rows, beta * h, strict=True):
        p = (1 - 2 * eps) * row.scalars["p_chosen"] + eps
        loss = p * np.log1p(np.exp(-margin)) + (1 - p) * np.log1p(np.exp(margin))
        estimates[row.group] += row.weight * loss / trainer.parts.plan.group_probs[row.group] / len(rows)
    expected = np.exp(eta * estimates) / np.exp(eta * estimates).sum()
    trainer.step()
    assert trainer.weighting.alpha == pytest.approx(
        expected, abs=1e-7
    )  # batches hold weights and labels in float32


@pytest.mark.parametrize("cut", [1, 3])
def test_the_reference_scale_multiplies_the_gradient_by_the_micro_batch(tmp_path, cut):
    start = parameters(make_trainer(tmp_path / "start", IPO(beta=0.2)))
    moved = {}
    for reference in (False, True):
        trainer = run(
            tmp_path / str(reference), IPO(beta=0.2), GroupRobust(step_size=0.01, reference=reference),
            gradient_accumulation_steps=cut, batch_size=6, n_epochs=None, n_examples=6, max_grad_norm=None,
        )  # fmt: skip
        moved[reference] = parameters(trainer) - start
    assert moved[False].abs().max() > 1e-4
    assert (moved[True] - 6 / cut * moved[False]).abs().max() < 1e-12


def test_token_units_count_the_tokens_of_the_whole_step(tmp_path):
    rows = [
        r.__class__(**{**r.__dict__, "responses": r.responses[:1], "roles": ("target",)}) for r in make_rows()
    ]
    runs = [
        run(
            tmp_path / str(k),
            SFT(unit="token"),
            Uniform(),
            rows=rows,
            gradient_accumulation_steps=k,
            eval_every=10_000,
        )
        for k in (1, 2, 6)
    ]
    for other in runs[1:]:
        assert (parameters(other) - parameters(runs[0])).abs().max() < 1e-12


def test_the_last_partial_batch_is_used(tmp_path):
    trainer = run(tmp_path, DPO(beta=0.3), Uniform(), rows=make_rows(25), n_epochs=1)
    assert trainer.examples == 25 and trainer.step_count == 5


def test_a_dropped_remainder_would_be_noticed(tmp_path, monkeypatch):
    rows = make_rows(25)
    whole = run(tmp_path / "a", DPO(beta=0.3), Uniform(), rows=rows, batch_size=25)
    honest = trainers.micro_batches
    monkeypatch.setattr(
        trainers,
        "micro_batches",
        lambda rows, indices, **cut: [part[:8] for part in honest(rows, indices, **cut)],
    )
    other = run(
        tmp_path / "b", DPO(beta=0.3), Uniform(), rows=rows, batch_size=25, gradient_accumulation_steps=1
    )
    assert (parameters(other) - parameters(whole)).abs().max() > 1e-6


def test_evaluation_leaves_training_untouched(tmp_path):
    loss, weighting = SETUPS["gr_ipo"]
    never = run(tmp_path / "never", loss, weighting, eval_every=10_000)
    always = make_trainer(
        tmp_path / "always", loss, weighting=weighting, optimizer="SGD", lr=0.05, eval_every=1
    )
    always.train()
    assert torch.equal(parameters(never), parameters(always))
    assert never.weighting.state_dict() == always.weighting.state_dict()


@pytest.mark.parametrize("size", [1, 3, 64])
def test_evaluation_does_not_depend_on_its_batch_size(tmp_path, size):
    one = make_trainer(tmp_path / "a", DPO(beta=0.3), eval_batch_size=7)
    other = make_trainer(tmp_path / "b", DPO(beta=0.3), eval_batch_size=size)
    for trainer in (one, other):
        trainer.evaluate(["validation"])
    a, b = (t.last_evaluation["validation"].metrics for t in (one, other))
    assert a.keys() == b.keys() and len(a) > 30
    for key, value in a.items():
        assert b[key] == pytest.approx(value, abs=1e-12), key
