"""Resume and equivalence with everything for speed switched on: shared prompts in micro-batches by tokens, compiled blocks,
cached token ids and reference log-probs, fused optimizer, freed memory kept. Cold processes, as a user starts them."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.test_signals import cold
from tests.faults.tools import TWO_RANKS, difference, metrics, words

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]

MODEL = ("model.config.n_layer=3", "lr=0.003")
FAST = (
    *MODEL,
    "compile=true",
    "microbatch_tokens=200",
    "reference=cached",
    "scoring.verify=true",
    "allocator=keep",
)
SLOW = (
    *MODEL,
    "scoring.layout=padded",
    "gradient_accumulation_steps=1",
    "token_cache=null",
    "allocator=default",
)


def run(run_dir: Path, *more: str, code: int = 0, **env: str) -> str:
    """What ``python train.py`` said; its exit code must be ``code``."""
    process = cold(words(run_dir, *more), TORCHINDUCTOR_COMPILE_THREADS="1", **env)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == code, text[-3000:]
    return text


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("fast") / "run"
    run(run_dir, *FAST)
    return run_dir


@pytest.mark.parametrize("crash", ["after_step:2", "after_step:4", "save.model:3", "save.sealed:3"])
def test_a_killed_run_continues_bit_equal(tmp_path, undisturbed, crash):
    run(tmp_path / "run", *FAST, code=-signal.SIGKILL, CRASH_AT=crash)
    text = run(tmp_path / "run", *FAST)
    assert "(bit-exact)" in text
    assert "reference log-probs: 0 computed" in text  # the killed run had filled the cache
    assert difference(tmp_path / "run", undisturbed) == []


@pytest.mark.parametrize("other", [(), TWO_RANKS], ids=["alone", "two ranks"])
def test_it_trains_what_the_plain_step_trains(tmp_path, undisturbed, other):
    run(tmp_path / "run", *SLOW, *other)
    fast, slow = (load_file(d / "LATEST" / "model.safetensors") for d in (undisturbed, tmp_path / "run"))
    for name, value in slow.items():
        torch.testing.assert_close(fast[name], value, rtol=0, atol=2e-5)
    for one, two in zip(metrics(undisturbed), metrics(tmp_path / "run"), strict=True):
        assert one["kind"] == two["kind"] and one["examples"] == two["examples"]
        for key in [k for k in one if k.endswith("/loss") or "/weights/" in k]:
            assert one[key] == pytest.approx(two[key], rel=1e-4), key
