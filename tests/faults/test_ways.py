"""Every way of spreading a run over ranks trains the same model, through the whole program."""

from __future__ import annotations

import pytest

from tests.faults.tools import TWO_RANKS, finish, metrics, words

pytestmark = pytest.mark.fault  # forks
WAYS = {
    "ddp": ("trainer=DDPTrainer", "trainer.nproc=2"),
    "offloaded": (*TWO_RANKS, "trainer.cpu_offload=true"),
    "half": (*TWO_RANKS, "model.policy_dtype=float32", "model.reference_dtype=float32", "model.fsdp_policy_mp=bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_the_same_model(tmp_path, undisturbed, way):
    run_dir = tmp_path / "run"
    finish(words(run_dir, *WAYS[way]), ranks=2)
    found, expected = (
        [r["train/loss"] for r in metrics(folder) if r["kind"] == "train"]
        for folder in (run_dir, undisturbed)
    )
    # bfloat16 has 8 bits; measured: 1.0e-3
    assert found == pytest.approx(expected, abs=5e-3 if way == "half" else 1e-12)
    if way == "half":
        assert found != pytest.approx(expected, abs=1e-6)
