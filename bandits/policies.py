"""Small policies whose parameters carry a leading replicate dimension R: all seeds of an arm train in one pass.

Parameters are ``dict[str, Tensor (R, ...)]``; replicate r never sees the others. Randomness comes from one NumPy
generator per replicate, so a seed's prompts, start and draws do not depend on which seeds run beside it (its later path
does, by rounding, which Adam's sign-like first steps amplify).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Params = dict[str, Tensor]
Generators = Sequence[np.random.Generator]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(R, B, I) x (R, I, O) -> (R, B, O)."""
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """(R, B, C) with a gain and bias (R, C) per replicate."""
    return F.layer_norm(x, x.shape[-1:]) * gain.unsqueeze(1) + bias.unsqueeze(1)


def stack(draws: Sequence[np.ndarray], dtype: torch.dtype) -> Tensor:
    """One array per replicate -> (R, ...)."""
    return torch.from_numpy(np.stack(draws)).to(dtype)


def trainable(params: Params) -> Params:
    """A copy that asks for gradients."""
    return {name: p.detach().clone().requires_grad_(True) for name, p in params.items()}


def frozen(params: Params) -> Params:
    """A copy without gradients."""
    return {name: p.detach().clone() for name, p in params.items()}


def sample_categorical(probs: Tensor, num: int, rngs: Generators) -> Tensor:
    """(R, B, V) probabilities -> (R, B, num) draws by inversion, uniforms from each replicate's generator."""
    cdf = probs.detach().double().cumsum(-1)
    uniform = stack([rng.random((probs.shape[1], num)) for rng in rngs], torch.float64)
    # the last cumulative sum may fall short of 1 by rounding
    return torch.searchsorted(cdf, uniform * cdf[..., -1:], right=True).clamp_(max=probs.shape[-1] - 1)


@dataclass(frozen=True)
class MLP:
    """The 100-50-256-256-100 network of Tajwar et al. 2024: LayerNorm and a non-linearity after the first layer, then ReLU.

    Xavier-uniform weights with gain 0.01 and zero biases, so the initial policy is uniform. ``first`` is relu for discrete
    actions, tanh for continuous ones.
    """

    inputs: int = 100
    hidden: tuple[int, ...] = (50, 256, 256)
    outputs: int = 100
    gain: float = 0.01
    first: Literal["relu", "tanh"] = "relu"

    def init(self, rngs: Generators, dtype: torch.dtype = torch.float32) -> Params:
        widths = (self.inputs, *self.hidden, self.outputs)
        params: Params = {}
        for i, (fan_in, fan_out) in enumerate(pairwise(widths)):
            bound = self.gain * (6.0 / (fan_in + fan_out)) ** 0.5
            params[f"w{i}"] = stack([rng.uniform(-bound, bound, (fan_in, fan_out)) for rng in rngs], dtype)
            params[f"b{i}"] = torch.zeros(len(rngs), fan_out, dtype=dtype)
        params["norm_gain"] = torch.ones(len(rngs), self.hidden[0], dtype=dtype)
        params["norm_bias"] = torch.zeros(len(rngs), self.hidden[0], dtype=dtype)
        return params

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """(R, B, inputs) -> (R, B, outputs)."""
        x = linear(x, params["w0"], params["b0"])
        x = layer_norm(x, params["norm_gain"], params["norm_bias"])
        x = F.relu(x) if self.first == "relu" else torch.tanh(x)
        last = len(self.hidden)
        for i in range(1, last):
            x = F.relu(linear(x, params[f"w{i}"], params[f"b{i}"]))
        return linear(x, params[f"w{last}"], params[f"b{last}"])


@dataclass(frozen=True)
class Transformer:
    """minGPT's "gpt-nano" (3 layers, 3 heads, width 48), pre-LN, learned positions, untied head without bias.

    A sequence is one prompt token and ``num_tokens`` response tokens. Token t is scored with the logits of position
    t - 1 and the prompt is never scored. ``legacy_logps`` scores it instead with the logits of position t, which have
    already attended to token t, and counts the prompt too: the published code does so, and it is kept only to measure
    what that changes.

    Dropout is applied only where a generator is passed for it: never when sampling, scoring for the record, or in
    the reference.
    """

    vocabulary: int = 100
    num_tokens: int = 9
    layers: int = 3
    heads: int = 3
    width: int = 48
    dropout: float = 0.0
    legacy_logps: bool = False

    def init(self, rngs: Generators, dtype: torch.dtype = torch.float32) -> Params:
        c, residual = self.width, 0.02 / (2 * self.layers) ** 0.5

        def normal(scale: float, *shape: int) -> Tensor:
            return stack([rng.normal(0.0, scale, shape) for rng in rngs], dtype)

        def constant(value: float, *shape: int) -> Tensor:
            return torch.full((len(rngs), *shape), value, dtype=dtype)

        params = {
            "tokens": normal(0.02, self.vocabulary, c),
            "positions": normal(0.02, self.num_tokens + 1, c),
            "head": normal(0.02, c, self.vocabulary),
            "norm_gain": constant(1.0, c),
            "norm_bias": constant(0.0, c),
        }
        for i in range(self.layers):
            for name, scale, fan_in, fan_out in (
                ("qkv", 0.02, c, 3 * c),
                ("proj", residual, c, c),
                ("up", 0.02, c, 4 * c),
                ("down", residual, 4 * c, c),
            ):
                params[f"{i}.{name}.w"] = normal(scale, fan_in, fan_out)
                params[f"{i}.{name}.b"] = constant(0.0, fan_out)
            for name in ("norm1", "norm2"):
                params[f"{i}.{name}.gain"] = constant(1.0, c)
                params[f"{i}.{name}.bias"] = constant(0.0, c)
        return params

    def logits(self, params: Params, ids: Tensor, rngs: Generators | None = None) -> Tensor:
        """(R, B, T) ids -> (R, B, T, V). ``rngs``: one generator per replicate, switches dropout on."""
        r, b, t = ids.shape
        c, v = self.width, self.vocabulary

        def drop(x: Tensor) -> Tensor:
            if rngs is None or self.dropout == 0:
                return x
            keep = stack([rng.random(x.shape[1:], dtype=np.float32) for rng in rngs], x.dtype) >= self.dropout
            return x * keep / (1 - self.dropout)

        def norm(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, params[f"{name}.gain"], params[f"{name}.bias"])

        def dense(x: Tensor, name: str) -> Tensor:
            return linear(x, params[f"{name}.w"], params[f"{name}.b"])

        offset = (torch.arange(r) * v).view(r, 1, 1)
        x = F.embedding(ids + offset, params["tokens"].reshape(r * v, c))  # (R, B, T, C)
        x = drop((x + params["positions"][:, None, :t]).reshape(r, b * t, c))
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        for i in range(self.layers):
            qkv = dense(norm(x, f"{i}.norm1"), f"{i}.qkv").view(r * b, t, 3, self.heads, c // self.heads)
            q, k, value = qkv.permute(2, 0, 3, 1, 4)  # each (R * B, heads, T, C / heads)
            scores = (q @ k.transpose(-1, -2)) * (c // self.heads) ** -0.5
            attention = scores.masked_fill(~causal, float("-inf")).softmax(-1)
            attention = drop(attention.view(r, -1)).view(attention.shape)
            mixed = (attention @ value).transpose(1, 2).reshape(r, b * t, c)
            x = x + drop(dense(mixed, f"{i}.proj"))
            x = x + drop(
                dense(F.gelu(dense(norm(x, f"{i}.norm2"), f"{i}.up"), approximate="tanh"), f"{i}.down")
            )
        x = layer_norm(x, params["norm_gain"], params["norm_bias"])
        return linear(x, params["head"], None).view(r, b, t, v)

    def next_token_logps(self, params: Params, prompts: Tensor, actions: Tensor) -> Tensor:
        """(R, B) prompts, (R, B, T) actions -> (R, B, T, V): law of each response token given what precedes it."""
        ids = torch.cat((prompts.unsqueeze(-1), actions[..., :-1]), -1)
        return self.logits(params, ids).log_softmax(-1)

    def token_logps(
        self, params: Params, prompts: Tensor, actions: Tensor, rngs: Generators | None = None
    ) -> Tensor:
        """(R, B) prompts, (R, B, T) actions -> (R, B, T) log-probs of the response tokens ((R, B, T + 1) if legacy)."""
        ids = torch.cat((prompts.unsqueeze(-1), actions), -1)
        if self.legacy_logps:
            return self.logits(params, ids, rngs).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        logps = self.logits(params, ids[..., :-1], rngs).log_softmax(-1)
        return logps.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def sample(self, params: Params, prompts: Tensor, num: int, rngs: Generators) -> Tensor:
        """(R, B) prompts -> (R, B, num, T) responses: ancestral, temperature 1, no dropout."""
        r, b = prompts.shape
        ids = prompts.repeat_interleave(num, 1).unsqueeze(-1)  # (R, B * num, 1)
        for _ in range(self.num_tokens):
            probs = self.logits(params, ids)[:, :, -1].softmax(-1)
            ids = torch.cat((ids, sample_categorical(probs, 1, rngs)), -1)
        return ids[..., 1:].view(r, b, num, self.num_tokens)
