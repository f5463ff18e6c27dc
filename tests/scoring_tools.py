"""Tiny models of several architectures, ragged batches, and log-probs from plain Hugging Face forward passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from data.schema import Batch

VOCAB = 61
_GPT = {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

# Heads, key-value heads, tied embeddings, learned or rotary positions, biases: each differs somewhere
CONFIGS = {
    "llama": lambda: LlamaConfig(**_LLAMA, **_SPECIAL, num_key_value_heads=2),
    "gpt2": lambda: GPT2Config(**_GPT, **_SPECIAL, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
    "gpt_neox": lambda: GPTNeoXConfig(**_LLAMA, **_SPECIAL),
    "gemma": lambda: GemmaConfig(**_LLAMA, **_SPECIAL, num_key_value_heads=1, head_dim=8),
    "qwen2": lambda: Qwen2Config(**_LLAMA, **_SPECIAL, num_key_value_heads=2),
    "gptj": lambda: GPTJConfig(
        **_GPT, **_SPECIAL, rotary_dim=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
    ),
    "bloom": lambda: BloomConfig(
        **_SPECIAL,
        vocab_size=VOCAB,
        hidden_size=16,
        n_layer=2,
        n_head=4,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    ),
    "gemma2": lambda: Gemma2Config(
        **_LLAMA,
        **_SPECIAL,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=32,
        final_logit_softcapping=3.0,
    ),
    "mistral": lambda: MistralConfig(**_LLAMA, **_SPECIAL, num_key_value_heads=2, sliding_window=9),
}


def _exact_norm(norm: nn.Module) -> None:
    """transformers computes RMS norms in float32 whatever the model's dtype: here in the dtype of their input."""
    centre = 1.0 if "Gemma" in type(norm).__name__ else 0.0
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    norm.forward = lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * (centre + norm.weight)


def make_model(
    kind: str,
    auto: type = AutoModelForCausalLM,
    dtype: torch.dtype = torch.float64,
    exact_norms: bool = True,
    **changes: object,
) -> nn.Module:
    """Weights large enough that a wrong mask or position shows at once. ``changes``: keys of the model's config."""
    config = CONFIGS[kind]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        model = auto.from_config(config).to(dtype)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw, dtype=torch.float64).to(dtype)
            p.copy_(noise * 0.1 + 1.0 if "norm" in name or "ln_" in name else noise * 0.3)
    for module in model.modules():
        if exact_norms and type(module).__name__.endswith("RMSNorm"):
            _exact_norm(module)
    return model.train()


def make_batch(prompts: Sequence[Sequence[int]], rows: Sequence[tuple[int, str, Sequence[int]]]) -> Batch:
    """Batch of ``prompts`` and (example, role, response ids)."""
    b = len(prompts)
    return Batch(
        uids=tuple(f"t:{i}" for i in range(b)),
        group=torch.zeros(b, dtype=torch.long),
        weight=torch.ones(b),
        prompts=tuple(np.array(p, np.int32) for p in prompts),
        responses=tuple(np.array(r, np.int32) for _, _, r in rows),
        example=torch.tensor([e for e, _, _ in rows], dtype=torch.long),
        roles=tuple(role for _, role, _ in rows),
    )


def ragged_batch() -> Batch:
    """Two examples with one prompt and a response in common, a one-token prompt, one-token responses, a lone response."""
    prompts = [[5, 9, 2, 7, 3], [11], [5, 9, 2, 7, 3], [8, 8, 20, 1]]
    a, b, c = [4, 30, 12, 2], [6], [40, 41, 42, 43, 44, 2]
    rows = [
        (0, "chosen", a),
        (0, "rejected", b),
        (1, "chosen", c),
        (1, "rejected", [2]),
        (2, "chosen", c),
        (2, "rejected", a),
        (3, "chosen", [17, 18]),
        (3, "rejected", [17, 18]),
        (3, "aux_1", [19, 2, 5]),
    ]
    return make_batch(prompts, rows)


def plain_logps(model: nn.Module, batch: Batch, roles: Sequence[str]) -> list[Tensor]:
    """Token log-probs of each selected response: one unpadded row, the model's own forward pass, all logits."""
    pieces = []
    for i in batch.positions(roles):
        prompt = torch.tensor(batch.prompts[int(batch.example[i])], dtype=torch.long)
        response = torch.tensor(batch.responses[i], dtype=torch.long)
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
        logps = logits.log_softmax(-1)
        pieces.append(
            torch.stack([logps[len(prompt) - 1 + j, token] for j, token in enumerate(response.tolist())])
        )
    return pieces


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradient of every parameter (zeros where none arrived)."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named, grads, strict=True)}


def largest_gap(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Largest absolute difference of two gradient dictionaries."""
    assert ours.keys() == theirs.keys()
    return max((ours[n] - theirs[n]).abs().max().item() for n in ours)
