"""The Scorer: the only place where a model's hidden states become log-probs, rewards or embeddings of responses.

A batch holds ragged token ids. How they become rows is decided here (`engine.layouts`), and every layout gives the same
numbers, to rounding: what combines, and is computed nowhere twice, is

- every distinct prompt once, with its distinct responses as branches (`engine.attention`), without padding;
- the vocabulary head only where a response token is predicted, in tiles of reused memory (`engine.head`);
- no host-device synchronisation: index arithmetic is NumPy, and one copy takes it to the device.

Wrap this module (DDP, FSDP, compile), not the model: nothing calls the model's body outside `Scorer.forward`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from data.schema import Batch
from engine import attention, head
from engine.layouts import Layout, padded, ragged_arange, shared_prefix
from losses.types import Scored
from utils import UserError

LayoutName = Literal["padded", "shared_prefix"]
Output = Literal["logps", "reward", "embedding"]
SCORE_HEAD = "score"  # transformers' name of the head of its sequence classifiers

# Nats per token by which two correct ways of scoring a few tokens may differ. A wrong mask shows as 0.01 to 0.3 even on
# tiny random models. float64: Gemma's norms compute in float32 inside.
PROBE_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
PROBE_TOLERANCE_HALF = 0.25
PROBE_TOLERANCE_TF32 = 2e-2

# FSDP looks for output tensors through torch's pytrees to start its backward hooks
pytree.register_dataclass(Scored)


class Scorer(nn.Module):
    """Scores the responses of a `Batch` with a Hugging Face model.

    model            a causal language model; for ``output`` "reward" or "embedding" a sequence classifier (1 or D labels).
                     Or a PeftModel around one
    layout           "shared_prefix", or "padded" where that is asked for or the model needs it
    fallback_reason  why ``layout`` is "padded" although "shared_prefix" was asked for; else None
    output           what the head gives
    chunk_tokens     rows of a tile of the vocabulary head; None: what suits the device
    keep_bytes       memory for exponentials kept from the forward to the backward pass, which saves a quarter of the
                     head's arithmetic for the tokens that fit; it does not grow with the batch. None: what suits the
                     device (256 MiB, 1 GiB on CUDA)
    device           where it computes, if its parameters are to be moved there, or only lent to it (CPU offload);
                     None: where they are

    Raises UserError when the model's own logits cannot be reproduced from its hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: LayoutName = "shared_prefix",
        output: Output = "logps",
        chunk_tokens: int | None = None,
        keep_bytes: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        if layout not in ("padded", "shared_prefix"):
            raise UserError(f"scoring.layout={layout}: must be padded or shared_prefix")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise UserError(f"scoring.chunk_tokens={chunk_tokens}: must be at least 1, or null")
        self.model = model
        self.output: Output = output
        self.chunk_tokens = chunk_tokens
        self._device = device
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.workspace = head.Workspace(head.KEEP_BYTES[kind] if keep_bytes is None else keep_bytes)
        self.layout: LayoutName = "padded"
        self.fallback_reason: str | None = None
        self._flex = self.device.type == "cuda"
        self._window = _sliding_window(self._inner.config)
        self._dummy_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        if layout == "shared_prefix":
            self.fallback_reason = self._use_shared_prefix()
        self._check_head()

    # ------------------------------------------------------------------ the model's parts

    @property
    def _inner(self) -> nn.Module:
        """The Hugging Face model, inside its PeftModel if there is one (adapters are injected into its layers)."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device or next(self.model.parameters()).device

    # ------------------------------------------------------------------ scoring

    def forward(
        self, batch: Batch, roles: Sequence[str], tokens: bool = False, plain: bool = False
    ) -> Scored:
        """Score the responses of ``batch`` whose role is in ``roles``, in batch order.

        Every token of a response is scored, the first one from the prompt's last token. Roles that no response has are
        fine, also all of them.

        tokens  also give ``token_logps``
        plain   one padded row per response through the Hugging Face model's own forward pass with all logits: slow, large,
                and sharing nothing with the layouts; see `verify`
        """
        where = batch.positions(roles)
        responses = [batch.responses[i] for i in where]
        example = batch.example.numpy()[where]
        num_tokens = np.array([len(r) for r in responses], np.int64)
        if plain:
            logps, values, token_logps = self._plain(batch.prompts, responses, example)
        else:
            layout = self._lay_out(batch.prompts, responses, example)
            logps, values, token_logps = self._score(layout, tokens)
        example_t, num_tokens_t = self._to_device(example, num_tokens)
        return Scored(
            logps=logps,
            num_tokens=num_tokens_t,
            roles=tuple(batch.roles[i] for i in where),
            example=example_t,
            num_examples=len(batch),
            values=values,
            token_logps=token_logps if tokens else None,
        )

    def _lay_out(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], example: np.ndarray
    ) -> Layout:
        last = self.output != "logps"
        if self.layout == "shared_prefix":
            layout = shared_prefix(prompts, responses, example, last)
            # a window that reaches over the whole path masks nothing
            if self._window is None or layout.longest <= self._window:
                return layout
        return padded(prompts, responses, example, last)

    def _score(self, layout: Layout, tokens: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """-> logps (S,), values (S,) or (S, D) or None, token log-probs (sum of the responses' tokens,) or None."""
        starts = np.cumsum(layout.lengths) - layout.lengths
        lengths = layout.lengths[layout.unit]
        of_response = (
            np.repeat(starts[layout.unit], lengths) + ragged_arange(lengths) if tokens else lengths[:0]
        )
        ids, positions, at, row, target, unit, unit_lengths, token_of = self._to_device(
            layout.ids,
            layout.positions,
            layout.at,
            layout.row,
            layout.target,
            layout.unit,
            layout.lengths,
            of_response,
        )
        with _last_mlp_only_at(self._inner.base_model, at):
            hidden = self._hidden(layout, ids, positions).flatten(0, 1).index_select(0, at)
        if self.output != "logps":
            values = _floating(getattr(self._inner, SCORE_HEAD)(hidden)).index_select(0, unit)
            return values.new_empty(0), values[:, 0] if self.output == "reward" else values, None
        token_logps = self._target_logps(hidden, row, target)
        # summed in float64: a float32 sum of hundreds of terms loses the digits that a margin is made of
        summed = torch.segment_reduce(token_logps.double(), "sum", lengths=unit_lengths, unsafe=True)
        logps = summed.to(token_logps.dtype).index_select(0, unit)
        return logps, None, token_logps.index_select(0, token_of) if tokens else None

    def _hidden(self, layout: Layout, ids: Tensor, positions: Tensor) -> Tensor:
        """(N, L, H) last hidden states of the layout's rows."""
        if layout.blocks:
            # a four-dimensional mask is passed on untouched by transformers, and `tree_attention` does not look at it
            mask = self._dummy_mask = self._dummy_mask.to(ids.device)
            trees = attention.Trees(layout.blocks, ids.device, flex=self._flex)
            extra: dict[str, Any] = {"position_ids": positions, "trees": trees}
        else:
            (mask,) = self._to_device(layout.attention_mask)
            extra = {}
        return self._inner.base_model(
            input_ids=ids, attention_mask=mask, use_cache=False, **extra
        ).last_hidden_state

    def _target_logps(self, hidden: Tensor, row: Tensor, target: Tensor) -> Tensor:
        """(K,) log-probs of the ``target`` tokens from rows ``row`` of ``hidden`` (M, H)."""
        linear = self._inner.get_output_embeddings()
        scale, cap = (
            _logit_scale(self._inner.config),
            getattr(self._inner.config, "final_logit_softcapping", None),
        )
        if cap is None and type(linear) is nn.Linear:
            if scale != 1.0:
                hidden = hidden * scale
            return head.target_logps(
                hidden,
                linear.weight,
                linear.bias,
                row,
                target,
                workspace=self.workspace,
                chunk_tokens=self.chunk_tokens,
            )

        def logits(h: Tensor) -> Tensor:
            z = _floating(linear(h)) * scale
            return z if cap is None else cap * torch.tanh(z / cap)

        return head.module_logps(logits, hidden, row, target, self.chunk_tokens)

    def _plain(
        self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], example: np.ndarray
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows = [np.concatenate([prompts[e], r]) for e, r in zip(example, responses, strict=True)] or [
            np.zeros(1)
        ]
        width = max(len(r) for r in rows)
        ids = torch.tensor(
            np.stack([np.pad(r, (0, width - len(r))) for r in rows]), dtype=torch.long, device=self.device
        )
        mask = torch.tensor([[j < len(r) for j in range(width)] for r in rows], device=self.device).long()
        if self.output != "logps":
            hidden = self._inner.base_model(
                input_ids=ids, attention_mask=mask, use_cache=False
            ).last_hidden_state
            last = [len(r) - 1 for r in rows][: len(responses)]
            values = _floating(getattr(self._inner, SCORE_HEAD)(hidden[range(len(last)), last]))
            return values.new_empty(0), values[:, 0] if self.output == "reward" else values, None
        logits = _floating(self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
        pieces = [
            logits[i, len(prompts[e]) - 1 : len(prompts[e]) + len(r) - 1]
            .log_softmax(-1)
            .gather(1, y[:, None])[:, 0]
            for i, (e, r) in enumerate(zip(example, responses, strict=True))
            for y in [ids[i, len(prompts[e]) : len(prompts[e]) + len(r)]]
        ]
        none = logits.new_empty(0)
        return torch.stack([p.sum() for p in pieces]) if pieces else none, None, torch.cat([*pieces, none])

    def _to_device(self, *arrays: np.ndarray) -> list[Tensor]:
        """Arrays as int64 (bool stays bool) tensors on the model's device, in one asynchronous copy."""
        return attention.to_device(
            [a if len(arrays) == 1 else a.astype(np.int64) for a in arrays], self.device
        )

    # ------------------------------------------------------------------ what this model can do

    def _use_shared_prefix(self) -> str | None:
        """Switch the model to tree attention if it can be shown to work; else say why not and leave it as it was."""
        reason = _unable(self._inner)
        if reason is not None:
            return reason
        before = self._inner.config._attn_implementation
        self._inner.set_attn_implementation(attention.NAME)
        self.layout = "shared_prefix"
        reason = self._failure()
        if reason is None:
            return None
        self._inner.set_attn_implementation(before)
        self.layout = "padded"
        return reason

    def _failure(self) -> str | None:
        """What is wrong with the layout in use on a few tokens, or None."""
        try:
            gap, limit = self._probe(), self._probe_tolerance()
        except (TypeError, ValueError, RuntimeError) as error:
            return f"it fails on a small example ({type(error).__name__}: {str(error).splitlines()[0]})"
        if gap <= limit:
            return None
        return (
            f"its log-probs differ from those of separate rows by {gap:.1e} nats per token (limit {limit:g})"
        )

    def _check_head(self) -> None:
        """Raise when the padded layout cannot reproduce the model's own logits either."""
        if self.layout == "shared_prefix":
            return
        gap, limit = self._probe(), self._probe_tolerance()
        if not gap <= limit:
            raise UserError(
                f"model {type(self._inner).__name__}: its logits are not head(hidden states): log-probs differ by {gap:.1e} nats "
                f"per token (limit {limit:g}); this architecture is not supported"
            )

    def _probe(self) -> float:
        """Largest difference to plain scoring, in nats per token, on a few tokens; 0 where weights are not there yet."""
        parameters = list(self.model.parameters())
        if any(p.is_meta or hasattr(p, "full_tensor") for p in parameters):
            return 0.0
        vocab = self._inner.get_input_embeddings().weight.shape[0]
        ids = (7 * np.arange(1, 20) + 1) % vocab
        prompts = (ids[:4], ids[4:6])
        responses = (ids[6:9], ids[9:11], ids[6:9], ids[11:12], ids[12:17])
        batch = Batch(
            uids=("probe:0", "probe:1"),
            group=torch.zeros(2, dtype=torch.long),
            weight=torch.ones(2),
            prompts=prompts,
            responses=responses,
            example=torch.tensor([0, 0, 0, 1, 1]),
            roles=("probe",) * 5,
        )
        device, self._device = self._device, None  # where the parameters are now
        try:
            return _gap(*_both(self, batch, ("probe",))).max().item()
        finally:
            self._device = device

    def _probe_tolerance(self) -> float:
        first = next(self.model.parameters())
        dtype = first.dtype
        if dtype == torch.float32 and first.device.type == "cuda":
            return PROBE_TOLERANCE_TF32
        return PROBE_TOLERANCE.get(dtype, PROBE_TOLERANCE_HALF)


@contextlib.contextmanager
def _last_mlp_only_at(body: nn.Module, at: Tensor) -> Iterator[None]:
    """Nothing mixes positions after the last attention, so the last block's MLP runs at the positions ``at`` (M,) alone.

    What stands elsewhere in the body's output is then meaningless. Blocks without an MLP of the usual shape run in full, and
    so do blocks that are computed again in the backward pass, where these hooks are gone.
    """
    blocks = [m for m in body.modules() if isinstance(getattr(m, "mlp", None), nn.Module)]
    usual = blocks and type(blocks[-1].mlp).__name__.endswith("MLP")
    # Bloom's MLP takes the residual too
    usual = usual and len(inspect.signature(blocks[-1].mlp.forward).parameters) == 1
    if not usual or getattr(blocks[-1], "gradient_checkpointing", False):
        yield
        return
    shape: list[torch.Size] = []

    def narrow(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        shape.append(args[0].shape)
        return (args[0].flatten(0, 1).index_select(0, at)[None],)

    def widen(_: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        everywhere = out.new_zeros(shape[-1]).flatten(0, 1)
        return everywhere.index_copy(0, at, out[0]).view(shape[-1])

    hooks = blocks[-1].mlp.register_forward_pre_hook(narrow), blocks[-1].mlp.register_forward_hook(widen)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _floating(x: Tensor) -> Tensor:
    """float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _logit_scale(config: Any) -> float:
    """What transformers multiplies the head's output with: Cohere's ``logit_scale``, Granite's 1 / ``logits_scaling``."""
    return float(getattr(config, "logit_scale", None) or 1.0) / float(
        getattr(config, "logits_scaling", None) or 1.0
    )


def _sliding_window(config: Any) -> int | None:
    """Positions that some layer looks back at most, or None."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def _unable(inner: nn.Module) -> str | None:
    """Why a model cannot share prompts, from what it says about itself; None when it may be tried."""
    name = type(inner).__name__
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{name} does not use transformers' attention interface"
    if (implementation := inner.config._attn_implementation) not in ("sdpa", attention.NAME):
        return f"{name} runs with attn_implementation={implementation}; sharing prompts needs sdpa"
    kinds = set(getattr(inner.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or getattr(inner, "_is_stateful", False):
        return f"{name} has layers that are not plain attention ({', '.join(sorted(kinds)) or 'recurrent'})"
    if "position_ids" not in inspect.signature(inner.base_model.forward).parameters:
        return f"{name} takes no position ids"
    return None


# ---------------------------------------------------------------------------------------------- verification


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient; every submodule's own mode is restored."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, mode in modes:
            m.training = mode


def _both(scorer: Callable[..., Scored], batch: Batch, roles: Sequence[str]) -> tuple[Scored, Scored]:
    """(as the Scorer scores, as the plain model does)."""
    with _evaluating(scorer):
        return scorer(batch, roles), scorer(batch, roles, plain=True)


def _gap(ours: Scored, plain: Scored) -> Tensor:
    """(S,) differences: nats per response token, or the largest component of a reward or embedding."""
    if ours.values is not None:
        return (ours.values - plain.values).abs().reshape(len(ours.roles), -1).amax(1)
    return (ours.logps - plain.logps).abs() / ours.num_tokens


def verify(scorer: nn.Module, batch: Batch, roles: Sequence[str], tolerance: float) -> float:
    """Score ``batch`` with the layout in use and through the plain Hugging Face forward pass with all logits.

    scorer     a Scorer, or a wrapper (DDP, FSDP) of one; under a wrapper call this on every rank
    tolerance  nats per response token; for rewards and embeddings their own unit
    returns    the largest difference found, 0.0 for an empty selection

    Raises UserError past the tolerance.
    """
    ours, plain = _both(scorer, batch, roles)
    gaps = _gap(ours, plain)
    if not len(gaps):
        return 0.0
    worst = int(gaps.nan_to_num(torch.inf).argmax())
    if not gaps[worst] <= tolerance:
        a, b = (s.logps if s.values is None else s.values for s in (ours, plain))
        uid = batch.uids[int(ours.example[worst])]
        raise UserError(
            f"scoring.layout: {uid}, {ours.roles[worst]}: scored {a[worst].tolist()} but {b[worst].tolist()} by the plain model "
            f"({gaps[worst].item():.2e} per token, scoring.tolerance={tolerance:g}); use scoring.layout=padded, or a larger "
            "tolerance if the model runs in half precision"
        )
    return gaps[worst].item()
