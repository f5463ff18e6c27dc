"""From a validated Run to a trained model: data, models, parts, trainer, results. Shared by train.py and commands/."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from config.compose import NOT_IDENTITY, Run
from data.passport import passport
from data.plan import Plan, fingerprint
from data.schema import Row
from engine import checkpoint, models, parallel, results, rundir, runtime, sharded
from engine.evaluation import Evaluator
from engine.guards import SignalFlag
from engine.metrics import MetricsLog, WandbSettings
from engine.optim import Schedule, build_optimizer, restore_optimizer
from engine.parallel import World
from engine.samples import Sampler
from run_data import Data, build_plan, check_groups, check_preferences, load_data
from run_models import RunModels, describe, verify_scorer
from trainers import Parts, Trainer
from utils import UserError, git_facts, log, versions, without_nan, write_atomic

ROOT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Outcome:
    """How a run ended: the watched metric (for sweepers) and the process's exit code."""

    metric: float | None
    exit_code: int = 0


def run_training(run: Run) -> Outcome:
    """Train (or continue, or show the results of) the run. Raises UserError for anything the user can mend."""
    config = run.config
    runtime.configure(config.num_threads, config.allocator)
    run_dir = Path(config.run_dir)
    with contextlib.ExitStack() as stack:
        world = parallel.start(config.trainer.parallel, config.device, config.trainer.timeout_s)
        stack.push(world.leave)
        runtime.set_products(config.precision, world.device)
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
        self.trainer: Trainer | None = None

    def enter(self) -> dict[str, Any] | None:
        """Take the run directory (rank 0); the results if it holds a finished run."""
        rundir.prepare(self.run_dir)
        self.stack.enter_context(rundir.lock(self.run_dir))
        checkpoint.clean(self.run_dir)
        if self.config.fresh:
            rundir.set_aside(self.run_dir)
        allow = self.config.resume_allow
        changed = rundir.check_config(self.run_dir, self.run_.plain, allow=allow, ignore=NOT_IDENTITY)
        done = None if changed else _finished(self.run_dir)  # a finished run with more epochs goes on
        if done is None:
            checkpoint.rehearse(self.run_dir)
        return done

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
    def models(self) -> RunModels:
        return RunModels(self.run_, self.world, self.tokenizer, self.data)

    @property
    def model(self) -> torch.nn.Module:
        return self.models.scorer.model

    @cached_property
    def eval_rows(self) -> dict[str, list[Row]]:
        rows = {s: r for s, r in self.data.rows.items() if s != "train" or self.config.eval_train_data}
        if not any(rows.values()):
            log.warning("there are no evaluation rows")
        return rows

    @cached_property
    def rows_to_score(self) -> dict[str, list[Row]]:
        """Splits of this run that the reference will be asked about."""
        training = {} if self.config.eval_only_once else {"train": self.data.rows["train"]}
        return {**self.eval_rows, **training}

    @cached_property
    def plan(self) -> Plan:
        return build_plan(self.run_, self.data)

    @cached_property
    def weighting(self) -> Any:
        """The state of the group weights."""
        plan = self.plan
        return self.run_.weighting.build(self.data.groups, plan.group_counts, plan.group_probs)

    @cached_property
    def schedule(self) -> Schedule:
        config, steps = self.config, self.plan.num_steps
        warmup = min(150, steps // 10) if config.warmup_steps is None else config.warmup_steps
        return Schedule(config.lr, warmup, steps, config.lr_schedule)

    @cached_property
    def stopper(self) -> Any:
        """The state of the stopping rule."""
        config, rows = self.config, self.data.rows["train"]
        return self.run_.stopping.build(lr=config.lr, num_examples=len(rows), eval_every=config.eval_every)

    @property
    def passes(self) -> float:
        """How often the training rows will be asked about."""
        return 0.0 if self.config.eval_only_once else self.plan.num_examples / len(self.data.rows["train"])

    # ------------------------------------------------------------------------------------------ running

    def run(self) -> Outcome:
        config, world = self.config, self.world
        self.report_data()
        if config.audit:
            return Outcome(None)
        check_preferences(self.run_, self.rows_to_score)
        if not config.eval_only_once:
            check_groups(self.run_, self.data.groups, self.eval_rows)
            _ = self.weighting, self.schedule, self.stopper  # they may refuse, and no model is loaded yet
        found = world.on_main(
            lambda: checkpoint.choose(self.run_dir, resume=config.resume, resume_from=config.resume_from)
        )
        if found is not None and not config.eval_only_once:
            self.check_position(found)
        trainer = self.trainer = self.build_trainer(found)
        self.stack.callback(trainer.parts.metrics.close)
        if config.eval_only_once:
            trainer.evaluate(list(trainer.parts.evaluator.splits), judge=False)
            status = "evaluated"
        else:
            status = trainer.train()
        if status == "signal":
            log.warning("stopped by a signal at %d examples; the same command continues", trainer.examples)
            return Outcome(None, trainer.exit_code)
        if status != "evaluated":
            with SignalFlag():  # nothing is left to stop: the last evaluation and save are worth the wait
                trainer.finish()
            self.consolidate(trainer.examples)
        summary = self.summary(trainer, status)
        merge = config.checkpoint.merge_lora and models.is_peft(self.model) and status != "evaluated"
        world.on_main(lambda: self.report(summary, merge))
        if config.wandb.artifact and status != "evaluated":
            self.upload(trainer.parts.metrics)
        return Outcome(summary["metric"])

    def check_position(self, found: checkpoint.Checkpoint) -> None:
        """The plan computes its position from the step: refuse a checkpoint of other data, or of other steps."""
        facts = {**found.facts, "data_fingerprint": self.plan.fingerprint}
        checkpoint.compare_facts(found.facts, facts, allow=self.config.resume_allow)
        due = self.plan.examples_before(found.step)
        if due != found.examples:
            raise UserError(
                f"{found.path}: {found.step} steps took {found.examples} rows, in this run they take {due} (batch_size="
                f"{self.config.batch_size}, {self.plan.rows_per_epoch} rows an epoch, {self.plan.num_examples} in all): it cannot "
                "go on from there; use the batch_size and data of that run and at least its n_epochs, and give n_examples a "
                "multiple of batch_size in a run that is to be prolonged"
            )

    def consolidate(self, examples: int) -> None:
        """After a sharded last save: the whole model beside it, for whoever uses the run."""
        last = self.world.on_main(lambda: checkpoint.open_checkpoint(self.run_dir / f"step-{examples}"))
        if last.is_sharded:
            sharded.consolidate(last, self.world)

    def upload(self, metrics: MetricsLog) -> None:
        """The final model's files to W&B, merged if that was done; not the optimizer's state."""
        last = self.run_dir / "LATEST"
        made = [p for p in (self.run_dir / "merged", checkpoint.whole_folder(last)) if p.is_dir()]
        folder = made[0] if made else last.resolve()
        files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != checkpoint.MANIFEST]
        metrics.artifact(files, re.sub(r"[^\w.-]", "-", self.config.exp_name))

    def report(self, summary: Mapping[str, Any], merge: bool) -> None:
        rows = map(json.loads, (self.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        write_atomic(self.run_dir / "results.csv", results.to_csv(results.evaluation_rows(rows)))
        write_atomic(self.run_dir / "results.json", json.dumps(without_nan(summary), indent=1) + "\n")
        sys.stdout.write(f"\n{results.render(summary, self.run_dir)}")
        if merge:
            self.merge(summary["examples"])

    def report_data(self) -> None:
        """The data passport: into the log and passport.json, before any model is loaded."""
        if not self.world.is_main:
            return
        self.report_bare_rows()
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

    def report_bare_rows(self) -> None:
        """How many training rows lack the responses that the loss can do without."""
        optional, rows = self.loss.needs.optional_roles, self.data.rows.get("train") or []
        if not optional or self.config.fresh_pairs.num_pairs or self.config.eval_only_once:
            return
        bare = sum(not set(optional) & set(row.roles) for row in rows)
        if bare:
            say = log.warning if bare == len(rows) else log.info
            say(
                "%d of %d training rows have no auxiliary responses and get the plain loss; commands.sample and "
                "commands.annotate make them, or fresh_pairs.num_pairs",
                bare,
                len(rows),
            )

    def first_rows(self) -> list[Row]:
        rows = self.data.rows.get("train") or []
        return [rows[i] for i in self.plan.step_rows(0)] if rows else []

    def build_trainer(self, found: checkpoint.Checkpoint | None) -> Trainer:
        config, world = self.config, self.world
        state = found.state if found else None
        self.models.check_fresh_pairs()
        self.run_.data_selection.check_archives()
        scorer = self.models.scorer
        models.check_positions(self.model, self.data.longest)
        if found is None:
            verify_scorer(self.run_, scorer, self.first_rows())
            log.info("model: %s", describe(self.model))
        ref = self.models.build_reference(self.rows_to_score, self.passes, state)
        named = dict(scorer.named_parameters())
        trained = [p for p in named.values() if p.requires_grad]
        optimizer = build_optimizer(
            config.optimizer,
            trained,
            lr=config.lr,
            weight_decay=config.weight_decay,
            options=config.optimizer_options,
        )
        if found is not None:
            try:
                self.read_model(found.path)
                slots = sharded.read_optimizer(found, named) if found.is_sharded else found.optimizer()
                restore_optimizer(optimizer, named.items(), slots, state["optimizer"])
            except (ValueError, checkpoint.CheckpointError) as error:
                raise UserError(f"{found.path}: {error}; use another exp_name= or fresh=true") from error
        if world.is_main:
            kept = trained if models.is_peft(self.model) else named.values()
            checkpoint.warn_if_space_short(self.run_dir, checkpoint.estimate_bytes(kept))
        fresh_pairs = self.models.build_fresh_pairs()
        facts = self.facts()
        if found is not None:
            self.report_resume(found, facts)
        here = found is not None and found.path.parent == self.run_dir.resolve()
        metrics = self.build_metrics(state if here else None, found.examples if found else 0)
        trainer = Trainer(
            Parts(
                config=config,
                world=world,
                run_dir=self.run_dir,
                policy=scorer,
                reference=ref,
                loss=self.loss,
                weighting=self.weighting,
                stopper=self.stopper,
                optimizer=optimizer,
                schedule=self.schedule,
                plan=self.plan,
                rows=self.data.rows["train"],
                evaluator=self.build_evaluator(ref, metrics.samples),
                metrics=metrics,
                model_writer=self.model_writer,
                read_model=self.read_model,
                facts=facts,
                extra_state={"reference_weights": self.models.reference_weights},
                selector=self.run_.data_selection.build(
                    config.selected_batch_size, config.seed, self.models.holdout_losses
                ),
                fresh_pairs=fresh_pairs,
            ),
            self.data.groups,
        )
        if state is not None:
            trainer.load_state_dict(state, here)
        return trainer

    def read_model(self, path: Path) -> None:
        """The policy's weights from a checkpoint of this run, in place."""
        found = self.world.on_main(lambda: checkpoint.open_checkpoint(path))
        if found.is_sharded:
            sharded.read_model(found, dict(self.models.scorer.named_parameters()))
        else:
            models.restore(self.model, path)

    def model_writer(self) -> Callable[[Path], None]:
        if self.config.checkpoint.format == "sharded":
            return lambda path: models.save_model(self.model, self.tokenizer, path, weights=False)
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
            model = self.models.build_policy("cpu")
            models.restore(model, self.run_dir / f"step-{examples}")
        models.merge_lora(model, self.tokenizer, self.run_dir / "merged")

    def facts(self) -> dict[str, Any]:
        """What bit-exactness depends on."""
        config = self.config
        return {
            "config_hash": self.run_.config_hash,
            "data_fingerprint": self.plan.fingerprint,
            "evaluation_rows": {split: fingerprint(rows) for split, rows in self.eval_rows.items() if rows},
            "world_size": self.world.size,
            "parallel": self.world.mode,
            "micro_batches": config.microbatch_tokens or config.gradient_accumulation_steps,
            "threads": torch.get_num_threads(),
            "device": str(self.world.device.type),
            "versions": versions(),
            "preferences": self.models.preference_weights,
            "git": git_facts(ROOT),
        }

    def report_resume(self, found: checkpoint.Checkpoint, facts: Mapping[str, Any]) -> None:
        changes = checkpoint.compare_facts(found.facts, facts, allow=self.config.resume_allow)
        changes = [c for c in changes if not c.startswith("git.")]
        if found.facts.get("config_hash") != facts["config_hash"]:
            changes.insert(0, "other settings")
        exact = (
            "bit-exact" if self.world.device.type == "cpu" else "all state is restored"
        )  # a GPU adds up in any order
        promise = exact if not changes else f"not bit-exact, equal to rounding: {'; '.join(changes)}"
        log.info("continuing from %s (%s)", found.path, promise)

    def build_metrics(self, state: Mapping[str, Any] | None, examples: int) -> MetricsLog:
        config, run = self.config, self.run_
        shown = dict(run.plain)
        if self.world.is_main:
            rundir.truncate(
                self.run_dir, examples=examples, metrics_offset=state["metrics"]["offset"] if state else 0
            )
            made = rundir.provenance(
                config_hash=run.config_hash,
                config_hash_no_seed=run.config_hash_no_seed,
                command=[Path(sys.argv[0]).name, *sys.argv[1:]],
                seed=config.seed,
                root=ROOT,
            )
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
                reference=(lambda: self.models.reference_scorer) if self.loss.needs.reference else None,
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
            "exp_name": self.name,
            "loss": self.run_.plain["loss"]["name"],
            "splits": splits,
        }

    def watched(self, trainer: Trainer) -> float | None:
        """The stopper's metric, else the first split's loss: what a sweep minimises or compares."""
        flat = {k: v for done in trainer.last_evaluation.values() for k, v in done.metrics.items()}
        stopper = trainer.parts.stopper
        name = next((f"{done.prefix}/loss" for done in trainer.last_evaluation.values()), None)
        if stopper.metric is not None:
            name = stopper.name_in(flat)
        return flat.get(name) if name else None
