"""Types of config/config.yaml. What each key means is said there, once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

from utils import UserError

# key -> (comparison, bound). null passes where the type allows it; NaN never does.
LIMITS = {
    **dict.fromkeys(
        (
            "batch_size", "selected_batch_size", "eval_batch_size", "gradient_accumulation_steps", "microbatch_tokens",
            "n_epochs", "n_examples", "n_eval_examples", "max_length", "max_prompt_length", "eval_every", "save_every",
            "n_eval_model_samples", "sample_max_new_tokens", "num_threads", "max_consecutive_nonfinite",
        ),
        (">=", 1),
    ),
    **dict.fromkeys(("seed", "warmup_steps", "weight_decay", "reference_check"), (">=", 0)),
    **dict.fromkeys(("lr", "max_grad_norm"), (">", 0)),
    "spike_factor": (">", 1),
}  # fmt: skip


def out_of_range(values: Any, prefix: str, limits: Mapping[str, tuple[str, float]]) -> Iterator[str]:
    """One message per field of ``values`` that breaks its limit."""
    optional = get_type_hints(type(values))
    for key, (comparison, bound) in limits.items():
        value = getattr(values, key)
        if value is None or (value > bound) or (comparison == ">=" and value == bound):
            continue
        rule = f"at least {bound}" if comparison == ">=" else f"> {bound}"
        null = ", or null" if NoneType in get_args(optional[key]) else ""
        yield f"{prefix}{key}={value}: must be {rule}{null}"


def check_limits(values: Any, prefix: str, limits: Mapping[str, tuple[str, float]]) -> None:
    """Raise UserError with every field of ``values`` that breaks its limit."""
    problems = list(out_of_range(values, prefix, limits))
    if problems:
        raise UserError("\n".join(problems))


@dataclass(frozen=True)
class TrainerConfig:
    name: str
    parallel: Literal["none", "fsdp", "ddp"]
    nproc: int | None
    timeout_s: float
    cpu_offload: bool

    def __post_init__(self) -> None:
        check_limits(self, "trainer.", {"nproc": (">=", 1), "timeout_s": (">", 0)})
        if self.parallel == "none" and self.nproc not in (None, 1):
            raise UserError(
                f"trainer.nproc={self.nproc} with trainer={self.name}: that is one process; use trainer=DDPTrainer or FSDPTrainer"
            )
        if self.cpu_offload and self.parallel != "fsdp":
            raise UserError(
                f"trainer.cpu_offload=true with trainer={self.name}: only trainer=FSDPTrainer can"
            )


@dataclass(frozen=True)
class ScoringConfig:
    layout: Literal["shared_prefix", "padded"]
    chunk_tokens: int | None
    verify: bool
    tolerance: float

    def __post_init__(self) -> None:
        check_limits(self, "scoring.", {"chunk_tokens": (">=", 1), "tolerance": (">", 0)})


@dataclass(frozen=True)
class CheckpointConfig:
    format: Literal["full", "sharded"]
    keep: int
    merge_lora: bool

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise UserError(
                f"checkpoint.keep={self.keep}: must be at least 2, because the newest may be the one that fails"
            )


@dataclass(frozen=True)
class WandbConfig:
    enabled: bool
    project: str
    entity: str | None
    tags: list[str]
    legacy_names: bool
    artifact: bool


@dataclass(frozen=True)
class DataConfig:
    bos: Literal["auto", "always", "never"]
    tokenize: Literal["separate", "joint"]
    on_bad_row: Literal["raise", "quarantine"]
    max_bad_fraction: float
    mix_weights: dict[str, float] | None

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction={self.max_bad_fraction}: must be a share from 0 to 1")


@dataclass(frozen=True)
class FreshPairsConfig:
    num_pairs: int
    scorer: Literal["reward", "gpm", "function"]
    model: str | None
    function: str | None
    temperature: float
    max_new_tokens: int | None
    batch_size: int

    def __post_init__(self) -> None:
        limits = {
            "num_pairs": (">=", 0),
            "temperature": (">", 0),
            "max_new_tokens": (">=", 1),
            "batch_size": (">=", 1),
        }
        check_limits(self, "fresh_pairs.", limits)
        if not self.num_pairs and (self.model or self.function):
            raise UserError(
                "fresh_pairs.num_pairs=0: nothing is drawn; give the number of pairs, or neither model nor function"
            )
        key, other = ("function", "model") if self.scorer == "function" else ("model", "function")
        if self.num_pairs and (getattr(self, key) is None or getattr(self, other) is not None):
            raise UserError(
                f"fresh_pairs.scorer={self.scorer}: give fresh_pairs.{key}= (and no fresh_pairs.{other}=), which says how likely "
                "the first response of a pair is preferred"
            )


@dataclass(frozen=True)
class Config:
    """The typed top level. The parts (model, loss, weighting, stopping, data sets) are objects of their own classes."""

    seed: int
    exp_name: str
    run_root: str
    run_dir: str
    multirun_keys: list[str]
    fresh: bool
    resume: Literal["auto", "must", "never"]
    resume_from: str | None
    resume_allow: list[str]
    audit: bool
    device: str
    cache_dir: str
    num_threads: int | None
    allocator: Literal["keep", "default"]
    datasets: list[str]
    data: DataConfig
    truncation: Literal["keep_start", "keep_end", "drop", "error"] | None
    token_cache: str | None
    max_length: int
    max_prompt_length: int
    sep_pairs: bool
    weighted_batches: bool
    batch_size: int
    selected_batch_size: int | None
    eval_batch_size: int
    gradient_accumulation_steps: int
    microbatch_tokens: int | None
    n_epochs: int | None
    n_examples: int | None
    n_eval_examples: int | None
    eval_every: int
    save_every: int | None
    do_first_eval: bool
    eval_splits: list[Literal["validation", "test"]]
    eval_train_data: bool
    eval_only_once: bool
    sample_during_eval: bool
    n_eval_model_samples: int
    sample_max_new_tokens: int | None
    lr: float
    optimizer: str
    optimizer_options: dict[str, Any]
    weight_decay: float
    lr_schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: int | None
    max_grad_norm: float | None
    precision: Literal["fp32", "tf32", "bf16"]
    compile: bool
    activation_checkpointing: bool
    assert_sft_step: bool
    reference: Literal["auto", "live", "cached"]
    reference_cache: str
    reference_check: int
    fresh_pairs: FreshPairsConfig
    scoring: ScoringConfig
    checkpoint: CheckpointConfig
    nonfinite: Literal["raise", "skip"]
    max_consecutive_nonfinite: int
    spike_factor: float | None
    wandb: WandbConfig
    trainer: TrainerConfig = field(repr=False)

    def __post_init__(self) -> None:
        problems = [p for p in self._problems() if p]
        if problems:
            raise UserError("\n".join(problems))

    def _problems(self):
        yield from out_of_range(self, "", LIMITS)
        for key in ("run_root", "run_dir", "cache_dir", "token_cache", "reference_cache", "resume_from"):
            if getattr(self, key) == "":
                yield f"{key}=: an empty path; name a folder, or leave it out"
        if os.path.normpath(self.exp_name).split("/")[0] in ("", ".", ".."):  # the empty name is "."
            yield (
                f"exp_name={self.exp_name}: names a directory inside run_root; give a name, or run_dir=PATH for another place"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            yield f"device={self.device}: must be one of auto, cpu, cuda, cuda:N"
        if self.n_epochs is None and self.n_examples is None:
            yield "n_epochs=null n_examples=null: give one of them, or the run would never end"
        if self.max_prompt_length >= self.max_length:
            yield (
                f"max_prompt_length={self.max_prompt_length}: must be below max_length={self.max_length}, "
                "or no response token would fit"
            )
        if self.microbatch_tokens is not None and self.gradient_accumulation_steps != 1:
            yield (
                f"microbatch_tokens={self.microbatch_tokens} gradient_accumulation_steps={self.gradient_accumulation_steps}: "
                "both say how a step is cut; set one"
            )
        if self.selected_batch_size is not None and self.selected_batch_size > self.batch_size:
            yield (
                f"selected_batch_size={self.selected_batch_size}: must be at most batch_size={self.batch_size}, the rows that "
                "are selected from"
            )
        if not self.datasets:
            yield "datasets=[]: name at least one data set, e.g. datasets=[opinions]"
        if len(set(self.datasets)) != len(self.datasets):
            yield f"datasets={self.datasets}: a name is there twice"
        if self.fresh_pairs.num_pairs:
            if self.microbatch_tokens is not None:
                yield "fresh_pairs with microbatch_tokens: the lengths are not known beforehand; use gradient_accumulation_steps"
            if self.reference == "cached":
                yield "fresh_pairs with reference=cached: what is drawn later cannot be cached before; use reference=auto"
            if self.trainer.parallel == "fsdp":
                yield "fresh_pairs with a sharded model: cannot draw from slices; use trainer=DDPTrainer or BasicTrainer"
        if self.checkpoint.format == "sharded" and self.trainer.parallel != "fsdp":
            yield (
                f"checkpoint.format=sharded with trainer={self.trainer.name}: each rank holds the whole model, there are no "
                "shards; use checkpoint.format=full or trainer=FSDPTrainer"
            )
        if self.data.mix_weights is not None and self.weighted_batches:
            yield "data.mix_weights and weighted_batches=true both decide what is drawn; set one"

    @property
    def splits_each_time(self) -> list[str]:
        """What an evaluation between steps goes through."""
        return [*self.eval_splits, *["train"] * self.eval_train_data]

    def check_world(self, world_size: int) -> None:
        """Raise UserError if the step cannot be cut evenly over accumulation and ranks."""
        if self.microbatch_tokens is not None:
            return
        parts = self.gradient_accumulation_steps * world_size
        key = "batch_size" if self.selected_batch_size is None else "selected_batch_size"
        size = self.selected_batch_size or self.batch_size
        if size % parts:
            low, high = size // parts * parts, (size // parts + 1) * parts
            near = f"{low} or {high}" if low else str(high)
            raise UserError(
                f"{key}={size}: is not divisible by gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps} x {world_size} ranks; nearest: {near}"
            )
