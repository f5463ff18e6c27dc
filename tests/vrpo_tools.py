"""A model of a few thousand parameters and a few rows of the built-in data, for the commands."""

from __future__ import annotations

from pathlib import Path

from assembly import run_training
from config.compose import Run, compose

MODEL = [
    "model=tiny-llama", "model.config.hidden_size=16", "model.config.intermediate_size=32", "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2", "model.config.num_key_value_heads=1", "model.config.head_dim=8",
]  # fmt: skip
DATA = [
    "datasets=[opinions]", "data.opinions.num_train=24", "data.opinions.num_validation=10", "data.opinions.num_test=5",
    "data.opinions.distinct_pairs=false",
]  # fmt: skip
COMMON = [
    *MODEL,
    "wandb.enabled=false",
    "max_length=96",
    "max_prompt_length=80",
    "batch_size=8",
    "device=cpu",
    "num_threads=1",
]


def run_of(folder: Path, *words: str, data: list[str] | None = None) -> Run:
    """A composed run whose files stay below ``folder``."""
    places = [f"run_root={folder}/runs", f"cache_dir={folder}/cache"]
    return compose([*COMMON, *places, *(DATA if data is None else data), *words])


def trained(folder: Path, name: str, *words: str, data: list[str] | None = None) -> str:
    """Train a run to its end; its newest checkpoint."""
    run = run_of(folder, f"exp_name={name}", *words, data=data)
    assert run_training(run).exit_code == 0
    return f"{folder}/runs/{name}/LATEST"


def local(folder: Path) -> list[str]:
    """The words that read the files of commands.sample or commands.annotate."""
    return [
        "datasets=[local]",
        f"data.local.path={folder}/train.jsonl",
        f"data.local.validation_path={folder}/validation.jsonl",
        f"data.local.test_path={folder}/test.jsonl",
    ]
