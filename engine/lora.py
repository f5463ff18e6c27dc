"""LoRA adapters of our models, through peft: adding, loading, switching off, folding in."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from engine import archives
from engine.archives import Archive, weights_hash
from utils import UserError, global_rng_untouched, log, stream, stream_seed

if TYPE_CHECKING:
    from engine.model_spec import ModelSpec

POLICY_ADAPTER = "default"  # peft's own name, so that saved adapters are ordinary ones
REFERENCE_ADAPTER = (
    "reference"  # frozen copy of an archived adapter: the reference of a run that trains it further
)


def first_line(error: Exception) -> str:
    """Third-party messages run over pages; their first line says what is wrong."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextlib.contextmanager
def drawing_from(seed: int, name: str) -> Iterator[None]:
    """Third-party code that draws from torch's global CPU generator draws from a named stream instead."""
    with global_rng_untouched():
        torch.default_generator.manual_seed(stream_seed(seed, name))
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for an attribute under its deprecated name; nothing a user can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        yield


def is_peft(model: nn.Module) -> bool:
    """Whether ``model`` is a LoRA model; without importing peft for models that are not."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def with_lora(
    model: nn.Module, spec: ModelSpec, stored: Archive | None, archive: str | None, seed: int, task: str
) -> nn.Module:
    """``model`` in a PeftModel with a fresh adapter (Hu et al. 2021, arXiv 2106.09685): A from a stream, B = 0."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers.pytorch_utils import Conv1D

    on = None  # the archive that holds the base weights
    if stored is not None:
        on = archive if stored.base else (stored.base_facts or {}).get("archive")
    facts = {
        "name": spec.name_or_path or f"{spec.name} (built from init_seed={spec.init_seed})",
        "archive": str(Path(on).resolve()) if on else None,
        "dtype": str(model.dtype),
        "weights": weights_hash(model) if spec.quantization is None and task == "CAUSAL_LM" else None,
    }
    if spec.quantization is not None:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model.name_or_path = (
        facts["archive"] or spec.name_or_path or ""
    )  # peft writes it into adapter_config.json
    settings = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(spec.lora_target_modules or ()) or "all-linear",
        bias="none",
        task_type=task,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2 stores weights transposed
    )
    try:
        with drawing_from(seed, "lora"), _quiet():
            model = get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(
            f"model.lora_target_modules={spec.lora_target_modules}: {first_line(error)}"
        ) from error
    model.lora_base = facts  # what save_model writes beside the adapter
    return model


def load_adapter(model: nn.Module, name: str, stored: Archive | None, head: str | None = None) -> None:
    """The archive's adapter, if it has one, into adapter ``name``. A differing alpha would not show in any shape.

    head: a freshly initialised head that the archive may lack.
    """
    if stored is None or not stored.adapter:
        return
    ours, theirs = model.peft_config[name], stored.adapter_config
    if theirs is None:
        log.info("%s does not say its LoRA alpha: using model.lora_alpha=%g", stored.path, ours.lora_alpha)
    else:
        for key, field_name in (("lora_rank", "r"), ("lora_alpha", "lora_alpha")):
            if theirs[field_name] != getattr(ours, field_name):
                raise UserError(
                    f"model.{key}={getattr(ours, field_name)}: the adapter in model.archive={stored.path} has "
                    f"{theirs[field_name]}; set model.{key}={theirs[field_name]}"
                )
        for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
            if theirs.get(key):
                raise UserError(
                    f"model.archive={stored.path}: its adapter uses {key}, which is not supported; merge it first"
                )
    archives.load_adapter(model, stored, name, head=head)


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """A LoRA model as its own reference: the frozen ``reference`` adapter in place of the trained one, or none at all.

    The first is for training that continued from an archived adapter: its reference is base + archived adapter.
    """
    if REFERENCE_ADAPTER not in model.peft_config:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(REFERENCE_ADAPTER, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(POLICY_ADAPTER)


def folded(model: nn.Module) -> tuple[nn.Module, float]:
    """(a float32 copy with the trained adapter folded into the weights, largest difference of its outputs on fixed ids).

    Outputs are log-probs (nats) of a language model, raw outputs of a classifier.
    """
    work = copy.deepcopy(model).float().eval()
    if REFERENCE_ADAPTER in work.peft_config:
        work.delete_adapter(REFERENCE_ADAPTER)
    rows = work.get_input_embeddings().weight.shape[0]
    ids = torch.from_numpy(stream(0, "merge_check").integers(0, rows, size=(2, 32)))
    ids = ids.to(next(work.parameters()).device)
    with torch.no_grad():
        before = _outputs(work, ids)
        merged = work.merge_and_unload(safe_merge=True)
        gap = (_outputs(merged, ids) - before).abs().max().item()
    return merged, gap


def _outputs(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits.log_softmax(-1) if logits.dim() == 3 else logits
