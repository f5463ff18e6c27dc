"""Shared fixtures. Tests never use the network and never need real data: what does skips visibly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "disabled")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """The folder with real preference data: ``$PREF_DATA_DIR``, else ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("PREF_DATA_DIR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set PREF_DATA_DIR)")
    return folder
