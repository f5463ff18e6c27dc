"""The models of a run: the policy as it is trained, the reference, and what draws and judges fresh pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from config.compose import Run, recorded
from data.plan import micro_batches
from data.schema import Batch, Row
from engine import compilation, models, parallel, preferences, reference, runtime, scoring
from engine.fresh_pairs import FreshPairs, FunctionPreference
from engine.model_spec import ModelSpec
from engine.parallel import World
from engine.preferences import load_function
from engine.selection import row_losses
from losses.types import Loss
from run_data import Data
from trainers import autocast
from utils import UserError, log

HOLDOUT_TOKENS = 16384  # tokens scored together when all training rows are
disable_progress_bar()  # of every small file that transformers writes


def build_scorer(
    run: Run, model: torch.nn.Module, output: models.Output | None = None, device: torch.device | None = None
) -> scoring.Scorer:
    """``output``: what the model's head gives; None: what the loss needs of the policy. ``device``: as in `scoring.Scorer`."""
    s, output = run.config.scoring, output or run.loss.needs.output
    scorer = scoring.Scorer(model, layout=s.layout, output=output, chunk_tokens=s.chunk_tokens, device=device)
    if run.config.compile:
        compilation.compile_blocks(model, run.model.block_name)
    if scorer.fallback_reason:
        log.info("scoring.layout=%s is not possible here, using padded: %s", s.layout, scorer.fallback_reason)
    return scorer


def verify_scorer(run: Run, scorer: scoring.Scorer, rows: Sequence[Row]) -> None:
    """Score a first few rows both ways; refuse to go on past the tolerance."""
    if run.config.scoring.verify and rows:
        exact = next(scorer.parameters()).dtype == torch.float64 and run.model.fsdp_policy_mp is None
        tolerance = 1e-9 if exact else run.config.scoring.tolerance
        with runtime.full_float32():
            gap = scoring.verify(scorer, Batch.collate(list(rows[:4])), run.loss.needs.policy, tolerance)
        log.info(
            "scoring: %s agrees with plain full-logits scoring to %.1e nats per token", scorer.layout, gap
        )


class RunModels:
    """Builds each model of a run once, when it is first asked for, where the world wants it."""

    def __init__(self, run: Run, world: World, tokenizer: Any, data: Data) -> None:
        self.config, self.spec, self.loss = run.config, run.model, run.loss
        self.run, self.world, self.tokenizer, self.data = run, world, tokenizer, data
        self.reference_weights: str | None = None  # hashes, once they are known
        self.preference_weights: str | None = None

    def build_policy(self, device: torch.device | str) -> torch.nn.Module:
        return models.build_policy(
            self.spec,
            archive=self.spec.archive,
            output=self.loss.needs.output,
            dim=self.loss.needs.dim,
            seed=self.config.seed,
            device=device,
            tokenizer=self.tokenizer,
        )

    @cached_property
    def scorer(self) -> scoring.Scorer:
        """The policy, ready to be trained."""
        needs = self.loss.needs
        model = self.build_policy(self._where_to_build(needs.output, needs.dim))
        if self.config.activation_checkpointing:
            models.enable_activation_checkpointing(model)
        return self._spread(build_scorer(self.run, model, device=self.world.device), needs.output)

    @cached_property
    def reference_scorer(self) -> scoring.Scorer:
        """The frozen reference as a model of its own (LoRA has none: its adapter is switched off)."""
        model = models.build_reference(
            self.spec,
            archive=self.spec.archive,
            seed=self.config.seed,
            device=self._where_to_build("logps"),
            tokenizer=self.tokenizer,
        )
        return self._spread(build_scorer(self.run, model, "logps", self.world.device), "logps")

    def holdout_losses(self, tuned: str, start: str) -> np.ndarray:
        """(N,) losses of the training rows under two fixed models, which are dropped afterwards; see engine.selection."""
        rows, fsdp = self.data.rows["train"], self.world.mode == "fsdp"

        def frozen(archive: str) -> Callable:
            model = models.build_reference(
                self.spec,
                archive=archive,
                seed=self.config.seed,
                device="cpu" if fsdp else self.world.device,
                tokenizer=self.tokenizer,
            )
            scorer = build_scorer(self.run, model, "logps", self.world.device)
            return reference.LiveReference(self._spread(scorer, "logps"))

        log.info("data_selection: losses of %d training rows under the holdout models", len(rows))
        with autocast(self.config.precision, self.world.device):
            return row_losses(
                rows,
                micro_batches(rows, np.arange(len(rows)), tokens=HOLDOUT_TOKENS),
                world=self.world,
                loss=self.loss,
                policy=frozen(tuned),
                reference=frozen(start),
            )

    def _where_to_build(self, output: models.Output, dim: int | None = None) -> torch.device | str:
        """On its device; for FSDP without values where that is possible, else on the CPU."""
        if self.world.mode != "fsdp":
            return self.world.device
        return "meta" if models.can_defer(self.spec, output, dim) else "cpu"

    def _spread(self, scorer: scoring.Scorer, output: models.Output) -> scoring.Scorer:
        """Under FSDP: slices on every rank, read from disk if they have no values yet."""
        if self.world.mode != "fsdp":
            return scorer
        if self.spec.quantization is not None:
            raise UserError(f"model.quantization={self.spec.quantization}: cannot be sharded; use DDPTrainer")
        deferred = next(scorer.parameters()).is_meta
        half, offload = self.spec.fsdp_policy_mp, self.config.trainer.cpu_offload
        parallel.shard(
            scorer,
            block_name=self.spec.block_name,
            param_dtype=models.DTYPES[half] if half else None,
            device=self.world.device,
            cpu_offload=offload,
        )
        if deferred:
            parallel.materialize(scorer, self.world.device, "cpu" if offload else self.world.device)
            archive = self.spec.archive
            models.fill(scorer.model, self.spec, archive=archive, output=output, seed=self.config.seed)
        return scorer

    def build_reference(
        self, rows: Mapping[str, Sequence[Row]], passes: float, resumed: Mapping[str, Any] | None
    ) -> Callable | None:
        """Reference log-probs of ``rows`` by split, the training rows ``passes`` times: cached (computed before the first
        step, by the policy itself where that is the same model), adapter-off, or live."""
        config, needs, scorer = self.config, self.loss.needs, self.scorer
        if not needs.reference:
            return None
        lora = models.is_peft(scorer.model)
        began_with = resumed["reference_weights"] if resumed else None
        same = lora or (resumed is None and self.spec.policy_dtype == self.spec.reference_dtype)

        def live() -> Callable:
            self._check_reference(began_with)
            if lora:
                return reference.AdapterOffReference(scorer, scorer.model)
            return reference.LiveReference(self.reference_scorer)

        # fresh pairs are not known before they are drawn
        if (
            config.reference == "live"
            or config.fresh_pairs.num_pairs
            or (config.reference == "auto" and passes < 1)
        ):
            made = live()
            if not config.eval_only_once:
                self.reference_weights = self._found_weights
            return made
        if lora:  # the policy is trained on them
            self._check_reference(began_with)
        self.reference_weights = began_with or self._found_weights
        cache = reference.CachedReference(
            config.reference_cache,
            weights=self.reference_weights,
            kernel=self.kernel(scorer),
            dtype=models.DTYPES[self.spec.reference_dtype],
            device=self.world.device,
            scorer_factory=(lambda: reference.LiveReference(scorer)) if same and not lora else live,
        )
        every = [row for part in rows.values() for row in part]
        with autocast(config.precision, self.world.device):
            cache.fill(
                every, needs.reference, world=self.world, check=0 if resumed else config.reference_check
            )
        scorer.train()
        self.__dict__.pop("reference_scorer", None)  # nothing is left to compute: its memory is free
        return cache

    def kernel(self, scorer: scoring.Scorer) -> str:
        """What the reference's rounding depends on besides its weights, see `reference.kernel_id`."""
        words = [reference.kernel_id(scorer), self.config.precision]
        if self.world.mode == "fsdp" and self.spec.fsdp_policy_mp is not None:
            words.append(self.spec.fsdp_policy_mp)
        return "/".join([*words, *["compiled"] * self.config.compile])

    def _check_reference(self, began_with: str | None) -> None:
        if began_with not in (None, self._found_weights):
            raise UserError(
                f"model.archive={self.spec.archive}: the reference has other weights ({self._found_weights[:12]}) than when this "
                f"run began ({began_with[:12]}); put them back, or use another exp_name= or fresh=true"
            )

    def build_fresh_pairs(self) -> FreshPairs | None:
        """What draws and scores auxiliary pairs at every epoch, if the run wants that."""
        how, config, scorer = self.config.fresh_pairs, self.config, self.scorer
        if not how.num_pairs or config.eval_only_once:
            return None
        if how.scorer == "function":
            examples = {example.uid: example for example in self.data.examples["train"]}
            preference = FunctionPreference(how.function, examples, self.tokenizer)
        else:
            preference, self.preference_weights = self.load_preference(how.scorer, how.model)

        @contextlib.contextmanager
        def frozen() -> Iterator[torch.nn.Module]:
            if models.is_peft(scorer.model) and self.loss.needs.output == "logps":
                with reference.adapter_off(scorer.model):
                    yield scorer.model
            else:
                yield self.reference_scorer.model

        return FreshPairs(
            reference=frozen,
            tokenizer=self.tokenizer,
            preference=preference,
            num_pairs=how.num_pairs,
            temperature=how.temperature,
            max_length=config.max_length,
            max_new_tokens=how.max_new_tokens,
            batch_size=how.batch_size,
            seed=config.seed,
        )

    def check_fresh_pairs(self) -> None:
        """Refuse what ``build_fresh_pairs`` could not use, before any model is loaded."""
        how = self.config.fresh_pairs
        if how.num_pairs and how.scorer == "function":
            load_function(how.function, "fresh_pairs.function")
        elif how.num_pairs:
            self._preference_run(how.scorer, how.model)

    def _preference_run(self, scorer: str, archive: str) -> tuple[Loss, ModelSpec]:
        found = recorded(archive, "fresh_pairs.model")
        if found is None or found[0].needs.output != preferences.OUTPUTS[scorer]:
            raise UserError(f"fresh_pairs.model={archive}: is no run trained with loss={scorer}")
        return found

    def load_preference(self, scorer: str, archive: str) -> tuple[preferences.ModelPreference, str]:
        """The reward or general preference model of a run, and the hash of its weights."""
        loss, spec = self._preference_run(scorer, archive)
        tau, layout = (loss.tau if scorer == "gpm" else None), self.config.scoring.layout
        return preferences.load(
            spec,
            archive,
            loss.needs,
            tau=tau,
            device=self.world.device,
            tokenizer=self.tokenizer,
            layout=layout,
        )

    @cached_property
    def _found_weights(self) -> str:
        """Hash of the reference as it was built now; first asked for while the policy is what it starts from."""
        model = self.scorer.model
        if models.is_peft(model):
            adapter = models.REFERENCE_ADAPTER if models.REFERENCE_ADAPTER in model.peft_config else None
            return models.weights_hash(model, adapter)
        if self.spec.policy_dtype == self.spec.reference_dtype:
            return models.weights_hash(model)
        return models.weights_hash(self.reference_scorer.model)


def describe(model: torch.nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{type(model).__name__}, {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"
