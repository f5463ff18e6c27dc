"""A step fetches what it needs from the device once; nothing else in it makes the host wait.

There is no device here, so it is played: whatever is computed from parameters counts as being on the device, and every way of
looking at such values is recorded, and every copy to it that waits. Batches are on the host, where looking is free.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from losses.pairwise import DPO, IPO
from losses.vrpo import VarianceReduced
from tests.trainer_tools import make_rows, make_trainer
from weighting import GroupRobust

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# results, or their shapes, depend on values: a GPU has to finish first
LOOKS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip


def innermost():
    """The function of this project that we are in, tests aside."""
    frames = [
        f for f in traceback.extract_stack() if str(ROOT) in f.filename and "site-packages" not in f.filename
    ]
    return next((f.name for f in reversed(frames) if "tests" not in f.filename), "a test")


class Device(TorchDispatchMode):
    """Follows what is computed from ``parameters``. fetches: copies to the host; waits: every other look at values."""

    def __init__(self, parameters):
        super().__init__()
        self.there = {p.untyped_storage().data_ptr() for p in parameters}
        self.alive = []  # no storage is freed, so none gets the address of another
        self.fetches, self.waits = 0, []

    def holds(self, value):
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.there

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = tree_leaves((args, kwargs))
        if any(map(self.holds, inputs)):
            masks = [x for x in inputs if isinstance(x, torch.Tensor) and x.dtype == torch.bool]
            by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and masks
            if func.overloadpacket in LOOKS or by_mask:
                self.waits.append(f"{func} in {innermost()}")
            made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
            self.alive += made
            self.there |= {x.untyped_storage().data_ptr() for x in made if x.numel()}
        return out

    def fetch(self, value):
        """``value`` on the host, for `Tensor.cpu`."""
        if not self.holds(value):
            return value
        self.fetches += 1
        with torch.utils._python_dispatch._disable_current_modes():
            return value.detach().clone()


@pytest.fixture
def watch(monkeypatch):
    """watch(step, parameters) -> Device"""

    def run(step, parameters):
        device = Device(parameters)
        looks = {name: getattr(torch.Tensor, name) for name in ("tolist", "numpy")}
        monkeypatch.setattr(torch.Tensor, "cpu", lambda x: device.fetch(x))
        for name, method in looks.items():

            def look(x, *args, name=name, method=method, **kwargs):
                if device.holds(x):
                    device.waits.append(name)
                return method(x, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, look)
        move = torch.Tensor.to

        def to(x, *args, **kwargs):
            # numbers of the batch; its indices may have been moved already, which does not show here
            column = x.is_floating_point() and not device.holds(x)
            if column and args and device.holds(args[0]) and not kwargs.get("non_blocking"):
                device.waits.append(f"to in {innermost()}")
            return move(x, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, "to", to)
        with device:
            step()
        monkeypatch.undo()
        return device

    return run


def vrpo_rows():
    rows = []
    for row in make_rows():
        aux = tuple(np.array(x, np.int32) for x in ([5, 6, 2], [7, 2]))
        rows.append(
            type(row)(
                row.uid, row.prompt, row.responses + aux, ("chosen", "rejected", "aux_1", "aux_2"), row.group, row.prompt_key,
                scalars={"chosen_preference": 0.7}, response_scalars={"aux_preference": (0.6,) * 4},
            )
        )  # fmt: skip
    return rows


CASES = {
    "dpo": (DPO(beta=0.1), {}),
    "ipo": (IPO(beta=0.1), {"gradient_accumulation_steps": 3}),
    "dpo, groups": (DPO(beta=0.1), {"weighting": GroupRobust(step_size=0.1)}),
    "dpo, padded": (DPO(beta=0.1), {"layout": "padded"}),
    "vrpo": (VarianceReduced(beta=0.1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_looks_at_the_device_once(case, tmp_path, watch):
    loss, more = CASES[case]
    rows = vrpo_rows() if case == "vrpo" else make_rows()
    trainer = make_trainer(tmp_path, loss, rows=rows, dtype=torch.float32, **more)
    trainer.step()  # optimizer state is made in the first
    models = trainer.parts.policy, trainer.parts.reference.scorer
    device = watch(trainer.step, [p for m in models for p in m.parameters()])
    assert len(device.alive) > 500  # it was followed through the model and back
    on_cpu_only = "aten._local_scalar_dense.default in clip_gradients"  # it asks where the norm is, and looks if that is free
    assert set(device.waits) <= {on_cpu_only}
    assert device.fetches == 1


@pytest.mark.parametrize(
    "look",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.detach().sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x),
        lambda x: (2 * x).detach().numpy(),
        lambda x: (2 * x).tolist(),
        lambda x: torch.ones(4).to(2 * x),
    ],
)
def test_looks_are_seen(look, watch):
    p = torch.nn.Parameter(torch.randn(4))
    device = watch(lambda: look(p * 2), [p])
    assert device.waits and device.fetches == 0
    assert watch(lambda: look(torch.ones(4)), [p]).waits == []
