"""THE training loop. It knows no loss, no weighting and no layout by name: it asks each part what it needs.

One optimizer step, whatever the micro-batches, ranks and memory layout, is ``Trainer.step``; everything else decides
when to evaluate, save and stop.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from config.schema import Config
from data.plan import Plan, micro_batches
from data.schema import Batch, Row
from engine import checkpoint, runtime, sharded
from engine.evaluation import Evaluation, Evaluator
from engine.faults import crash_point
from engine.guards import Adviser, NonFiniteGuard, SignalFlag, SpikeGuard
from engine.metrics import MetricsLog
from engine.optim import Schedule, clip_gradients, optimizer_tensors
from engine.parallel import World
from engine.selection import Selector, row_losses
from engine.stopping import Decision
from losses.types import Loss, derived
from utils import UserError, log


@dataclass
class Parts:
    """What a trainer is made of; assembly.py builds it."""

    config: Config
    world: World
    run_dir: Path
    policy: torch.nn.Module  # the Scorer
    reference: Callable[[Batch, Sequence[str]], Any] | None
    loss: Loss
    weighting: Any
    stopper: Any
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    plan: Plan
    rows: Sequence[Row]
    evaluator: Evaluator
    metrics: MetricsLog
    model_writer: Callable[
        [], Callable[[Path], None]
    ]  # gathers the weights (collective), returns their writer
    read_model: Callable[[Path], None]
    facts: Mapping[str, Any]  # what bit-exactness depends on, written into every checkpoint's manifest
    extra_state: Mapping[str, Any]  # constants of the run that a continuation needs
    selector: Selector | None = None  # which rows of a batch are trained on; None: all
    # (rows, epoch) -> rows with new auxiliary pairs; None: the data's own
    fresh_pairs: Callable[[Sequence[Row], int], list[Row]] | None = None


class StepSums:
    """Per-group sums and counts of per-example metrics over one optimizer step, in float64. A metric's NaN is "not defined"; a
    loss's stays, for the gradient need not have one: a hinge has the slope 0 there."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.tables: dict[str, Tensor] = {}  # name -> (2, G): sums, counts

    def add(self, group: Tensor, values: Mapping[str, Tensor], live: bool) -> None:
        """Take in a micro-batch: its (B,) groups and (B,) values; nothing of it where it is not ``live``."""
        ours = (group[:, None] == torch.arange(self.num_groups)).to(values["loss"].device, non_blocking=True)
        for name, value in values.items():
            value = value.detach().double()
            defined = torch.full_like(value, live, dtype=torch.bool)
            if live and name not in ("loss", "objective"):
                defined = ~torch.isnan(value)
            stacked = torch.stack([torch.where(defined, value, 0.0), defined.double()])
            # not index_add_, which adds up in any order on a GPU
            sums = torch.where(ours, stacked[:, :, None], 0.0).sum(1)
            self.tables[name] = self.tables[name] + sums if name in self.tables else sums

    def reduce(self, world: World, norm: Tensor) -> tuple[float, bool]:
        """Sum over ranks -> (``norm``, whether a loss or the norm of any rank is not finite). From here on the sums are on
        the CPU. The step's one wait for the device."""
        names = sorted(self.tables)
        norm = norm.to(self.tables["loss"])[None]
        ours = torch.cat([*(self.tables[n].flatten() for n in names), (~norm.isfinite()).to(norm)])
        found = torch.cat([world.sum(ours), norm]).cpu()
        *sums, bad, whole = found.split([2 * self.num_groups] * len(names) + [1, 1])
        self.tables = {n: x.view(2, -1) for n, x in zip(names, sums, strict=True)}
        return float(whole), bool(bad) or not bool(self.sums("loss").isfinite().all())

    def sums(self, name: str) -> Tensor:
        return self.tables[name][0]

    def totals(self) -> dict[str, tuple[float, float]]:
        """(sum, count) over all examples."""
        return {n: (float(sums.sum()), float(counts.sum())) for n, (sums, counts) in self.tables.items()}

    def overall(self) -> dict[str, float]:
        """Means over all examples; what has count 0 is left out."""
        return {name: total / count for name, (total, count) in self.totals().items() if count > 0}

    def means(self, prefix: str, groups: Sequence[str], skip: Sequence[str] = ()) -> dict[str, float]:
        """Means over examples, overall and per group; what has count 0 is left out."""
        out = {f"{prefix}/{name}": mean for name, mean in self.overall().items() if name not in skip}
        for name, (sums, counts) in self.tables.items():
            if len(groups) > 1 and name not in skip:
                for g, label in enumerate(groups):
                    if counts[g] > 0:
                        out[f"{prefix}/{name}/group_{label}"] = float(sums[g] / counts[g])
        return out


class Trainer:
    """``train()`` runs to the end, a stop, or a signal. State that changes is in ``state_dict`` and in the checkpoint;
    the data position is not, because the plan computes it from the step."""

    def __init__(self, parts: Parts, groups: Sequence[str]) -> None:
        self.parts, self.groups = parts, tuple(groups)
        self.config, self.world, self.policy = parts.config, parts.world, parts.policy
        self.reference, self.loss, self.weighting = parts.reference, parts.loss, parts.weighting
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.step_count = 0  # optimizer updates done
        self.examples = 0  # rows consumed
        self.guard = NonFiniteGuard(
            parts.run_dir, self.config.nonfinite, self.config.max_consecutive_nonfinite
        )
        self.spike = SpikeGuard(self.config.spike_factor, run_dir=parts.run_dir)
        self.adviser = Adviser(self.loss)
        self.last_evaluation: dict[str, Evaluation] = {}
        self.evaluated_at = -1
        self.logged: list[str] = []  # splits whose evaluation at this count is in metrics.jsonl
        self.judged = False  # whether the stopper has seen that evaluation
        self.saved_at = -1
        self.exit_code = 0
        self.restored: dict[str, int] = {}

    # -------------------------------------------------------------------------------------------- one step

    def step(self) -> dict[str, float]:
        """One optimizer step over ``plan.step_rows``, or those of them that the selector keeps: the same rows give the same
        update, however they are cut. Returns what is logged."""
        config, world, needs = self.config, self.world, self.loss.needs
        indices = drawn = self.parts.plan.step_rows(self.step_count)
        if self.parts.selector is not None:
            indices = self.parts.selector(drawn, self.step_count, self.losses)
        units, group_counts = self.count(indices)  # before any forward
        sums, seen = StepSums(len(self.groups)), []
        for part, live in world.share(self.micro_batches(indices)):
            with autocast(config.precision, world.device):
                batch = self.batch(part)
                reference = self.reference(batch, needs.reference) if needs.reference else None
                policy = self.policy(batch, needs.policy, needs.tokens)
                out = self.loss(policy, reference, batch)
            weighted = batch.weight.to(out.losses, non_blocking=True) * out.losses
            robust = self.weighting.weights(batch.group, group_counts, len(part))
            robust = robust.to(out.losses, non_blocking=True)
            objective = (robust * weighted).sum() / units
            (objective * (world.gradient_scale if live else 0.0)).backward()
            sums.add(batch.group, {"loss": weighted, "objective": robust * weighted, **out.metrics}, live)
            seen += [(part, out.losses.detach())] if live else []
        world.sum_gradients(self.parameters)
        norm, broken = sums.reduce(world, clip_gradients(self.parameters, config.max_grad_norm))
        uids = self.blame(seen) if broken else [self.parts.rows[i].uid for i in indices]
        facts = {"loss": float(sums.sums("loss").sum()), "grad_norm": norm}
        # raises, if it is to, before any parameter moves
        applied = self.guard.check(not broken, self.step_count + 1, uids, facts)
        lr = self.parts.schedule.set(self.parts.optimizer, self.step_count)
        metrics = self.measured(sums, units, group_counts) | {"grad_norm": norm, "lr": lr}
        if applied:
            self.parts.optimizer.step()
            self.weighting.update(sums.sums("loss"), group_counts, len(indices))
            self.adviser.update(self.step_count + 1, sums.totals(), len(indices))
        self.parts.optimizer.zero_grad(set_to_none=True)
        self.step_count += 1
        self.examples += len(drawn)
        self.logged, self.judged, self.restored = [], False, {}
        self.spike.update(self.step_count, metrics["train/loss"], norm, uids)
        counters = {"skipped_steps": float(self.guard.skipped), "spikes": float(self.spike.count)}
        return metrics | {f"train/{k}": v for k, v in self.weighting.metrics().items()} | counters

    def measured(self, sums: StepSums, units: float, group_counts: Tensor) -> dict[str, float]:
        """What the step's sums say: means over examples, overall and per group, and the loss as it is minimised."""
        metrics = sums.means("train", self.groups, skip=("objective",))
        metrics |= {f"train/{k}": v for k, v in derived(self.loss, sums.overall()).items()}
        if len(self.groups) > 1:
            counts = zip(self.groups, group_counts.tolist(), strict=True)
            metrics |= {f"train/group_counts/group_{g}": n for g, n in counts}
        for name in ("loss", "objective"):
            metrics[f"train/{name}"] = float(sums.sums(name).sum()) / units
        return metrics

    def batch(self, part: Sequence[int]) -> Batch:
        """A micro-batch; with new auxiliary pairs every epoch where the run draws them."""
        rows = [self.parts.rows[i] for i in part]
        if self.parts.fresh_pairs is not None:
            rows = self.parts.fresh_pairs(rows, self.parts.plan.epoch_of(self.step_count))
        return Batch.collate(rows)

    def blame(self, seen: Sequence[tuple[Sequence[int], Tensor]]) -> list[str]:
        """Examples whose loss is not finite; all of the step if only the gradient is to blame."""
        found = [[self.parts.rows[i].uid for i in part] for part, _ in seen]
        bad = [
            u
            for uids, (_, losses) in zip(found, seen, strict=True)
            for u, ok in zip(uids, losses.isfinite(), strict=True)
            if not ok
        ]
        return self.world.gather(bad) or self.world.gather([u for uids in found for u in uids])

    def losses(self, indices: np.ndarray) -> np.ndarray:
        """(n,) losses of rows under the current weights, without gradient and example weights."""
        with autocast(self.config.precision, self.world.device):
            return row_losses(
                self.parts.rows,
                self.micro_batches(indices),
                world=self.world,
                loss=self.loss,
                policy=self.policy,
                reference=self.reference,
            )

    def micro_batches(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """The step's fixed cut: by count for accumulation and ranks, or by tokens."""
        config = self.config
        if config.microbatch_tokens is not None:
            return micro_batches(self.parts.rows, indices, tokens=config.microbatch_tokens)
        return micro_batches(
            self.parts.rows, indices, num_micro=config.gradient_accumulation_steps * self.world.size
        )

    def count(self, indices: Sequence[int]) -> tuple[float, Tensor]:
        """(what the loss averages over: examples or response tokens, (G,) examples per group) of the step."""
        needs, rows = self.loss.needs, self.parts.rows
        counts = torch.zeros(len(self.groups), dtype=torch.float64)
        for i in indices:
            counts[rows[i].group] += 1
        units = float(len(indices))
        if needs.unit == "token":
            units = float(
                sum(
                    len(ids)
                    for i in indices
                    for ids, role in zip(rows[i].responses, rows[i].roles, strict=True)
                    if role in needs.policy
                )
            )
        return units, counts

    # -------------------------------------------------------------------------------------------- the run

    def train(self) -> str:
        """Run until the plan ends ("finished"), the stopper says so ("stopped"), or a signal ("signal")."""
        config, plan = self.config, self.parts.plan
        save_every = config.save_every or config.eval_every
        with contextlib.ExitStack() as stack:
            signal = stack.enter_context(SignalFlag())
            if self.step_count == 0 and config.do_first_eval:
                self.evaluate(config.splits_each_time)
            bar = stack.enter_context(progress(plan.num_examples, self.examples, self.world.is_main))
            while self.step_count < plan.num_steps and not self.parts.stopper.stopped:
                start, before = time.perf_counter(), self.examples
                metrics = self.step()
                seconds = time.perf_counter() - start
                self.write("train", metrics | {"examples_per_second": (self.examples - before) / seconds})
                bar.update(self.examples - before)
                bar.set_postfix(loss=f"{metrics['train/loss']:.4g}", refresh=False)
                crash_point("after_step")
                last = self.step_count == plan.num_steps
                decision = None
                if not last and crosses(before, self.examples, config.eval_every):
                    decision = self.evaluate(config.splits_each_time)
                flagged = self.world.any(signal.is_set)
                if (
                    flagged
                    or (decision is not None and decision.stop)
                    or (not last and crosses(before, self.examples, save_every))
                ):
                    self.save()
                if flagged:
                    self.exit_code = signal.exit_code or 143
                    return "signal"
        return "stopped" if self.parts.stopper.stopped else "finished"

    def evaluate(self, splits: Sequence[str], judge: bool = True) -> Decision:
        """Evaluate ``splits`` (those that exist) and log; ask the stopper what it means, unless ``judge`` is False."""
        metrics: dict[str, float] = {}
        for split in splits:
            if split in self.parts.evaluator.splits:
                with autocast(self.config.precision, self.world.device):
                    found = self.parts.evaluator.run(split, self.policy, self.examples)
                self.last_evaluation[split] = found
                if split not in self.logged:
                    self.write("eval", found.metrics, split=found.prefix, **self.restored)
                    self.logged.append(split)
                metrics |= found.metrics
        self.parts.evaluator.sample(self.policy, self.examples)
        self.evaluated_at = self.examples
        if self.judged or not judge:
            return Decision(self.parts.schedule.scale)
        self.judged = True
        decision = self.parts.stopper.update(metrics, self.step_count, self.examples)
        self.parts.schedule.scale = decision.lr_scale
        if decision.cut:
            self.weighting.on_lr_cut()
        if decision.is_best and self.parts.stopper.restores_best:
            self.save()  # or there would be nothing to restore
        return decision

    def finish(self) -> None:
        """Restore the best weights if asked to, evaluate every split once, save."""
        self.adviser.judge(self.step_count)
        stopper = self.parts.stopper
        if stopper.restores_best and not (self.judged or self.restored):
            self.evaluate(list(self.parts.evaluator.splits))  # the plan's last weights may be the best
        restored = stopper.best_examples() if stopper.restores_best else None
        if (
            restored == self.examples or self.restored
        ):  # the latter: this start continued from what is saved below
            restored = None
        if restored is not None:
            log.info("restoring the best checkpoint, step-%d", restored)
            path = self.parts.run_dir / f"step-{restored}"
            try:
                self.parts.read_model(path)
            except checkpoint.CheckpointError as error:
                raise UserError(
                    f"the best checkpoint cannot be restored: {error}; delete {path} and start again"
                ) from error
            self.evaluated_at = self.saved_at = -1  # LATEST holds what was reported
            self.restored = {"restored_from": restored}
            self.logged = []
        missing = [s for s in self.parts.evaluator.splits if s not in self.last_evaluation]
        if self.evaluated_at != self.examples or missing:
            self.evaluate(list(self.parts.evaluator.splits), judge=not self.restored)
        self.save()

    # -------------------------------------------------------------------------------------------- records, state

    def write(self, kind: str, values: Mapping[str, float], **more: Any) -> None:
        """One line of metrics.jsonl."""
        epoch = self.parts.plan.epoch_of(max(self.step_count - 1, 0))
        self.parts.metrics.write(
            kind,
            step=self.step_count,
            examples=self.examples,
            values=values,
            epoch=epoch,
            time=time.time(),
            **more,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes and cannot be computed, as JSON-able values (the optimizer's tensors aside)."""
        return {
            **self.parts.extra_state,
            "step": self.step_count,
            "examples": self.examples,
            "schedule": self.parts.schedule.state_dict(),
            "weighting": self.weighting.state_dict(),
            "stopper": self.parts.stopper.state_dict(),
            "guard": self.guard.state_dict(),
            "spike": self.spike.state_dict(),
            "evaluation": {"logged": self.logged, "judged": self.judged, "restored": self.restored},
            "metrics": self.parts.metrics.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], here: bool = True) -> None:
        """``here``: of a checkpoint in this run directory, which then holds what was saved and logged as well."""
        self.step_count, self.examples = state["step"], state["examples"]
        self.parts.schedule.load_state_dict(state["schedule"])
        self.weighting.load_state_dict(state["weighting"])
        self.parts.stopper.load_state_dict(state["stopper"])
        self.guard.load_state_dict(state["guard"])
        self.spike.load_state_dict(state["spike"])
        self.evaluated_at = self.examples
        if here:
            evaluation = state["evaluation"]
            self.logged, self.judged = list(evaluation["logged"]), evaluation["judged"]
            self.restored = dict(evaluation["restored"])
            self.saved_at = self.examples
        stopper, run_dir = self.parts.stopper, self.parts.run_dir
        best = stopper.best_examples() if stopper.restores_best else None
        if best is not None and not (run_dir / f"step-{best}").is_dir():
            log.warning(
                "the best checkpoint, step-%d, is not in %s: the best from here on counts", best, run_dir
            )
            stopper.best = None

    def save(self) -> None:
        """Commit a checkpoint of this step (once). Gathering is collective, writing is rank 0's, but for shards."""
        if self.saved_at == self.examples:
            return
        is_sharded, named = self.config.checkpoint.format == "sharded", dict(self.policy.named_parameters())
        gather = (lambda tensor: tensor) if is_sharded else self.world.to_main
        tensors, scalars = optimizer_tensors(self.parts.optimizer, named.items(), gather=gather)
        write_model, shards = self.parts.model_writer(), None
        if is_sharded:
            shards = sharded.write(self.world, self.parts.run_dir, self.examples, named | tensors)

        def commit() -> None:
            checkpoint.save(
                self.parts.run_dir,
                self.examples,
                write_model=write_model,
                optimizer=None if is_sharded else tensors,
                shards=shards,
                state=self.state_dict() | {"optimizer": scalars},
                facts=self.parts.facts,
                keep=self.config.checkpoint.keep,
                best=self.parts.stopper.best_examples(),
            )

        self.world.on_main(commit)
        self.saved_at = self.examples


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 arithmetic over fp32 weights, or nothing. Sets how float32 is multiplied, in the backward pass too."""
    runtime.set_products(precision, device)
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def progress(total: int, initial: int, active: bool) -> tqdm:
    """A bar with rows, rate and ETA; in a log file a line every 30 seconds."""
    every = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        initial=initial,
        unit="row",
        desc="train",
        mininterval=every,
        disable=not active,
        dynamic_ncols=True,
    )


def crosses(before: int, after: int, every: int) -> bool:
    """True if a multiple of ``every`` lies in (before, after]."""
    return after // every > before // every
