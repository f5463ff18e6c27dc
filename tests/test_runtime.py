"""Settings of the process: what they change, where they do nothing, and that they are read."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import run_models
from config.compose import compose
from engine import runtime
from utils import UserError

# page faults of a later use of a large tensor's memory: a page each if the system took it back, none if it was kept
FAULTS = """
import resource, sys, torch
from engine import runtime
runtime.configure(1, sys.argv[1])
for _ in range(40):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(allocator, **environment):
    done = subprocess.run(
        [sys.executable, "-c", FAULTS, allocator], capture_output=True, text=True, check=True, env=environment
    )
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_freed_memory_is_used_again_without_page_faults():
    if not runtime.keep_freed_memory():
        pytest.skip("malloc is not glibc's, or the environment sets it up")
    assert faults("keep") < 16
    assert faults("default") >= 32  # as many with huge pages, 16,384 without


def test_the_environments_own_choice_stands(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    assert runtime.keep_freed_memory() is False
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")
    assert runtime.keep_freed_memory() is False


def test_an_unknown_allocator_is_named():
    with pytest.raises(UserError, match="allocator"):
        compose(["allocator=jemalloc"])


def test_tf32_is_for_cuda_and_does_not_outlive_its_run():
    with pytest.raises(UserError, match="precision=tf32: there is none on cpu"):
        runtime.set_products("tf32", torch.device("cpu"))
    try:
        runtime.set_products("tf32", torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "high"
        with runtime.full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        runtime.set_products("fp32", torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_config_reaches_the_blocks(monkeypatch):
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **kwargs: compiled.append((module, kwargs))
    )
    for flag, count in (("false", 0), ("true", 1)):
        run = compose(["model=tiny-llama", f"compile={flag}"])
        model = run_models.models.build_reference(run.model, device="cpu")
        run_models.build_scorer(run, model)
        assert len(compiled) == count * (len(model.model.layers) - 1)
    assert [module for module, _ in compiled] == list(model.model.layers)[:-1]
    assert all(kwargs == {"dynamic": True} for _, kwargs in compiled)
