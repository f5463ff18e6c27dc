"""Optimizers by name, the learning-rate schedule against torch's own, clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engine.optim import UNUSABLE, Schedule, build_optimizer, clip_gradients, optimizers
from utils import UserError, stream


def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3, 2))]


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_every_torch_optimizer_can_be_built_and_steps(name):
    params = parameters()
    optimizer = build_optimizer(name, params, lr=0.1, weight_decay=0.0 if name == "Rprop" else None)
    assert type(optimizer) is getattr(torch.optim, name)
    for p in params:
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()
    assert all((p < 1).all() for p in params)


def test_fused_kernels_are_used_where_torch_has_them_and_agree_with_the_plain_ones():
    assert build_optimizer("AdamW", parameters(), lr=0.1).param_groups[0]["fused"] is True
    plain = build_optimizer("AdamW", parameters(), lr=0.1, options={"foreach": True})
    assert not plain.param_groups[0]["fused"]
    assert (
        build_optimizer("AdamW", parameters(), lr=0.1, options={"fused": False}).param_groups[0]["fused"]
        is False
    )
    assert "fused" not in build_optimizer("RMSprop", parameters(), lr=0.1).param_groups[0]
    results = []
    for options in ({}, {"fused": False}):
        params = parameters()
        optimizer = build_optimizer("AdamW", params, lr=0.1, options=options)
        for step in range(3):
            for p in params:
                p.grad = torch.from_numpy(stream(0, "g", step).normal(size=tuple(p.shape)).astype(np.float32))
            optimizer.step()
        results.append(params[0].detach())
    torch.testing.assert_close(
        results[0], results[1], rtol=1e-6, atol=1e-6
    )  # float32, another order of operations


def test_options_and_weight_decay_reach_the_optimizer():
    group = build_optimizer(
        "AdamW", parameters(), lr=0.1, weight_decay=0.3, options={"betas": [0.8, 0.95], "eps": 1e-6}
    ).param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 1e-6, 0.3, 0.1)
    assert build_optimizer("AdamW", parameters(), lr=0.1).param_groups[0]["weight_decay"] == 0.01
    assert (
        build_optimizer("AdamW", parameters(), lr=0.1, weight_decay=0.0).param_groups[0]["weight_decay"]
        == 0.0
    )


def test_frozen_parameters_are_left_out():
    params = parameters()
    params[0].requires_grad_(False)
    assert build_optimizer("SGD", params, lr=0.1).param_groups[0]["params"] == [params[1]]
    params[1].requires_grad_(False)
    with pytest.raises(UserError, match="no parameter of the model is trained"):
        build_optimizer("SGD", params, lr=0.1)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("AdmW", {}, "optimizer=AdmW: not in torch.optim; did you mean 'AdamW'"),
        ("Optimizer", {}, "not in torch.optim"),
        ("AdamW", {"options": {"beta": [0.9, 0.9]}}, r"optimizer_options.beta: AdamW has no such argument; did you mean 'betas'"),
        ("AdamW", {"options": {"lr": 1.0}}, "optimizer_options.lr"),
        ("AdamW", {"options": {"betas": [0.9, 2.0]}}, "optimizer=AdamW optimizer_options=.*beta"),
        ("Rprop", {"weight_decay": 0.1}, "weight_decay=0.1: Rprop has none"),
        *((name, {}, f"optimizer={name}: cannot be used here") for name in UNUSABLE),
    ],
)  # fmt: skip
def test_mistakes_are_named(name, arguments, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(name, parameters(), lr=0.1, **arguments)


# ----------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_schedule_is_that_of_torch(decay):
    """Warm-up as in the DPO repository, min(1, (t + 1) / (warmup + 1)); then torch's own decays from the peak."""
    warmup, total, lr = 5, 25, 0.3
    optimizer = torch.optim.SGD(parameters(), lr=lr)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(1.0, (t + 1) / (warmup + 1)))
    expected = []
    for _ in range(warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warm.step()
    optimizer = torch.optim.SGD(parameters(), lr=lr)
    after = {
        "constant": torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0),
        "linear": torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total - warmup),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup),
    }[decay]
    for _ in range(total - warmup):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        after.step()
    schedule = Schedule(lr, warmup, total, decay)
    mine = build_optimizer("SGD", parameters(), lr=1.0)
    got = [schedule.set(mine, step) for step in range(total)]
    assert got == pytest.approx(expected, rel=1e-12)
    assert mine.param_groups[0]["lr"] == got[-1]
    assert min(got) > 0  # every step of the run trains
    assert schedule.factor(total + 3) == (1.0 if decay == "constant" else pytest.approx(0.0, abs=1e-15))


def test_the_scale_multiplies_and_is_saved():
    schedule = Schedule(0.5, 0, 10)
    schedule.scale = 0.1
    assert schedule.set(build_optimizer("SGD", parameters(), lr=1.0), 3) == 0.5 * 0.1
    again = Schedule(0.5, 0, 10)
    again.load_state_dict(schedule.state_dict())
    assert again.scale == 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 0, 10), "lr=0.0: must be > 0"),
        ((math.nan, 0, 10), "lr=nan"),
        ((0.1, -1, 10), "warmup_steps=-1"),
        ((0.1, 10, 10, "linear"), "warmup_steps=10: the run has 10 steps"),
        ((0.1, 0, 10, "cosin"), "lr_schedule=cosin: must be .*did you mean 'cosine'"),
    ],
)
def test_impossible_schedules_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        Schedule(*arguments)


def test_a_long_warm_up_may_outlast_a_short_constant_run():
    assert Schedule(1.0, 150, 10).factor(9) == 10 / 151


# ----------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("max_norm", [None, 1.0, 1000.0])
def test_clipping_returns_the_norm_before_and_bounds_the_norm_after(max_norm):
    params = [*parameters(), torch.nn.Parameter(torch.ones(1))]
    values = [stream(0, "grad", i).normal(size=tuple(p.shape)) for i, p in enumerate(params[:2])]
    for p, v in zip(params, values, strict=False):
        p.grad = torch.from_numpy(v.astype(np.float32))
    norm = math.sqrt(sum((v**2).sum() for v in values))
    assert float(clip_gradients(params, max_norm)) == pytest.approx(norm, rel=1e-6)
    after = math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in params[:2]))
    assert after == pytest.approx(1.0 if max_norm == 1.0 else norm, rel=1e-5)
    assert params[2].grad is None


def test_a_non_finite_norm_is_reported():
    params = parameters()
    params[0].grad = torch.full((2, 3), math.inf)
    assert clip_gradients(params, 1.0) == math.inf
    assert clip_gradients([], 1.0) == 0.0
