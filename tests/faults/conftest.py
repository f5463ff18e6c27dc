"""Runs that nothing disturbed, to compare with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.tools import TWO_RANKS, finish, words


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one process."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "one"
    finish(words(run_dir))
    return run_dir


@pytest.fixture(scope="session")
def undisturbed_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two sharded ranks."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "two"
    finish(words(run_dir, *TWO_RANKS), ranks=2)
    return run_dir
