"""Settings of the process: what they change, where they do nothing, and that they are read."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
