"""Generation from a policy: the only place where tokens are drawn.

Every response has its own random stream, a function of (seed, its key), and a token is the inverse of the conditional
distribution function at that stream's next uniform number, in float64. So what is drawn for a prompt does not depend on the
other prompts, their order or the batch size (up to rounding of the logits), and nothing touches a global generator.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from engine.compilation import uncompiled
from utils import UserError, stream


@dataclass(frozen=True)
class Sample:
    """ids (R,) int32, the stop token last if the model produced one; finished: whether it did."""

    ids: np.ndarray
    finished: bool


def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[np.ndarray],
    *,
    max_new_tokens: int | Sequence[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int,
    keys: Sequence[tuple[int | str, ...]],
    batch_size: int,
    stop_ids: Iterable[int] | None = None,
) -> list[Sample]:
    """One response per prompt, in the order of ``prompts``.

    prompts      token ids with BOS where the tokenizer's rule wants it; never empty
    max_new_tokens  for every prompt, or one number per prompt
    temperature  divides the logits; 0: the most probable token (lowest id among equals), no randomness
    top_p        keep the smallest set of most probable tokens whose probability reaches it (Holtzman et al. 2020); 1: all
    top_k        keep the k most probable tokens before top_p; None: all
    keys         one unique key per prompt, e.g. (uid, 3) for its third response; with ``seed`` it fixes the draws
    batch_size   responses generated together; changes speed and memory only
    stop_ids     tokens that end a response; None: the tokenizer's EOS and those of the model's generation config

    A response ends with a stop token only if the model produced it; one cut at ``max_new_tokens`` has finished=False.
    Equal prompts of a batch are read once. The training mode of every module is as before on return.
    """
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    _check(model, prompts, keys, limits, temperature, top_p, top_k, batch_size)
    stops = torch.tensor(
        sorted(_stop_ids(model, tokenizer) if stop_ids is None else set(stop_ids)), dtype=torch.long
    )
    # longest first, equal prompts side by side
    order = sorted(
        range(len(prompts)), key=lambda i: (-len(prompts[i]), np.asarray(prompts[i], np.int64).tobytes())
    )
    samples: list[Sample | None] = [None] * len(prompts)
    with torch.no_grad(), _eval_mode(model), uncompiled(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(limits[i] for i in chosen)
            uniforms = np.stack([stream(seed, "sample", *keys[i]).random(longest) for i in chosen])
            limit = torch.tensor([limits[i] for i in chosen])
            batch = [np.asarray(prompts[i], np.int64) for i in chosen]
            drawn = _generate_batch(
                model, batch, torch.from_numpy(uniforms), limit, stops, temperature, top_p, top_k
            )
            for i, sample in zip(chosen, drawn, strict=True):
                samples[i] = sample
    return samples


def _check(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    keys: Sequence[tuple],
    limits: Sequence[int],
    temperature: float,
    top_p: float,
    top_k: int | None,
    batch_size: int,
) -> None:
    if min(limits, default=1) < 1 or batch_size < 1:
        raise UserError(
            f"max_new_tokens={min(limits, default=1)} batch_size={batch_size}: both must be at least 1"
        )
    if len(limits) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many limits, not {len(limits)}")
    if not temperature >= 0:
        raise UserError(f"temperature={temperature}: must be >= 0; 0 takes the most probable token")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be in (0, 1]; 1 keeps every token")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k={top_k}: must be at least 1, or null for every token")
    if len(keys) != len(prompts) or len(set(keys)) != len(keys):
        raise ValueError(
            f"{len(prompts)} prompts need as many keys, all different, or their responses would be tied"
        )
    if any(len(p) == 0 for p in prompts):
        raise ValueError("a prompt without tokens: there is nothing to condition on")
    # Hugging Face's name; some models have none
    positions = getattr(model.config, "max_position_embeddings", None)
    size, new = max(((len(p), n) for p, n in zip(prompts, limits, strict=True)), key=sum, default=(0, 0))
    if positions is not None and size + new > positions:
        raise UserError(
            f"max_new_tokens={new}: with a prompt of {size} tokens this passes the model's {positions} positions; "
            f"at most {max(positions - size, 0)} fit"
        )


def _stop_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Chat models end turns with tokens of their own, which their generation config lists."""
    listed = (
        getattr(model.generation_config, "eos_token_id", None)
        if hasattr(model, "generation_config")
        else None
    )
    more = [listed] if isinstance(listed, int) else list(listed or ())
    return {tokenizer.eos_token_id, *more}


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _generate_batch(
    model: nn.Module,
    prompts: list[np.ndarray],
    uniforms: Tensor,
    limits: Tensor,
    stops: Tensor,
    temperature: float,
    top_p: float,
    top_k: int | None,
) -> list[Sample]:
    """uniforms (B, largest limit) float64 and limits (B,) on the CPU. Rows leave the batch as they finish."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    cache = DynamicCache(config=model.config)
    logits, mask = _read_prompts(model, prompts, cache, device)
    drawn = torch.zeros(uniforms.shape, dtype=torch.long)
    num_drawn = torch.zeros(len(prompts), dtype=torch.long)
    finished = torch.zeros(len(prompts), dtype=torch.bool)
    alive = torch.arange(
        len(prompts)
    )  # rows of the batch that are still in ``logits``, ``mask`` and ``cache``
    for t in range(uniforms.shape[1]):
        tokens = next_tokens(logits, uniforms[alive, t], temperature, top_p, top_k)
        drawn[alive, t] = tokens.cpu()
        num_drawn[alive] = t + 1
        finished[alive] = torch.isin(drawn[alive, t], stops)
        going = ~finished[alive] & (t + 1 < limits[alive])
        if not going.any():
            break
        if not going.all():
            keep = going.to(device)
            cache.batch_select_indices(keep.nonzero().squeeze(1))
            tokens, mask, alive = tokens[keep], mask[keep], alive[going]
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=(lengths[alive.to(device)] + t)[:, None],
            **{_cache_name(model): cache},
            use_cache=True,
        ).logits[:, -1]
    ids = drawn.numpy().astype(np.int32)
    return [Sample(ids[i, : num_drawn[i]].copy(), bool(finished[i])) for i in range(len(prompts))]


def _cache_name(model: nn.Module) -> str:
    """What forward calls its cache: transformers renamed it in 5.24, and warns about the older name."""
    base = (
        model.get_base_model() if hasattr(model, "get_base_model") else model
    )  # PEFT's own forward takes anything
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def _read_prompts(
    model: nn.Module, prompts: list[np.ndarray], cache: DynamicCache, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Fill the cache; (next-token logits (B, V), attention mask (B, P)). Each different prompt is read once."""
    unique: dict[bytes, int] = {}
    which = [unique.setdefault(p.tobytes(), len(unique)) for p in prompts]
    texts = [np.frombuffer(text, np.int64) for text in unique]
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)  # what fills the left is masked: any id will do
    mask = torch.zeros(len(texts), width, dtype=torch.long)
    for i, text in enumerate(texts):
        ids[i, width - len(text) :] = torch.from_numpy(text.copy())
        mask[i, width - len(text) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    # learned positions are wrong under left padding without these; the padding's own do not matter
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        **{_cache_name(model): cache},
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    if len(texts) < len(prompts):
        index = torch.tensor(which, device=device)
        cache.batch_select_indices(index)
        return logits[index], mask[index]
    return logits, mask


def next_tokens(
    logits: Tensor, uniforms: Tensor, temperature: float, top_p: float, top_k: int | None
) -> Tensor:
    """(B, V) logits, (B,) numbers in [0, 1) -> (B,) token ids: the first token where the distribution function exceeds u.

    Tokens are in the order of their ids, so a small change of the logits moves few draws.
    """
    if torch.isnan(logits).any() or torch.isposinf(logits).any():
        raise ValueError("the model's logits are not finite: cannot draw a token")
    if temperature == 0:
        return logits.argmax(dim=1)
    device = logits.device
    if device.type == "mps":
        logits = logits.cpu()  # it has no float64
    probs = (logits.double() / temperature).softmax(dim=1)
    if (top_k is not None and top_k < probs.shape[1]) or top_p < 1:
        probs = _truncated(probs, top_p, top_k)
    cumulative = probs.cumsum(dim=1)
    total = cumulative[:, -1:].contiguous()
    target = uniforms.to(cumulative)[:, None] * total
    drawn = torch.searchsorted(cumulative, target, right=True)
    # u * total may round up to total: then the last token with any probability
    return torch.minimum(drawn, torch.searchsorted(cumulative, total)).squeeze(1).to(device)


def _truncated(probs: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """(B, V) -> (B, V), zero outside the kept tokens, not renormalised."""
    values, order = probs.sort(dim=1, descending=True, stable=True)
    if top_k is not None:
        values[:, top_k:] = 0
    if top_p < 1:
        before = values.cumsum(1) - values
        values[before >= top_p * values.sum(1, keepdim=True)] = 0
    return torch.zeros_like(probs).scatter(1, order, values)
