"""Samples of the policy and the reference at evaluations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from data.schema import Row
from engine import models, sampling
from engine.lora import adapter_off
from engine.parallel import unsharded
from utils import stream


class Sampler:
    """Responses to a fixed set of held-out prompts: of the policy at every evaluation, of the reference once.

    The prompts, and each prompt's draws, are functions of the seed alone, so tables of different steps compare.

    reference  gives the Scorer of the frozen reference (unused for LoRA, whose adapter is switched off); None: no reference
    write      takes (examples, rows): rows have model, uid, group, prompt, sample, finished
    """

    def __init__(
        self,
        *,
        rows: Sequence[Row],
        groups: Sequence[str],
        tokenizer: Any,
        reference: Callable[[], nn.Module] | None,
        write: Callable[[int, list[dict[str, Any]]], None],
        num_prompts: int,
        max_new_tokens: int,
        batch_size: int,
        seed: int,
    ) -> None:
        unique = list({row.prompt_key: row for row in rows}.values())
        order = stream(0, "sampled prompts").permutation(len(unique))[:num_prompts]
        self.rows = [unique[i] for i in order]
        self.groups, self.tokenizer, self.reference, self.write = groups, tokenizer, reference, write
        self.max_new_tokens, self.batch_size, self.seed = max_new_tokens, batch_size, seed
        self._reference_rows: list[dict[str, Any]] | None = None

    def __call__(self, scorer: nn.Module, examples: int) -> None:
        rows = self._draw(scorer, "policy")
        if self.reference is not None:
            if self._reference_rows is None:
                if models.is_peft(scorer.model):
                    with adapter_off(scorer.model):
                        self._reference_rows = self._draw(scorer, "reference")
                else:
                    self._reference_rows = self._draw(self.reference(), "reference")
            rows = rows + self._reference_rows
        self.write(examples, rows)

    def _draw(self, scorer: nn.Module, name: str) -> list[dict[str, Any]]:
        with unsharded(scorer):
            drawn = sampling.generate(
                scorer.model,
                self.tokenizer,
                [row.prompt for row in self.rows],
                max_new_tokens=self.max_new_tokens,
                seed=self.seed,
                keys=[(row.uid, name) for row in self.rows],
                batch_size=self.batch_size,
            )
        return [
            {
                "model": name,
                "uid": row.uid,
                "group": self.groups[row.group],
                "prompt": self.tokenizer.decode(row.prompt, skip_special_tokens=True),
                "sample": self.tokenizer.decode(sample.ids, skip_special_tokens=True),
                "finished": sample.finished,
            }
            for row, sample in zip(self.rows, drawn, strict=True)
        ]
