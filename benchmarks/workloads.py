"""Synthetic batches with the shapes of published preference data, models to run them on, and the arithmetic they need.

Token ids are drawn uniformly: speed and memory depend on lengths, not on words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from data.schema import Row
from losses.pairwise import DPO
from losses.types import Loss
from losses.vrpo import VarianceReduced
from utils import content_hash, global_rng_untouched, stream

ROOT = Path(__file__).resolve().parents[1]

# Lengths of dialogues: log-normal with the spread of HH-RLHF's harmless-base test split (standard deviation of log words: 1.05
# for prompts, 0.92 for responses), cut as the original DPO repository does by default (prompt 256 tokens, together 512),
# with a mean of 128 tokens. Batches of 8 pairs are then padded to 1.8 times their tokens on average.
SPREAD, MEDIAN, SHORTEST, LONGEST = 0.9, 110, 8, 256


@dataclass(frozen=True)
class Workload:
    """Rows of one optimizer step, and how many of them the padded trainers forward at a time (``micro``)."""

    rows: int
    micro: int
    roles: tuple[str, ...]
    loss: Loss
    draw: Callable[[np.random.Generator, int, int], list[tuple[np.ndarray, list[np.ndarray]]]]

    def step(self, index: int, vocab: int) -> list[Row]:
        """The rows of optimizer step ``index``: a pure function of it."""
        rng = stream(0, "benchmark", index)
        rows = []
        for i, (prompt, responses) in enumerate(self.draw(rng, self.rows, vocab)):
            aux = len(responses) > 2
            rows.append(
                Row(
                    uid=f"step{index}:{i}",
                    prompt=prompt,
                    responses=tuple(responses),
                    roles=("chosen", "rejected", *("aux_1", "aux_2") * (len(responses) // 2 - 1)),
                    group=0,
                    prompt_key=content_hash(prompt.tolist()),
                    scalars={"chosen_preference": 0.7} if aux else {},
                    response_scalars={"aux_preference": (0.6,) * len(responses)} if aux else {},
                )
            )
        return rows


def _ids(rng: np.random.Generator, length: int, vocab: int) -> np.ndarray:
    return rng.integers(3, vocab, length).astype(np.int32)


def _lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(np.exp(rng.normal(np.log(MEDIAN), SPREAD, count)), SHORTEST, LONGEST).astype(int)


def _dialogues(num_responses: int) -> Callable:
    def draw(rng: np.random.Generator, count: int, vocab: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        rows = []
        for _ in range(count):
            prompt, *responses = (_ids(rng, n, vocab) for n in _lengths(rng, 1 + num_responses))
            rows.append((prompt, responses))
        return rows

    return draw


def _opinions(rng: np.random.Generator, count: int, vocab: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """Survey questions of about 150 tokens with four answers of 1 to 3 tokens; four pairs of answers per question."""
    rows = []
    for _ in range(count // 4):
        prompt = _ids(rng, int(np.clip(rng.normal(150, 30), 60, 300)), vocab)
        answers = [_ids(rng, int(rng.integers(1, 4)), vocab) for _ in range(4)]
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        picked = (pairs[k] for k in rng.choice(len(pairs), 4, replace=False))
        rows += [(prompt, [answers[i], answers[j]]) for i, j in picked]
    return rows


_PAIR, _FOUR = ("chosen", "rejected"), ("chosen", "rejected", "aux_1", "aux_2")
WORKLOADS = {
    "hh": Workload(16, 8, _PAIR, DPO(beta=0.1), _dialogues(2)),
    "opinion": Workload(64, 16, _PAIR, DPO(beta=0.1), _opinions),
    "vrpo4": Workload(8, 4, _FOUR, VarianceReduced(beta=0.1), _dialogues(4)),
    "vrpo10": Workload(4, 2, _FOUR, VarianceReduced(beta=0.1), _dialogues(10)),
}

SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")  # prompt tokens x response tokens x responses


def find_workload(name: str) -> Workload:
    """One of ``WORKLOADS``, or rows of one shape: "512x128x4" is a prompt of 512 tokens with 4 responses of 128."""
    if name in WORKLOADS:
        return WORKLOADS[name]
    found = SHAPE.fullmatch(name)
    prompt, response, count = map(int, found.groups()) if found else (0, 0, 0)
    if not prompt or not response or count < 2 or count % 2:
        raise ValueError(
            f"workload {name!r}: must be one of {', '.join(WORKLOADS)} or a shape such as 512x128x4 "
            "(prompt tokens, response tokens, an even number of responses)"
        )

    def draw(rng: np.random.Generator, rows: int, vocab: int) -> list[tuple[np.ndarray, list[np.ndarray]]]:
        return [
            (_ids(rng, prompt, vocab), [_ids(rng, response, vocab) for _ in range(count)])
            for _ in range(rows)
        ]

    like = WORKLOADS["hh" if count == 2 else "vrpo4"]
    return replace(like, draw=draw)


_SMALL_VOCABULARY = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 1024,
    "vocab_size": 1024,
    "max_position_embeddings": 4096,
}
_TINY = {
    "model_type": "gemma",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 97,
    "max_position_embeddings": 1024,
}
_GEMMA_2B = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "intermediate_size": 16384,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
}


MODELS = ("bench", "small_vocab", "gemma_2b", "tiny")


def model_config(name: str, vocab: int | None = None) -> dict:
    """Keyword arguments of a Hugging Face config: bench (config/model/bench.yaml), small_vocab, gemma_2b, or
    tiny (for tests)."""
    if name == "bench":
        config = dict(yaml.safe_load((ROOT / "config" / "model" / "bench.yaml").read_text("utf-8"))["config"])
        config["max_position_embeddings"] = 4096
    else:
        config = dict({"small_vocab": _SMALL_VOCABULARY, "gemma_2b": _GEMMA_2B, "tiny": _TINY}[name])
    if vocab is not None:
        config["vocab_size"] = vocab
    return config


def build_model(config: dict, seed: int, device: torch.device) -> nn.Module:
    """Random float32 weights that are a function of ``seed``."""
    values = dict(config)
    hf = AutoConfig.for_model(
        values.pop("model_type"), bos_token_id=1, eos_token_id=2, pad_token_id=0, **values
    )
    with global_rng_untouched(), device:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(hf)


def inner(model: nn.Module) -> nn.Module:
    """The Hugging Face model, inside its PeftModel if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# ---------------------------------------------------------------------------------------------- what is needed


def useful_flops(rows: Sequence[Row], model: nn.Module) -> float:
    """Floating-point operations that one optimizer step on ``rows`` needs, a multiply-add counting two.

    Every distinct prompt and response once, the last MLP and the vocabulary head only where a response token is predicted,
    the reference cached: 6 per trained weight and token, 4 per frozen one (LoRA: no gradient of the weight), attention 3.5
    times its forward pass (the backward pass forms the scores again).
    """

    def cost(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * (6 if p.requires_grad else 4) for p in parameters if p.dim() == 2)

    model = inner(model)
    embeddings = cost([model.get_input_embeddings().weight])
    body = cost(model.base_model.parameters()) - embeddings
    last_mlp = cost([m.mlp for m in model.base_model.modules() if hasattr(m, "mlp")][-1].parameters())
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim
    tokens = heads = pairs = 0
    for prompt, responses in _trees(rows).items():
        p = len(prompt) // 4
        fed = np.array([len(r) // 4 - 1 for r in responses])
        tokens += p + fed.sum()
        heads += 1 + fed.sum()
        pairs += p * (p + 1) / 2 + (fed * p + fed * (fed + 1) / 2).sum()
    weights = (body - last_mlp) * tokens + (last_mlp + embeddings) * heads
    return weights + 3.5 * attention * pairs


def _trees(rows: Sequence[Row]) -> dict[bytes, set[bytes]]:
    """Distinct prompts (int32 bytes) with their distinct responses."""
    trees: dict[bytes, set[bytes]] = {}
    for row in rows:
        trees.setdefault(row.prompt.tobytes(), set()).update(r.tobytes() for r in row.responses)
    return trees


def padding(rows: Sequence[Row], micro: int) -> float:
    """Positions of padded rows over real tokens, when ``micro`` rows share a width."""
    padded = real = 0
    for start in range(0, len(rows), micro):
        lengths = [len(row.prompt) + len(r) for row in rows[start : start + micro] for r in row.responses]
        padded += max(lengths) * len(lengths)
        real += sum(lengths)
    return padded / real
