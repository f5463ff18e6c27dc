"""From a validated Run to a trained model: data, models, parts, trainer, results. Shared by train.py and commands/."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from config.compose import NOT_IDENTITY, Run, recorded
from data.files import ReadSettings
from data.names import dataset_module
from data.passport import passport
from data.plan import Plan, micro_batches
from data.schema import Example, Row
from engine import checkpoint, models, parallel, preferences, reference, results, rundir, scoring
from engine.evaluation import Evaluator
from engine.fresh_pairs import FreshPairs, FunctionPreference
from engine.metrics import MetricsLog, WandbSettings
from engine.optim import Schedule, build_optimizer, restore_optimizer
from engine.parallel import World
from engine.samples import Sampler
from engine.selection import row_losses
from losses.types import Loss
from preference_datasets import Counts, Tokenization, sft_examples, tokenize
from trainers import Parts, Trainer, autocast
from utils import UserError, git_facts, log, versions, write_atomic

ROOT = Path(__file__).resolve().parent
HOLDOUT_TOKENS = 16384  # tokens scored together when all training rows are
disable_progress_bar()  # of every small file that transformers writes


# ---------------------------------------------------------------------------------------------------- data


@dataclass
class Data:
    """Rows per split, and what they came from. ``examples`` are those the rows were made of, same order."""

    groups: tuple[str, ...]
    datasets: tuple[str, ...]
    rows: dict[str, list[Row]]
    examples: dict[str, list[Example]]
    source: dict[str, list[int]]  # split -> index into ``datasets`` of each row
    counts: Counts


def load_examples(run: Run) -> dict[str, list[list[Example]]]:
    """split -> one list per entry of ``datasets``."""
    found: dict[str, list[list[Example]]] = {}
    common = {
        "on_bad_row": run.config.data.on_bad_row,
        "max_bad_fraction": run.config.data.max_bad_fraction,
    }
    for spec in run.datasets:
        settings = spec.settings
        if isinstance(settings, ReadSettings):
            common["rejected_path"] = str(Path(run.config.run_dir) / f"rejected-{spec.name}.jsonl")
            settings = replace(settings, **{k: v for k, v in common.items() if getattr(settings, k) is None})
        for split, examples in dataset_module(spec.source).load(spec.name, settings, run.config.seed).items():
            found.setdefault(split, [[] for _ in run.datasets])[run.datasets.index(spec)] = examples
    return found


def load_data(run: Run, tokenizer: Any, loss: Loss | None = None) -> Data:
    """Read and tokenise every split for what ``loss`` needs (default: the run's)."""
    loss = loss or run.loss
    needs = loss.needs
    by_split = load_examples(run)
    if "target" in needs.policy:
        by_split = {s: [sft_examples(e, loss.sft_on) for e in lists] for s, lists in by_split.items()}
    groups = tuple(dict.fromkeys(e.group for lists in by_split.values() for part in lists for e in part))
    roles = tuple(dict.fromkeys((*needs.policy, *needs.reference)))
    rows: dict[str, list[Row]] = {}
    kept: dict[str, list[Example]] = {}
    source: dict[str, list[int]] = {}
    counts = Counts()
    for split, lists in by_split.items():
        rows[split], kept[split], source[split] = [], [], []
        for i, (spec, examples) in enumerate(zip(run.datasets, lists, strict=True)):
            check_columns(examples, needs.scalars, spec.name, split)
            made = tokenize(
                examples,
                tokenizer,
                tokenization(run, spec),
                groups=groups,
                roles=roles,
                optional_roles=needs.optional_roles,
                counts=counts,
            )
            by_uid = {e.uid: e for e in examples}
            rows[split] += made
            kept[split] += [by_uid[row.uid] for row in made]
            source[split] += [i] * len(made)
    counts.log()
    if not rows.get("train") and not run.config.eval_only_once:
        raise UserError(f"datasets={run.config.datasets}: no training rows are left; see the counts above")
    return Data(groups, tuple(s.name for s in run.datasets), rows, kept, source, counts)


def tokenization(run: Run, spec: Any) -> Tokenization:
    config = run.config
    return Tokenization(
        bos=config.data.bos,
        mode=config.data.tokenize,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.truncation or spec.settings.truncation_mode,
    )


def check_columns(examples: Sequence[Example], scalars: Sequence[str], name: str, split: str) -> None:
    """Every row must have the columns that the loss needs."""
    for example in examples:
        for column in scalars:
            if column not in example.scalars:
                raise UserError(
                    f"{example.uid}: column {column!r} is missing, which this loss needs; "
                    f"{name}/{split} has {sorted(example.scalars) or 'no such columns'}"
                )


def build_plan(run: Run, data: Data) -> Plan:
    """The batch plan: plain epochs, weighted mixtures of data sets, or groups drawn uniformly."""
    config, rows = run.config, data.rows["train"]
    strata, probs = None, None
    if config.weighted_batches:
        strata, probs = [row.group for row in rows], [1.0] * len(data.groups)
    elif config.data.mix_weights is not None:
        strata = data.source["train"]
        probs = [config.data.mix_weights[name] for name in data.datasets]
    return Plan(
        rows,
        seed=config.seed,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        sep_pairs=config.sep_pairs,
        strata=strata,
        strata_probs=probs,
        num_groups=len(data.groups),
    )


# ---------------------------------------------------------------------------------------------------- models


def build_scorer(run: Run, model: torch.nn.Module, output: models.Output | None = None) -> scoring.Scorer:
    """``output``: what the model's head gives; None: what the loss needs of the policy."""
    s, output = run.config.scoring, output or run.loss.needs.output
    scorer = scoring.Scorer(model, layout=s.layout, output=output, chunk_tokens=s.chunk_tokens)
    if scorer.fallback_reason:
        log.info("scoring.layout=%s is not possible here, using padded: %s", s.layout, scorer.fallback_reason)
    return scorer


def verify_scorer(run: Run, scorer: scoring.Scorer, rows: Sequence[Row]) -> None:
    """Score a first few rows both ways; refuse to go on past the tolerance."""
    from data.schema import Batch

    if run.config.scoring.verify and rows:
        exact = next(scorer.parameters()).dtype == torch.float64
        gap = scoring.verify(
            scorer,
            Batch.collate(list(rows[:4])),
            run.loss.needs.policy,
            1e-9 if exact else run.config.scoring.tolerance,
        )
        log.info(
            "scoring: %s agrees with plain full-logits scoring to %.1e nats per token", scorer.layout, gap
        )


# ---------------------------------------------------------------------------------------------------- the run


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the watched metric (for sweepers) and the process's exit code."""

    metric: float | None
    exit_code: int = 0


def run_training(run: Run) -> Outcome:
    """Train (or continue, or show the results of) the run. Raises UserError for anything the user can mend."""
    config = run.config
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        world = parallel.start(config.trainer.parallel, config.device, config.trainer.timeout_s)
        stack.push(world.leave)
        session = _Session(run, run_dir, world, stack)
        stack.enter_context(world.watched(session.where))
        config.check_world(world.size)
        finished = world.on_main(session.enter)
        if finished is not None:
            if world.is_main:
                sys.stdout.write(results.render(finished, run_dir))
            return Outcome(finished.get("metric"))
        return session.run()


def _finished(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class _Session:
    """One process's part in one start of a run."""

    def __init__(self, run: Run, run_dir: Path, world: World, stack: contextlib.ExitStack) -> None:
        self.config, self.spec, self.loss = run.config, run.model, run.loss
        self.run_, self.run_dir, self.world, self.stack = run, run_dir, world, stack
        self.started = time.time()
        self.reference_weights: str | None = None
        self.preference_weights: str | None = None
        self.trainer: Trainer | None = None

    def enter(self) -> dict[str, Any] | None:
        """Take the run directory (rank 0); the results if it holds a finished run."""
        rundir.prepare(self.run_dir)
        self.stack.enter_context(rundir.lock(self.run_dir))
        checkpoint.clean(self.run_dir)
        if self.config.fresh:
            rundir.set_aside(self.run_dir)
        allow = self.config.resume_allow
        rundir.check_config(self.run_dir, self.run_.plain, allow=allow, ignore=NOT_IDENTITY)
        return _finished(self.run_dir)

    def where(self) -> str:
        """Where the run is, for the message of a rank that lost another."""
        return "the start" if self.trainer is None else f"step {self.trainer.step_count + 1}"

    # ------------------------------------------------------------------------------------------ building

    @cached_property
    def tokenizer(self) -> Any:
        return models.load_tokenizer(self.spec)

    @cached_property
    def data(self) -> Data:
        return load_data(self.run_, self.tokenizer)

    @cached_property
    def eval_rows(self) -> dict[str, list[Row]]:
        rows = {s: r for s, r in self.data.rows.items() if s != "train" or self.config.eval_train_data}
        if not any(rows.values()):
            log.warning("there are no evaluation rows")
        return rows

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
        return self._spread(build_scorer(self.run_, model), needs.output)

    @property
    def model(self) -> torch.nn.Module:
        return self.scorer.model

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
        return self._spread(build_scorer(self.run_, model, "logps"), "logps")

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
            return reference.LiveReference(self._spread(build_scorer(self.run_, model), "logps"))

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

    def build_reference(self, scorer: scoring.Scorer, resumed: Mapping[str, Any] | None) -> Callable | None:
        """Reference log-probs: cached (computed before the first step, by the policy itself where that is the same
        model), adapter-off, or live."""
        config, needs = self.config, self.loss.needs
        if not needs.reference:
            return None
        lora = models.is_peft(scorer.model)
        same = lora or (resumed is None and self.spec.policy_dtype == self.spec.reference_dtype)

        def live() -> Callable:
            if lora:
                return reference.AdapterOffReference(scorer, scorer.model)
            return reference.LiveReference(self.reference_scorer)

        passes = 0 if config.eval_only_once else self.plan.num_examples / len(self.data.rows["train"])
        # fresh pairs are not known before they are drawn
        if (
            config.reference == "live"
            or config.fresh_pairs.num_pairs
            or (config.reference == "auto" and passes < 1)
        ):
            return live()
        self.reference_weights = resumed["reference_weights"] if resumed else self._weights_hash(scorer.model)
        cache = reference.CachedReference(
            config.reference_cache,
            weights=self.reference_weights,
            kernel=f"{reference.kernel_id(scorer)}/{config.precision}",
            dtype=models.DTYPES[self.spec.reference_dtype],
            device=self.world.device,
            scorer_factory=(lambda: reference.LiveReference(scorer)) if same and not lora else live,
        )
        rows = [row for split, part in self.rows_to_score.items() for row in part]
        with autocast(config.precision, self.world.device):
            cache.fill(
                rows, needs.reference, world=self.world, check=0 if resumed else config.reference_check
            )
        scorer.train()
        return cache

    def build_fresh_pairs(self, scorer: scoring.Scorer) -> FreshPairs | None:
        """What draws and scores auxiliary pairs at every epoch, if the run wants that."""
        how, config = self.config.fresh_pairs, self.config
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

    def load_preference(self, scorer: str, archive: str) -> tuple[preferences.ModelPreference, str]:
        """The reward or general preference model of a run, and the hash of its weights."""
        found = recorded(archive)
        if found is None or found[0].needs.output != preferences.OUTPUTS[scorer]:
            raise UserError(f"fresh_pairs.model={archive}: is no run trained with loss={scorer}")
        loss, spec = found
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

    def _weights_hash(self, model: torch.nn.Module) -> str:
        if models.is_peft(model):
            adapter = models.REFERENCE_ADAPTER if models.REFERENCE_ADAPTER in model.peft_config else None
            return models.weights_hash(model, adapter)
        if self.spec.policy_dtype == self.spec.reference_dtype:
            return models.weights_hash(model)
        return models.weights_hash(self.reference_scorer.model)

    @cached_property
    def rows_to_score(self) -> dict[str, list[Row]]:
        """Splits of this run that the reference will be asked about."""
        training = {} if self.config.eval_only_once else {"train": self.data.rows["train"]}
        return {**self.eval_rows, **training}

    @cached_property
    def plan(self) -> Plan:
        return build_plan(self.run_, self.data)

    # ------------------------------------------------------------------------------------------ running

    def run(self) -> Outcome:
        config, world = self.config, self.world
        self.report_data()
        if config.audit:
            return Outcome(None)
        found = world.on_main(
            lambda: checkpoint.choose(self.run_dir, resume=config.resume, resume_from=config.resume_from)
        )
        trainer = self.trainer = self.build_trainer(found)
        self.stack.callback(trainer.parts.metrics.close)
        if config.eval_only_once:
            trainer.evaluate(list(trainer.parts.evaluator.splits))
            status = "evaluated"
        else:
            status = trainer.train()
        if status == "signal":
            log.warning("stopped by a signal at %d examples; the same command continues", trainer.examples)
            return Outcome(None, trainer.exit_code)
        if status != "evaluated":
            trainer.finish()
        summary = self.summary(trainer, status)
        merge = config.checkpoint.merge_lora and models.is_peft(self.model) and status != "evaluated"
        world.on_main(lambda: self.report(summary, merge))
        if config.wandb.artifact and status != "evaluated":
            self.upload(trainer.parts.metrics)
        return Outcome(summary["metric"])

    def upload(self, metrics: MetricsLog) -> None:
        """The final model's files to W&B, merged if that was done; not the optimizer's state."""
        merged = self.run_dir / "merged"
        folder = merged if merged.is_dir() else (self.run_dir / "LATEST").resolve()
        files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != checkpoint.MANIFEST]
        metrics.artifact(files, re.sub(r"[^\w.-]", "-", self.config.exp_name))

    def report(self, summary: Mapping[str, Any], merge: bool) -> None:
        rows = map(json.loads, (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        write_atomic(self.run_dir / "results.csv", results.to_csv(results.evaluation_rows(rows)))
        write_atomic(self.run_dir / "results.json", json.dumps(summary, indent=1) + "\n")
        sys.stdout.write(f"\n{results.render(summary, self.run_dir)}")
        if merge:
            self.merge(summary["examples"])

    def report_data(self) -> None:
        """The data passport: into the log and passport.json, before any model is loaded."""
        if not self.world.is_main:
            return
        made = passport(
            self.data.rows, self.data.counts, self.data.groups, self.tokenizer, first_batch=self.first_rows()
        )
        (self.run_dir / "passport.json").write_text(
            json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8"
        )
        text = made.render(color=sys.stderr.isatty())
        if self.config.audit:
            sys.stdout.write(text)
        else:
            log.info("%s", made.summary())

    def first_rows(self) -> list[Row]:
        rows = self.data.rows.get("train") or []
        return [rows[i] for i in self.plan.step_rows(0)] if rows else []

    def build_trainer(self, found: checkpoint.Checkpoint | None) -> Trainer:
        config, world = self.config, self.world
        state = found.state if found else None
        scorer = self.scorer
        if found is None:
            verify_scorer(self.run_, scorer, self.first_rows())
            log.info("model: %s", describe(self.model))
        ref = self.build_reference(scorer, state)
        if found is not None:
            self.read_model(found.path)
        parameters = [p for p in scorer.parameters() if p.requires_grad]
        optimizer = build_optimizer(
            config.optimizer,
            parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            options=config.optimizer_options,
        )
        if found is not None:
            try:
                restore_optimizer(optimizer, scorer.named_parameters(), found.optimizer(), state["optimizer"])
            except ValueError as error:
                raise UserError(f"{found.path}: {error}; use another exp_name= or fresh=true") from error
        steps = self.plan.num_steps
        warmup = min(150, steps // 10) if config.warmup_steps is None else config.warmup_steps
        schedule = Schedule(config.lr, warmup, steps, config.lr_schedule)
        fresh_pairs = self.build_fresh_pairs(scorer)
        facts = self.facts()
        if found is not None:
            self.report_resume(found, facts)
        metrics = self.build_metrics(state, found.examples if found else 0)
        trainer = Trainer(
            Parts(
                config=config,
                world=world,
                run_dir=self.run_dir,
                policy=scorer,
                reference=ref,
                loss=self.loss,
                weighting=self.run_.weighting.build(
                    self.data.groups, self.plan.group_counts, self.plan.group_probs
                ),
                stopper=self.run_.stopping.build(
                    lr=config.lr, num_examples=len(self.data.rows["train"]), eval_every=config.eval_every
                ),
                optimizer=optimizer,
                schedule=schedule,
                plan=self.plan,
                rows=self.data.rows["train"],
                evaluator=self.build_evaluator(ref, metrics.samples),
                metrics=metrics,
                model_writer=self.model_writer,
                read_model=self.read_model,
                facts=facts,
                extra_state={"reference_weights": self.reference_weights},
                selector=self.run_.data_selection.build(
                    config.selected_batch_size, config.seed, self.holdout_losses
                ),
                fresh_pairs=fresh_pairs,
            ),
            self.data.groups,
        )
        if state is not None:
            trainer.load_state_dict(state)
        return trainer

    def read_model(self, path: Path) -> None:
        """The policy's weights from a checkpoint of this run, in place."""
        models.restore(self.model, path)

    def model_writer(self) -> Callable[[Path], None]:
        if self.world.mode != "fsdp":
            return lambda path: models.save_model(self.model, self.tokenizer, path)
        named = self.model.named_parameters()
        if models.is_peft(self.model):  # the adapter alone is saved
            named = ((name, p) for name, p in named if p.requires_grad)
        state = {name: self.world.to_main(p) for name, p in named}
        return lambda path: models.save_model(self.model, self.tokenizer, path, state=state)

    def merge(self, examples: int) -> None:
        """Rank 0, after the last save: the merged model beside the adapter."""
        model = self.model
        if self.world.mode == "fsdp":  # here are slices only
            model = self.build_policy("cpu")
            models.restore(model, self.run_dir / f"step-{examples}")
        models.merge_lora(model, self.tokenizer, self.run_dir / "merged")

    def facts(self) -> dict[str, Any]:
        """What bit-exactness depends on."""
        config = self.config
        return {
            "config_hash": self.run_.config_hash,
            "data_fingerprint": self.plan.fingerprint,
            "world_size": self.world.size,
            "parallel": self.world.mode,
            "micro_batches": config.microbatch_tokens or config.gradient_accumulation_steps,
            "threads": torch.get_num_threads(),
            "device": str(self.world.device.type),
            "versions": versions(),
            "preferences": self.preference_weights,
            "git": git_facts(ROOT),
        }

    def report_resume(self, found: checkpoint.Checkpoint, facts: Mapping[str, Any]) -> None:
        changes = checkpoint.compare_facts(found.facts, facts, allow=self.config.resume_allow)
        changes = [c for c in changes if not c.startswith("git.")]
        promise = "bit-exact" if not changes else f"not bit-exact, equal to rounding: {'; '.join(changes)}"
        log.info("continuing from %s (%s)", found.path, promise)

    def build_metrics(self, state: Mapping[str, Any] | None, examples: int) -> MetricsLog:
        config, run = self.config, self.run_
        shown = dict(run.plain)
        if self.world.is_main:
            rundir.truncate(
                self.run_dir, examples=examples, metrics_offset=state["metrics"]["offset"] if state else 0
            )
            made = rundir.provenance(
                run.plain, command=[Path(sys.argv[0]).name, *sys.argv[1:]], seed=config.seed, root=ROOT
            )
            made |= {"config_hash": run.config_hash, "config_hash_no_seed": run.config_hash_no_seed}
            rundir.write_facts(self.run_dir, run.plain, made, examples=examples)
            shown["provenance"] = json.loads((self.run_dir / "provenance.json").read_text(encoding="utf-8"))
        w = config.wandb
        return MetricsLog(
            self.run_dir,
            wandb=WandbSettings(
                enabled=w.enabled,
                project=w.project,
                entity=w.entity,
                tags=tuple(w.tags),
                legacy_names=w.legacy_names,
            ),
            config=shown,
            identity={
                "name": self.name,
                "group": run.config_hash_no_seed[:12],
                "job_type": run.plain["loss"]["name"],
            },
            groups=self.data.groups,
            validation="validation" in self.eval_rows,
            state=state["metrics"] if state else None,
            examples=examples,
            active=self.world.is_main,
        )

    @property
    def name(self) -> str:
        """On W&B; a multirun's jobs share exp_name, their directories differ."""
        config = self.config
        return os.path.relpath(config.run_dir, config.run_root) if config.multirun_keys else config.exp_name

    def build_evaluator(self, ref: Callable | None, log_samples: Callable) -> Evaluator:
        config, sampler = self.config, None
        if config.sample_during_eval and self.loss.needs.output == "logps":
            split = next((s for s in ("test", "validation") if self.eval_rows.get(s)), "train")
            sampler = Sampler(
                rows=self.eval_rows.get(split, []),
                groups=self.data.groups,
                tokenizer=self.tokenizer,
                reference=(lambda: self.reference_scorer) if self.loss.needs.reference else None,
                write=log_samples,
                num_prompts=config.n_eval_model_samples,
                max_new_tokens=config.sample_max_new_tokens or config.max_length - config.max_prompt_length,
                batch_size=config.eval_batch_size,
                seed=config.seed,
            )
        return Evaluator(
            splits=self.eval_rows,
            groups=self.data.groups,
            loss=self.loss,
            reference=ref,
            world=self.world,
            run_dir=self.run_dir,
            batch_size=config.eval_batch_size,
            per_group=config.n_eval_examples,
            sampler=sampler,
        )

    def summary(self, trainer: Trainer, status: str) -> dict[str, Any]:
        """results.json: the final evaluation of every split, per group with intervals and n."""
        splits = {
            split: results.final_table(done, self.data.groups)
            for split, done in trainer.last_evaluation.items()
        }
        metric = self.watched(trainer)
        return {
            "status": status,
            "step": trainer.step_count,
            "examples": trainer.examples,
            "seconds": round(time.time() - self.started, 1),
            "metric": metric,
            "exp_name": self.config.exp_name,
            "loss": self.run_.plain["loss"]["name"],
            "splits": splits,
        }

    def watched(self, trainer: Trainer) -> float | None:
        """The stopper's metric, else the first split's loss: what a sweep minimises or compares."""
        flat = {k: v for done in trainer.last_evaluation.values() for k, v in done.metrics.items()}
        name = trainer.parts.stopper.metric
        if name is None:
            name = next((f"{done.prefix}/loss" for done in trainer.last_evaluation.values()), None)
        return flat.get(name) if name else None


def describe(model: torch.nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{type(model).__name__}, {total / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained"
