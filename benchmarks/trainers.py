"""The contestants: one optimizer step of preference training each, on the same rows, with the same losses.

original   the step of the original DPO repository: chosen and rejected concatenated in one padded batch, logits of every
           position, float32 log-softmax over them, a live reference model, torch's for-loop AdamW
padded     the same forward pass with the fused optimizer
shared     our Scorer, a live reference behind a Scorer of its own, the fused optimizer
ours       our Scorer, reference log-probs computed once before training, the fused optimizer
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.workloads import Workload, build_model
from data.schema import Batch, Row
from engine.scoring import Scorer
from losses.types import Scored
from utils import global_rng_untouched


@dataclass(frozen=True)
class Contestant:
    """What distinguishes the contestants."""

    forward: Literal["full_logits", "scorer"]
    reference: Literal["live", "cached"]
    optimizer: Literal["loop", "fused"]


CONTESTANTS = {
    "original": Contestant("full_logits", "live", "loop"),
    "padded": Contestant("full_logits", "live", "fused"),
    "shared": Contestant("scorer", "live", "fused"),
    "ours": Contestant("scorer", "cached", "fused"),
}


class FullLogits(nn.Module):
    """Log-probs from a padded batch of all responses and the logits of all its positions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, roles: Sequence[str]) -> Scored:
        """As `engine.scoring.Scorer.forward`."""
        where = batch.positions(roles)
        device = next(self.model.parameters()).device
        example = batch.example[where]
        rows = [torch.from_numpy(batch.responses[i]).long() for i in where]
        prompts = [torch.from_numpy(batch.prompts[int(e)]).long() for e in example]
        ids = _right_padded([torch.cat(pair) for pair in zip(prompts, rows, strict=True)], 0).to(device)
        mask = _right_padded([torch.ones(len(p) + len(r)) for p, r in zip(prompts, rows, strict=True)], 0).to(
            device
        )
        scored = [
            torch.cat([torch.zeros(len(p)), torch.ones(len(r))]) for p, r in zip(prompts, rows, strict=True)
        ]
        is_response = _right_padded(scored, 0).to(device)[:, 1:]
        logits = self.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.to(
            torch.float32
        )
        per_token = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
        return Scored(
            logps=(per_token * is_response).sum(-1),
            num_tokens=is_response.sum(-1).long(),
            roles=tuple(batch.roles[i] for i in where),
            example=example.to(device),
            num_examples=len(batch),
        )


def _right_padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def with_adapter(model: nn.Module) -> nn.Module:
    """``model`` with trained LoRA adapters (rank 8) on every linear layer of its blocks, the same ones every time."""
    from peft import LoraConfig, get_peft_model

    with global_rng_untouched(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*is_gradient_checkpointing.*", FutureWarning
        )  # peft 0.21's, of transformers
        torch.manual_seed(0)
        return get_peft_model(
            model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        )


class Trainer:
    """A contestant with its model, reference and optimizer."""

    def __init__(
        self,
        contestant: Contestant,
        workload: Workload,
        config: dict,
        *,
        device: torch.device,
        micro: int,
        autocast: bool,
        lora: bool = False,
    ) -> None:
        self.workload, self.device, self.micro, self.autocast = workload, device, micro, autocast
        self.model = build_model(config, 0, device).train()
        if lora:
            self.model = with_adapter(self.model)
        wrap = Scorer if contestant.forward == "scorer" else FullLogits
        self.policy = wrap(self.model)
        # like a finetuned policy's reference, it differs from the policy: losses then tell wrong references apart
        reference = build_model(config, 1, device).eval().requires_grad_(False)
        self.reference: nn.Module | None = wrap(reference)
        self.cached = contestant.reference == "cached"
        self.cache: dict[tuple[str, ...], Scored] = {}
        how = {"fused": True} if contestant.optimizer == "fused" else {"foreach": False, "fused": False}
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, **how)

    def _batches(self, rows: Sequence[Row]) -> list[Batch]:
        return [Batch.collate(rows[i : i + self.micro]) for i in range(0, len(rows), self.micro)]

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def fill_cache(self, steps: Sequence[Sequence[Row]]) -> float:
        """Score every step's rows with the reference, once, then drop it; seconds. Nothing to do for a live reference."""
        start = time.perf_counter()
        if self.cached:
            with torch.no_grad(), self._cast():
                for batch in (b for rows in steps for b in self._batches(rows)):
                    self.cache[batch.uids] = self.reference(batch, self.workload.roles)
            self.reference = None
        return time.perf_counter() - start

    def step(self, rows: Sequence[Row]) -> float:
        """One optimizer step on ``rows``; the mean loss."""
        total = torch.zeros((), device=self.device)
        for batch in self._batches(rows):
            with self._cast():
                policy = self.policy(batch, self.workload.roles)
                if self.cached:
                    reference = self.cache[batch.uids]
                else:
                    with torch.no_grad():
                        reference = self.reference(batch, self.workload.roles)
            loss = self.workload.loss(policy, reference, batch).losses.sum() / len(rows)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.trained, 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()
