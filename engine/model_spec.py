"""What config/model/<name>.yaml says of a model, its tokenizer, and whether that fits the model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.archives import Archive
from engine.lora import first_line
from utils import UserError, log

ROOT = Path(__file__).resolve().parents[1]
WHERE_FROM = (
    "give a local directory, or a hub id this machine can reach (gated models: `hf auth login` first)"
)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}

Output = Literal["logps", "reward", "embedding"]
DType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclass(frozen=True)
class ModelSpec:
    """Schema of config/model/<name>.yaml; what each key means is said there."""

    name: str
    lr: float
    name_or_path: str | None = None
    config: dict[str, Any] | None = None
    init_seed: int = 0
    tokenizer_name_or_path: str | None = None
    revision: str | None = None
    archive: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False
    policy_dtype: DType = "float32"
    reference_dtype: DType = "float32"
    fsdp_policy_mp: Literal["bfloat16", "float16"] | None = None
    block_name: str | None = None
    attn_implementation: Literal["sdpa", "eager"] = "sdpa"
    quantization: Literal["nf4"] | None = None
    use_lora: bool = False
    lora_rank: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        problems = [p for p in self._problems() if p]
        if problems:
            raise UserError("\n".join(problems))

    def _problems(self) -> Iterator[str]:
        if (self.name_or_path is None) == (self.config is None):
            yield (
                f"model.name_or_path={self.name_or_path}: give either it (a pretrained model) or model.config (a model "
                "built from a seed), not both and not neither"
            )
        if self.config is not None and "model_type" not in self.config:
            yield "model.config: model_type is missing; e.g. model.config.model_type=gemma"
        if self.name_or_path is None and self.tokenizer_name_or_path is None:
            yield "model.tokenizer_name_or_path=null: required when there is no model.name_or_path"
        if not self.lr > 0:
            yield f"model.lr={self.lr}: must be > 0"
        if self.lora_rank < 1:
            yield f"model.lora_rank={self.lora_rank}: must be at least 1"
        if not self.lora_alpha > 0:
            yield f"model.lora_alpha={self.lora_alpha}: must be > 0"
        if self.lora_dropout != 0:
            yield (
                f"model.lora_dropout={self.lora_dropout}: must be 0; a prompt shared by its responses is computed once, "
                "so dropout would tie their noise together and the run could not be resumed exactly"
            )
        if self.lora_target_modules is not None and not self.lora_target_modules:
            yield "model.lora_target_modules=[]: name at least one module, or null for every linear layer of the blocks"
        if self.use_lora and self.reference_dtype != self.policy_dtype:
            yield (
                f"model.reference_dtype={self.reference_dtype} model.policy_dtype={self.policy_dtype}: with model.use_lora=true the "
                "reference is the policy with its adapter off, in the policy's dtype; give both the same"
            )
        if self.quantization is not None and (not self.use_lora or self.name_or_path is None):
            yield (
                f"model.quantization={self.quantization}: 4-bit weights cannot be trained; it needs model.use_lora=true "
                "and a pretrained model.name_or_path"
            )


# ---------------------------------------------------------------------------------------------- tokenizer


def local_path(name_or_path: str) -> str:
    """A directory given relative to the working directory or to the project, as a path; else the hub's name as it is."""
    path = Path(name_or_path).expanduser()
    for candidate in (path, ROOT / path):
        if candidate.exists():
            return str(candidate.resolve())
    return name_or_path


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token (EOS where it has none, logged). UserError without EOS."""
    name = spec.tokenizer_name_or_path or spec.name_or_path
    key = "tokenizer_name_or_path" if spec.tokenizer_name_or_path else "name_or_path"
    revision = spec.revision if name == spec.name_or_path else None  # of the model's repository, no other's
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            local_path(name), revision=revision, trust_remote_code=spec.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.{key}={name}: no tokenizer can be loaded ({first_line(error)}); {WHERE_FROM}"
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.{key}={name}: the tokenizer has no EOS token, so no response could end; give a tokenizer with one"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        log.info(
            "tokenizer %s has no padding token: EOS %r pads (padding is masked, never compared)",
            name,
            tokenizer.eos_token,
        )
    if spec.chat_template is not None:
        path = Path(local_path(spec.chat_template))
        if not path.is_file() and "{" not in spec.chat_template:
            raise UserError(
                f"model.chat_template={spec.chat_template}: no such file, and no template (nothing is filled in); give a Jinja file or text"
            )
        tokenizer.chat_template = path.read_text("utf-8") if path.is_file() else spec.chat_template
    return tokenizer


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def check_vocabulary(rows: int, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> None:
    ids = num_ids(tokenizer)
    if ids > rows:
        raise UserError(
            f"model.tokenizer_name_or_path={spec.tokenizer_name_or_path or spec.name_or_path}: the tokenizer has {ids} tokens "
            f"but the model's embedding only {rows}; give the model's own tokenizer, or a model with a larger vocabulary"
        )


def check_archived_tokenizer(stored: Archive, tokenizer: PreTrainedTokenizerBase) -> None:
    """Equal sizes hide another vocabulary: compare with the tokenizer kept beside the weights, if any."""
    folder = stored.path if stored.path.is_dir() else stored.path.parent
    if not (folder / "tokenizer.json").is_file():
        return
    theirs, ours = AutoTokenizer.from_pretrained(str(folder)).get_vocab(), tokenizer.get_vocab()
    if theirs != ours:
        token, number = sorted(set(theirs.items()) ^ set(ours.items()), key=lambda item: (item[1], item[0]))[
            0
        ]
        raise UserError(
            f"model.archive={stored.path}: was trained with another tokenizer ({len(theirs)} tokens there, {len(ours)} here; "
            f"first difference: {token!r} = {number}); set model.tokenizer_name_or_path={folder}"
        )
