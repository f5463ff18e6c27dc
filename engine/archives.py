"""Weights on disk: finding them, reading them without running code from them, loading them strictly, hashing them.

An archive (``model.archive=``) is one of: a run directory, a checkpoint directory (``RUN/step-N`` or ``RUN/LATEST``), a
Hugging Face directory (whole model or LoRA adapter), a ``.safetensors`` file, or the ``policy.pt`` of the original DPO
repository (``{"step_idx", "state", "metrics"}``). Its tensors may carry the names of any wrapper (DDP, FSDP,
torch.compile, activation checkpointing, peft, our Scorer); they are matched to the plain Hugging Face names.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from engine import checkpoint
from engine.parallel import full_tensor
from utils import UserError, log

FULL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "policy.pt",
)
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
BASE_FILE = "lora_base.json"  # written beside our adapters: which weights they were trained on
KINDS = "a run directory, a checkpoint (RUN/LATEST or RUN/step-N), a Hugging Face directory, a .safetensors file or a policy.pt"

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Buffers that older transformers versions saved and newer ones compute.
_STALE = re.compile(
    r"(\.attn|\.attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$|\.attn\.embed_positions$"
)
_QUANTISED = re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.")


@dataclass(frozen=True)
class Archive:
    """Tensors of an archive under the names of the plain Hugging Face model.

    path            the file or directory they were read from
    base            whole-model tensors; empty for an adapter directory
    adapter         LoRA tensors, named as peft names them in files without ``base_model.model.``: ``<module>.lora_A.weight``
    adapter_config  the adapter directory's adapter_config.json, None elsewhere
    base_facts      the adapter directory's lora_base.json, None where there is none
    """

    path: Path
    base: Mapping[str, Tensor]
    adapter: Mapping[str, Tensor]
    adapter_config: Mapping[str, Any] | None = None
    base_facts: Mapping[str, Any] | None = None


# ---------------------------------------------------------------------------------------------- finding, reading


def find(archive: str, key: str = "model.archive") -> Path:
    """The file, or the directory with a weights file directly in it, that ``archive``, the value of the setting ``key``, means."""
    path = Path(archive).expanduser()
    if path.is_file():
        if path.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
            raise UserError(f"{key}={archive}: not a weights file; give {KINDS}")
        return path
    if not path.is_dir():
        raise UserError(f"{key}={archive}: no such file or directory; give {KINDS}")
    found = _find_in(path)
    if found is None:
        holds = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise UserError(f"{key}={archive}: no (undamaged) weights in it (it holds {holds}); give {KINDS}")
    return found


def _find_in(path: Path) -> Path | None:
    """``path`` itself, its newest valid checkpoint, or the LATEST that the original DPO repository writes."""
    if (path / checkpoint.SHARDS).is_dir():
        whole = checkpoint.whole_folder(path)
        if not whole.is_dir():
            raise UserError(
                f"model.archive={path}: a sharded checkpoint; `python -m commands.consolidate {path.resolve()}` makes a "
                "model of it"
            )
        return whole
    if any((path / name).is_file() for name in (*FULL_FILES, *ADAPTER_FILES)):
        if (path / checkpoint.MANIFEST).is_file():
            try:
                checkpoint.open_checkpoint(
                    path
                )  # hashes every byte: a flipped bit would load as a wrong number
            except checkpoint.CheckpointError as error:
                raise UserError(
                    f"model.archive={path}: damaged ({error}); give another checkpoint of that run"
                ) from error
        return path
    if any(path.glob(f"step-*/{checkpoint.MANIFEST}")):
        newest = next((c.path for c in checkpoint.find(path)), None)
        return newest and _find_in(newest)
    return _find_in(path / "LATEST") if (path / "LATEST").is_dir() else None


def read(archive: str) -> Archive:
    """Read an archive. Raises UserError for a missing, damaged or hostile one."""
    path = find(archive)
    try:
        if path.is_file():
            base, adapter = _split(_read_file(path))
            return Archive(path, base, adapter)
        adapter_file = next((path / n for n in ADAPTER_FILES if (path / n).is_file()), None)
        if adapter_file is None:
            base, adapter = _split(_read_directory(path))
            return Archive(path, base, adapter)
        facts = path / BASE_FILE
        return Archive(
            path,
            base={},
            adapter={_peft_file_name(k): v for k, v in _read_file(adapter_file).items()},
            adapter_config=json.loads((path / "adapter_config.json").read_text("utf-8")),
            base_facts=json.loads(facts.read_text("utf-8")) if facts.is_file() else None,
        )
    except (OSError, SafetensorError, json.JSONDecodeError, EOFError) as error:
        raise UserError(
            f"model.archive={archive}: {path} cannot be read ({error}); is it complete?"
        ) from error


def _read_directory(path: Path) -> dict[str, Tensor]:
    name = next(n for n in FULL_FILES if (path / n).is_file())
    if not name.endswith(".index.json"):
        return _read_file(path / name)
    files = sorted(set(json.loads((path / name).read_text("utf-8"))["weight_map"].values()))
    return {k: v for file in files for k, v in _read_file(path / Path(file).name).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        # weights_only: a pickle that wants to run code is refused, not run
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, because reading it could run code from the file, or it is damaged; if you trust it, convert it "
            "where that does no harm: safetensors.torch.save_file(torch.load(FILE, weights_only=False)"
            "['state'], 'policy.safetensors'), and give the .safetensors file"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); is it complete?") from error
    state = (
        content["state"] if isinstance(content, dict) and isinstance(content.get("state"), dict) else content
    )
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        holds = (
            f"keys {_few(map(str, content))}" if isinstance(content, dict) else f"a {type(content).__name__}"
        )
        raise UserError(f"{path}: holds no state dict of tensors but {holds}")
    return state


# ---------------------------------------------------------------------------------------------- names


def _plain_name(key: str) -> str:
    """Without wrapper components and without anything up to peft's ``base_model.model.``."""
    key = ".".join(part for part in key.split(".") if part not in _WRAPPERS)
    return re.sub(r"^(.*\.)?base_model\.model\.", "", key)


def _peft_file_name(key: str) -> str:
    """``<module>.lora_A.weight`` from ``...base_model.model.<module>.lora_A.default.weight``."""
    key = _plain_name(key)
    return re.sub(r"\.(lora_[A-Za-z_]+)\.default\b", r".\1", key.replace(".modules_to_save.default.", "."))


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(whole-model tensors, LoRA tensors) of a state dict; a frozen ``reference`` adapter in it is left out."""
    base, adapter = {}, {}
    for key, value in tensors.items():
        if ".modules_to_save.default." in key:
            adapter[_peft_file_name(key)] = value
        elif ".lora_" in key:
            if ".reference" not in key:
                adapter[_peft_file_name(key)] = value
        else:
            base[_plain_name(key).replace(".base_layer.", ".").replace(".original_module.", ".")] = value
    return base, adapter


def _without_prefix(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """``state`` without the prefix under which a wrapper (our Scorer, say) held the model."""
    anchor = next(iter(expected))
    prefixes = [k[: -len(anchor)] for k in state if k == anchor or k.endswith("." + anchor)]
    prefix = min(prefixes, key=len, default="")
    return {k[len(prefix) :] if k.startswith(prefix) else k: v for k, v in state.items()}


def _few(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# ---------------------------------------------------------------------------------------------- loading


def load_base(model: nn.Module, archive: Archive, *, head: str | None = None) -> None:
    """Copy the archive's whole-model tensors into ``model`` (no peft wrapper), in the model's own dtype. Strict.

    Of a sharded model each rank keeps its slices; files are mapped, so no more than one whole tensor is in memory.

    head: name of a freshly initialised head (``score``) that a language-model archive lacks; then the archive's
    ``lm_head`` is left out too.

    Raises UserError naming the first few missing, unexpected or differently shaped tensors.
    """
    given, own = check_base(model, archive, head=head), model.state_dict()
    with torch.no_grad():
        for name, tensor in given.items():
            if name in own:
                own[name].copy_(checkpoint.place(tensor, own[name]))
    log.info("loaded %d tensors from %s", sum(k in own for k in given), archive.path)


def check_base(model: nn.Module, archive: Archive, *, head: str | None = None) -> dict[str, Tensor]:
    """The archive's tensors by the model's names, or the UserError that `load_base` promises. Needs no values."""
    own = model.state_dict()
    if any(_QUANTISED.search(k) for k in archive.base):
        raise UserError(
            f"model.archive={archive.path}: holds 4-bit weights, which cannot be loaded into full precision; "
            "set model.quantization=nf4 (its LoRA tensors are then loaded on the requantised base)"
        )
    given = _without_prefix(archive.base, own)
    tied = _tied_groups(model)
    unexpected = [k for k in given if k not in own and not _STALE.search(k)]
    missing = [k for k in own if k not in given and not any(t in given for t in tied[k])]
    if head is not None:
        missing = [k for k in missing if not k.startswith(head + ".")]
        unexpected = [k for k in unexpected if not k.startswith("lm_head.")]
    shapes = [
        f"{k} is {tuple(v.shape)} there and {tuple(own[k].shape)} here"
        for k, v in given.items()
        if k in own and v.shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        raise UserError(_mismatch(archive, model, given, missing, unexpected, shapes))
    for name, names in tied.items():
        twin = next((t for t in names if t in given), None)
        if name in given and twin is not None and not torch.equal(given[name], given[twin]):
            raise UserError(
                f"model.archive={archive.path}: {name} and {twin} differ there, but this model ties them; "
                "the archive is of another configuration (tie_word_embeddings)"
            )
    return given


def _tied_groups(model: nn.Module) -> dict[str, list[str]]:
    """For each name, the other names of the same parameter."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    groups: dict[int, list[str]] = {}
    for name, tensor in named:
        groups.setdefault(id(tensor), []).append(name)
    return {name: [n for n in groups[id(tensor)] if n != name] for name, tensor in named}


def _mismatch(
    archive: Archive,
    model: nn.Module,
    given: Mapping[str, Tensor],
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    lines = [f"model.archive={archive.path}: does not fit the model"]
    embedding = model.get_input_embeddings().weight
    name = next(n for n, p in model.named_parameters() if p is embedding)
    if (
        name in given
        and given[name].shape != embedding.shape
        and given[name].shape[1:] == embedding.shape[1:]
    ):
        lines.append(
            f"vocabulary: {given[name].shape[0]} tokens in the archive, {embedding.shape[0]} in the model"
        )
    if shapes:
        lines.append(f"shapes: {_few(shapes, 3)}")
    if missing:
        lines.append(f"not in the archive: {_few(missing)}")
    if unexpected:
        lines.append(f"not in the model: {_few(unexpected)}")
    return "\n  ".join(
        [*lines, "give the archive of a run with the same model=, or the model= of that archive"]
    )


def load_adapter(model: nn.Module, archive: Archive, name: str, *, head: str | None = None) -> None:
    """Copy the archive's LoRA tensors into adapter ``name`` of a PeftModel. Strict; raises UserError on any difference.

    head: as in ``load_base``, a freshly initialised head that the adapter of a language model lacks.
    """
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    own = {_peft_file_name(k): v for k, v in own.items()}
    missing = [k for k in own if k not in archive.adapter and (head is None or not k.startswith(f"{head}."))]
    unexpected = [k for k in archive.adapter if k not in own]
    shapes = [
        f"{k} is {tuple(v.shape)} there and {tuple(own[k].shape)} here"
        for k, v in archive.adapter.items()
        if k in own and v.shape != own[k].shape
    ]
    if missing or unexpected or shapes:
        parts = [
            f"shapes: {_few(shapes, 3)}" if shapes else "",
            f"not in the archive: {_few(missing)}" if missing else "",
            f"not in the model: {_few(unexpected)}" if unexpected else "",
        ]
        raise UserError(
            f"model.archive={archive.path}: its LoRA adapter does not fit; {'; '.join(p for p in parts if p)}; "
            "use its model=, model.lora_rank= and model.lora_target_modules="
        )
    with torch.no_grad():
        for key, tensor in archive.adapter.items():
            own[key].copy_(checkpoint.place(tensor, own[key]))
    log.info("loaded LoRA adapter (%d tensors) from %s", len(archive.adapter), archive.path)


# ---------------------------------------------------------------------------------------------- identity


def weights_hash(model: nn.Module, adapter: str | None = None) -> str:
    """SHA-256 (hex) of the function a model computes: parameters, persistent buffers and configuration.

    A PeftModel hashes as its base model (so LoRA and full runs from the same weights share cached reference
    log-probs); ``adapter`` adds that adapter's tensors and scale. Of a sharded model: on every rank.
    """
    digest = hashlib.sha256()
    volatile = {"_name_or_path", "transformers_version", "architectures", "use_cache", "dtype", "torch_dtype"}
    config = {k: v for k, v in model.config.to_dict().items() if k not in volatile}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    tensors = model.state_dict()
    base = {
        _plain_name(k).replace(".base_layer.", ".").replace(".original_module.", "."): v
        for k, v in tensors.items()
        if ".lora_" not in k and ".modules_to_save." not in k
    }
    for name in sorted(base):
        _update(digest, name, base[name])
    if adapter is not None:
        settings = model.peft_config[adapter]
        digest.update(f"{settings.lora_alpha}/{settings.r}/{settings.use_rslora}".encode())
        for name in sorted(k for k in tensors if f".{adapter}." in k):
            _update(digest, _plain_name(name).replace(f".{adapter}.", "."), tensors[name])
    return digest.hexdigest()


def _update(digest: Any, name: str, tensor: Tensor) -> None:
    tensor = full_tensor(tensor).contiguous()
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
