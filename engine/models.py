"""Models: building policies and references, saving and merging them."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from engine import archives, checkpoint
from engine.archives import Archive, weights_hash
from engine.lora import (
    POLICY_ADAPTER,
    REFERENCE_ADAPTER,
    drawing_from,
    first_line,
    folded,
    is_peft,
    load_adapter,
    with_lora,
)
from engine.model_spec import (
    DTYPES,
    WHERE_FROM,
    ModelSpec,
    Output,
    check_archived_tokenizer,
    check_vocabulary,
    load_tokenizer,
    local_path,
    num_ids,
)
from utils import UserError, log, stream, write_atomic

HEAD = "score"  # Hugging Face's name of the head of a sequence classifier


# ---------------------------------------------------------------------------------------------- building


def build_policy(
    spec: ModelSpec,
    *,
    archive: str | None = None,
    output: Output = "logps",
    dim: int | None = None,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """The model to train: a causal LM, or with output="reward" / "embedding" a classifier with 1 / ``dim`` outputs.

    Weights, later ones winning: pretrained, or drawn from ``spec.init_seed``; those of ``archive``. New LoRA adapters and
    heads are drawn from streams of ``seed``. Torch's global generator is as before on return. Dropout is 0 everywhere, so
    training and evaluation mode compute the same. When the archive is an adapter, training continues from it and a frozen
    copy named ``reference`` stays in the model (see ``reference.AdapterOffReference``).

    device="meta" (where `can_defer` allows it) gives the structure without values: shard it, then call `fill`.
    """
    model, stored = _assemble(
        spec,
        archive=archive,
        output=output,
        dim=dim,
        seed=seed,
        device=device,
        dtype=dtype or DTYPES[spec.policy_dtype],
        tokenizer=tokenizer or load_tokenizer(spec),
    )
    if spec.use_lora:
        load_adapter(model, POLICY_ADAPTER, stored, head=None if output == "logps" else HEAD)
        if stored is not None and stored.adapter and output == "logps":
            with drawing_from(seed, "reference_adapter"):  # overwritten at once
                model.add_adapter(REFERENCE_ADAPTER, copy.deepcopy(model.peft_config[POLICY_ADAPTER]))
            load_adapter(model, REFERENCE_ADAPTER, stored)
            for name, parameter in model.named_parameters():
                if f".{REFERENCE_ADAPTER}." in name:
                    parameter.requires_grad_(False)
    return model.train()


def build_reference(
    spec: ModelSpec,
    *,
    archive: str | None = None,
    seed: int = 0,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """A frozen causal LM with the weights a policy starts from, in ``spec.reference_dtype``.

    LoRA policies need none: their reference is themselves with the adapter off (``reference.AdapterOffReference``).
    """
    model, stored = _assemble(
        spec,
        archive=archive,
        output="logps",
        dim=None,
        seed=seed,
        device=device,
        dtype=dtype or DTYPES[spec.reference_dtype],
        tokenizer=tokenizer or load_tokenizer(spec),
    )
    if spec.use_lora:
        load_adapter(model, POLICY_ADAPTER, stored)
    return model.requires_grad_(False).eval()


def _assemble(
    spec: ModelSpec,
    *,
    archive: str | None,
    output: Output,
    dim: int | None,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[nn.Module, Archive | None]:
    """(model on ``device`` with base weights loaded and a fresh adapter if the spec wants one, the archive)."""
    if (dim is not None) != (output == "embedding"):
        raise ValueError(f"output={output!r} with dim={dim}: embeddings, and only they, need a dimension")
    stored = archives.read(archive) if archive is not None else None
    if stored is not None and stored.adapter and not spec.use_lora:
        raise UserError(
            f"model.archive={archive}: is a LoRA adapter; set model.use_lora=true with its rank, alpha and targets, or give "
            "the merged model"
        )
    num_labels = None if output == "logps" else (dim or 1)
    deferred = torch.device(device).type == "meta"
    if spec.config is not None:
        model = _from_seed(spec, num_labels, tokenizer)
    elif deferred:
        model = _skeleton(spec, num_labels, dtype)
    else:
        model = _from_pretrained(spec, num_labels, dtype, device)
    check_vocabulary(model.get_input_embeddings().weight.shape[0], tokenizer, spec)
    # Hugging Face's embedding gives its padding row no gradient, and EOS may be what pads; masks do all we need
    model.get_input_embeddings().padding_idx = None
    for parameter in model.parameters():
        if parameter.is_floating_point() and spec.quantization is None:
            parameter.data = parameter.data.to(dtype)  # not buffers: rotary frequencies stay in float32
    if num_labels is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
        if not deferred:
            _draw_head(getattr(model, HEAD), model.config.initializer_range, seed)
    if stored is not None:
        check_archived_tokenizer(stored, tokenizer)
        if not deferred:
            _load_base(model, stored, spec, HEAD if num_labels is not None else None)
    if spec.quantization is None and not deferred:
        model.to(device)
    if spec.use_lora:
        model = with_lora(
            model, spec, stored, archive, seed, "CAUSAL_LM" if num_labels is None else "SEQ_CLS"
        )
    if dtype in (torch.bfloat16, torch.float16) and any(
        p.dtype == dtype and p.requires_grad for p in model.parameters()
    ):
        log.warning(
            "trained weights are kept in %s: steps smaller than its rounding are lost; prefer model.policy_dtype=float32 "
            "with precision=bf16",
            dtype,
        )
    return model, stored


def _prepare_config(config: PreTrainedConfig, num_labels: int | None) -> PreTrainedConfig:
    """Dropout 0, and the width of a classifier's head."""
    for key, value in config.to_dict().items():
        if isinstance(value, float) and re.search(r"dropout|_pdrop$", key):
            setattr(config, key, 0.0)
    if num_labels is not None:
        config.num_labels = num_labels
    return config


def _from_seed(spec: ModelSpec, num_labels: int | None, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Built from ``spec.config`` with weights drawn in float32 from the stream (init_seed, "model_init")."""
    values = dict(spec.config)
    model_type = values.pop("model_type")
    values.setdefault("vocab_size", num_ids(tokenizer))
    check_vocabulary(values["vocab_size"], tokenizer, spec)
    ids = {f"{t}_token_id": getattr(tokenizer, f"{t}_token_id") for t in ("bos", "eos")}
    try:
        config = AutoConfig.for_model(model_type, **{**ids, **values})
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"model.config: {' '.join(str(error).split())}") from error
    known = set(type(config)().to_dict()) | set(config.attribute_map)
    if unknown := sorted(set(values) - known):
        raise UserError(
            f"model.config.{unknown[0]}={values[unknown[0]]}: no such key for model_type={model_type}"
        )
    cls = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    with drawing_from(spec.init_seed, "model_init"):
        return cls.from_config(
            _prepare_config(config, num_labels),
            dtype=torch.float32,
            attn_implementation=spec.attn_implementation,
        )


def check_positions(model: nn.Module, longest: int) -> None:
    """Raise UserError if the model has a table of positions (GPT-2, OPT) that is shorter than a row; a GPU would abort."""
    tables = ("wpe", "embed_positions", "position_embeddings")
    if not any(isinstance(m, nn.Embedding) and name.endswith(tables) for name, m in model.named_modules()):
        return
    if longest > (positions := model.config.max_position_embeddings):
        raise UserError(
            f"max_length: the longest row has {longest} tokens, but the model has {positions} positions; give max_length={positions} "
            "or less"
        )


def _from_pretrained(
    spec: ModelSpec,
    num_labels: int | None,
    dtype: torch.dtype,
    device: torch.device | str,
) -> nn.Module:
    name = local_path(spec.name_or_path)
    cls = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    hub = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    extra: dict[str, Any] = _nf4(device) if spec.quantization == "nf4" else {}
    try:
        config = _prepare_config(AutoConfig.from_pretrained(name, **hub), num_labels)
        with drawing_from(0, "unused"):  # a missing head is drawn there, and drawn again by us
            model, info = _safetensors_first(
                cls,
                name,
                config=config,
                dtype=dtype,
                attn_implementation=spec.attn_implementation,
                **hub,
                **extra,
            )
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"model.name_or_path={spec.name_or_path}: cannot be loaded ({first_line(error)}); {WHERE_FROM}"
        ) from error
    missing = [k for k in info["missing_keys"] if num_labels is None or not k.startswith(HEAD + ".")]
    if missing:
        raise UserError(
            f"model.name_or_path={spec.name_or_path}: weights are missing there: {', '.join(sorted(missing)[:4])}"
        )
    return model


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside get parameters without memory; their buffers (rotary frequencies) are computed as usual."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        plain(module, name, parameter)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = plain


def _skeleton(spec: ModelSpec, num_labels: int | None, dtype: torch.dtype) -> nn.Module:
    """The pretrained model's structure; parameters on the meta device."""
    cls = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    hub = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
    try:
        config = _prepare_config(AutoConfig.from_pretrained(local_path(spec.name_or_path), **hub), num_labels)
        code = {"trust_remote_code": spec.trust_remote_code}
        with drawing_from(0, "unused"), _parameters_on_meta():
            return cls.from_config(config, dtype=dtype, attn_implementation=spec.attn_implementation, **code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path={spec.name_or_path}: cannot be loaded ({first_line(error)}); {WHERE_FROM}"
        ) from error


def _pretrained(spec: ModelSpec, model: nn.Module) -> Archive:
    """The pretrained tensors, mapped and not read, under the names that ``model`` uses."""
    name = local_path(spec.name_or_path)
    if not Path(name).is_dir():
        from huggingface_hub import snapshot_download

        patterns = ["*.safetensors", "*.safetensors.index.json"]
        name = snapshot_download(name, revision=spec.revision, allow_patterns=patterns)
    stored = archives.read(name)
    own, prefix = model.state_dict().keys(), model.base_model_prefix
    base = {
        f"{prefix}.{k}" if k not in own and f"{prefix}.{k}" in own else k: v for k, v in stored.base.items()
    }
    return replace(stored, base=base)


def can_defer(spec: ModelSpec, output: Output = "logps", dim: int | None = None) -> bool:
    """Whether the model can be built without values and filled when it is sharded (device="meta" and `fill`).

    Not: models drawn from a seed, LoRA and 4-bit models, and those whose files transformers converts while loading.
    """
    if spec.name_or_path is None or spec.use_lora or spec.quantization is not None:
        return False
    model = _skeleton(spec, None if output == "logps" else (dim or 1), DTYPES[spec.policy_dtype])
    try:
        archives.check_base(model, _pretrained(spec, model), head=None if output == "logps" else HEAD)
    except (UserError, OSError, ValueError) as error:
        log.info("%s: built whole on the CPU of every rank, then sharded (%s)", spec.name, first_line(error))
        return False
    return True


def fill(
    model: nn.Module, spec: ModelSpec, *, archive: str | None, output: Output = "logps", seed: int
) -> None:
    """Values for a model built with device="meta", once sharded: each rank reads and keeps its own slices, one tensor
    after the other. The same values as `build_policy` and `build_reference` give. On every rank."""
    head = None if output == "logps" else HEAD
    archives.load_base(model, _pretrained(spec, model), head=head)
    if head is not None:
        _draw_head(getattr(model, head), model.config.initializer_range, seed)
    if archive is not None:
        _load_base(model, archives.read(archive), spec, head)


def _safetensors_first(cls: type, name: str, **kwargs: Any) -> tuple[nn.Module, Mapping[str, Any]]:
    """safetensors where the repository has them; else .bin files, read by torch.load(weights_only=True)."""
    try:
        return cls.from_pretrained(name, use_safetensors=True, output_loading_info=True, **kwargs)
    except OSError:
        loaded = cls.from_pretrained(
            name, use_safetensors=False, weights_only=True, output_loading_info=True, **kwargs
        )
        log.info("%s has no safetensors files: read its .bin files (weights only, no code)", name)
        return loaded


def _nf4(device: torch.device | str) -> dict[str, Any]:
    """Arguments that load 4-bit NormalFloat weights with double quantisation (Dettmers et al. 2023, arXiv 2305.14314)."""
    lacking = [p for p in ("bitsandbytes", "accelerate") if importlib.util.find_spec(p) is None]
    if torch.device(device).type != "cuda" or lacking:
        raise UserError(
            f"model.quantization=nf4: needs a CUDA device (device={device}) and the packages bitsandbytes and accelerate"
            f"{' (missing: ' + ', '.join(lacking) + ')' if lacking else ''}; use model.quantization=null"
        )
    from transformers import BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantised, "device_map": {"": device}}


def _draw_head(head: nn.Module, std: float, seed: int) -> None:
    """Normal(0, std^2) weights from the stream (seed, "head"); a bias, if any, starts at 0."""
    draws = stream(seed, "head").normal(0.0, std, tuple(head.weight.shape))
    with torch.no_grad():
        head.weight.copy_(checkpoint.place(torch.from_numpy(draws), head.weight))
        if head.bias is not None:
            head.bias.zero_()


def _load_base(model: nn.Module, stored: Archive, spec: ModelSpec, head: str | None) -> None:
    """Whole-model weights of the archive, or of the archive that an archived adapter was trained on."""
    if spec.quantization is not None:
        if stored.base and not stored.adapter:
            raise UserError(
                f"model.archive={stored.path}: whole-model weights cannot be loaded into a 4-bit model; give them as "
                "model.name_or_path (a Hugging Face directory), or set model.quantization=null"
            )
        return
    if stored.base:
        archives.load_base(model, stored, head=head)
    facts = stored.base_facts
    if facts is None:
        return
    if facts["archive"] is not None:
        log.info("%s was trained on %s: loading that first", stored.path, facts["archive"])
        _load_base(model, archives.read(facts["archive"]), spec, head)
    if facts["weights"] is None or head is not None or facts["dtype"] != str(model.dtype):
        log.info("%s: its base weights are not compared (dtype, head or quantisation differ)", stored.path)
    elif (found := weights_hash(model)) != facts["weights"]:
        raise UserError(
            f"model.archive={stored.path}: this LoRA adapter was trained on other base weights (sha256 "
            f"{facts['weights'][:12]}, {facts['name']}) than model={spec.name} has ({found[:12]}); use the same model "
            "(name_or_path, revision, init_seed)"
        )


# ---------------------------------------------------------------------------------------------- after building


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Recompute each block in the backward pass: less memory, one more forward. Acts while ``model.training``."""
    base = model.get_base_model() if is_peft(model) else model
    if not base.supports_gradient_checkpointing:
        raise UserError(f"activation_checkpointing=true: {type(base).__name__} does not support it")
    base.activation_checkpointing_enable({"use_reentrant": False})


def restore(model: nn.Module, path: Path | str) -> None:
    """Put back what ``save_model`` wrote, bit for bit, into a model built with the same spec and archive. Strict.

    For resuming: of a LoRA model only the trained adapter changes, its base and reference adapter stay. Of a sharded model:
    on every rank.
    """
    stored = archives.read(str(path))
    if is_peft(model):
        archives.load_adapter(model, stored, POLICY_ADAPTER)
    else:
        archives.load_base(model, stored)


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Path | str,
    *,
    state: Mapping[str, Tensor] | None = None,
    weights: bool = True,
) -> None:
    """An ordinary Hugging Face directory: weights (safetensors), configuration, tokenizer. Weights are kept bit for bit.

    LoRA: the trained adapter alone (adapter_config.json, adapter_model.safetensors), and lora_base.json, which says what it
    was trained on so that loading it on other weights is refused.

    state: gathered parameters of a sharded model, by the names of ``model.named_parameters()``.
    weights: False leaves them out.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    state = None if state is None else dict(state)
    if not weights:
        model.config.architectures, model.config.dtype = [type(model).__name__], model.dtype
        model.config.save_pretrained(str(path))
        if model.can_generate():
            model.generation_config.save_pretrained(str(path))
    elif is_peft(model):
        model.save_pretrained(
            str(path), selected_adapters=[POLICY_ADAPTER], save_embedding_layers=False, state_dict=state
        )
        write_atomic(path / archives.BASE_FILE, json.dumps(model.lora_base, indent=1) + "\n")
    else:
        model.save_pretrained(str(path), state_dict=state)
    tokenizer.save_pretrained(str(path))


def merge_lora(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path | str, *, tolerance: float = 1e-3
) -> float:
    """Write the model with its trained adapter folded into the weights, in float32, as a Hugging Face directory.

    Before anything is written the merged and the unmerged model, both in float32, score the same ids; returns the largest
    difference of their log-probs in nats, raises UserError past ``tolerance``. ``model`` itself is left as it was.
    """
    if getattr(model.get_base_model(), "is_quantized", False):
        raise UserError(
            f"{path}: a 4-bit model cannot be merged exactly; load its adapter with model.quantization=null and merge that"
        )
    merged, gap = folded(model)
    if not gap <= tolerance:
        raise UserError(
            f"{path}: merging the LoRA adapter changes log-probs by {gap:.2e} nats (tolerance {tolerance:g}); nothing was "
            "written, use the adapter itself"
        )
    save_model(merged, tokenizer, path)
    log.info("merged LoRA adapter written to %s (largest log-prob difference %.1e nats)", path, gap)
    return gap
