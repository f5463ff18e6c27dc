"""When to cut the learning rate, when to stop, and which evaluation was the best."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.metric_names import direction
from utils import UserError, did_you_mean, log

# The reference code counts patience in units of 10 evaluations at eval_every=192.
REFERENCE_PATIENCE = 10 * 192
# A learning rate within this factor of stopping.min_lr counts as having reached it.
AT_MIN_LR = 1.001


@dataclass(frozen=True)
class Decision:
    """What an evaluation means for the run. ``lr_scale`` multiplies the schedule's learning rate from now on."""

    lr_scale: float = 1.0
    cut: bool = False
    stop: bool = False
    is_best: bool = False


@dataclass(frozen=True)
class NoStopping:
    """Train to the end of the plan."""

    def build(self, *, lr: float, num_examples: int, eval_every: int) -> Never:
        return Never()


class Never:
    """Changes nothing, remembers nothing."""

    metric: str | None = None
    restores_best = False
    stopped = False

    def update(self, metrics: Mapping[str, float], step: int, examples: int) -> Decision:
        return Decision()

    def best_examples(self) -> int | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:
            raise UserError("stopping=none: the checkpoint was made with a stopping rule; use the one it had")


@dataclass(frozen=True)
class Plateau:
    """Cut the learning rate when a validation metric has stopped improving; stop when the rate reaches ``min_lr``.

    Source: the rule of Ramesh et al. 2024 (arXiv 2405.20304, App. D), there torch's ReduceLROnPlateau with mode max on
    the negative loss. With a relative threshold that takes a loss up to 0.1 % *worse* for an improvement, so a flat loss
    never cut. Here an improvement of x over the best so far is more than ``threshold * |best|`` in the good direction,
    whatever the sign of the metric; for positive losses (min) and accuracies (max) that is what torch does.

    metric            full name, e.g. eval/loss/worst_group; in a run with one group the pooled metric stands for it
    scheduler_metric  the reference's key; replaces ``metric``: loss | accuracy -> eval/loss/worst_group |
                      eval/rewards/accuracies/worst_group
    mode              None: by the name (min for losses, max for accuracies and win rates)
    threshold         >= 0, relative
    patience          >= 0 evaluations without improvement are borne; the next one cuts
    patience_factor   the reference's key; replaces ``patience`` by 10 * (192 / eval_every) * patience_factor, rounded
                      down, which is when its comparison of a count with that fraction fires
    factor            in (0, 1): of each cut
    min_lr            > 0: stop when a cut takes the learning rate to (or within 0.1 % of) this, or below
    cooldown          evaluations after a cut during which nothing is counted
    restore_best      end with the weights of the best evaluation instead of the last
    only_if_train_examples_over   None, or: smaller training sets run without this rule (the reference: 2000)
    """

    metric: str = "eval/loss/worst_group"
    scheduler_metric: Literal["loss", "accuracy"] | None = None
    mode: Literal["min", "max"] | None = None
    threshold: float = 1e-3
    patience: int = 4
    patience_factor: float | None = None
    factor: float = 0.1
    min_lr: float = 1e-8
    cooldown: int = 0
    restore_best: bool = True
    only_if_train_examples_over: int | None = None

    def __post_init__(self) -> None:
        if self.watched_mode() is None:
            raise UserError(
                f"stopping.mode=null: whether {self.watched()} should fall or rise is unknown; give min or max"
            )
        if not (math.isfinite(self.threshold) and self.threshold >= 0):
            raise UserError(f"stopping.threshold={self.threshold}: must be >= 0; try 0.001")
        if self.patience < 0:
            raise UserError(f"stopping.patience={self.patience}: must be >= 0 evaluations")
        if self.patience_factor is not None and not self.patience_factor > 0:
            raise UserError(
                f"stopping.patience_factor={self.patience_factor}: must be > 0, or null to use patience"
            )
        if not 0 < self.factor < 1:
            raise UserError(f"stopping.factor={self.factor}: must be between 0 and 1; try 0.1")
        if not self.min_lr > 0:
            raise UserError(f"stopping.min_lr={self.min_lr}: must be > 0, or the run never stops; try 1e-8")
        if self.cooldown < 0:
            raise UserError(f"stopping.cooldown={self.cooldown}: must be >= 0 evaluations")

    def watched(self) -> str:
        """The metric's full name."""
        if self.scheduler_metric is None:
            return self.metric
        return {"loss": "eval/loss/worst_group", "accuracy": "eval/rewards/accuracies/worst_group"}[
            self.scheduler_metric
        ]

    def watched_mode(self) -> str | None:
        """min or max; None where the name does not tell."""
        return self.mode or direction(self.watched())

    def watched_patience(self, eval_every: int) -> int:
        """Evaluations without improvement that are borne; ``eval_every`` in training examples."""
        if self.patience_factor is None:
            return self.patience
        return math.floor(REFERENCE_PATIENCE / eval_every * self.patience_factor)

    def build(self, *, lr: float, num_examples: int, eval_every: int) -> PlateauRule | Never:
        """lr: the peak rate; num_examples: rows of the training set; eval_every: training examples."""
        limit = self.only_if_train_examples_over
        if limit is not None and num_examples <= limit:
            log.warning(
                "stopping.only_if_train_examples_over=%d: %d examples, no stopping rule", limit, num_examples
            )
            return Never()
        if lr <= self.min_lr * AT_MIN_LR:
            raise UserError(
                f"stopping.min_lr={self.min_lr}: the run starts at lr={lr}, which is not above it"
            )
        return PlateauRule(self, lr, self.watched_patience(eval_every))


class PlateauRule:
    """The state of `Plateau`. Two values are kept apart: ``best`` (strictly best, names the checkpoint to restore) and
    ``reference`` (what an improvement is measured against; moves only by more than the threshold)."""

    def __init__(self, settings: Plateau, lr: float, patience: int) -> None:
        self.settings, self.lr, self.patience = settings, lr, patience
        self.metric, self.sign = settings.watched(), 1.0 if settings.watched_mode() == "min" else -1.0
        self.restores_best = settings.restore_best
        self.cuts = 0
        self.bad = 0  # evaluations since the last improvement (or cut)
        self.cooling = 0
        self.reference: float | None = None
        self.best: dict[str, float | int] | None = None  # value, step, examples

    def update(self, metrics: Mapping[str, float], step: int, examples: int) -> Decision:
        """Take in one evaluation. Raises UserError when the metric is not among ``metrics``."""
        value = self._read(metrics)
        is_best = math.isfinite(value) and (self.best is None or self.sign * (self.best["value"] - value) > 0)
        if is_best:
            self.best = {"value": value, "step": step, "examples": examples}
        if self._improves(value):
            self.reference, self.bad = value, 0
        else:
            self.bad += 1
        if self.cooling > 0:
            self.cooling, self.bad = self.cooling - 1, 0
        cut = self.bad > self.patience
        if cut:
            self.cuts, self.bad, self.cooling = self.cuts + 1, 0, self.settings.cooldown
            log.info("%s=%g: no improvement, learning rate x %g", self.metric, value, self.settings.factor)
        return Decision(self.lr_scale, cut, self.stopped, is_best)

    @property
    def lr_scale(self) -> float:
        return self.settings.factor**self.cuts

    @property
    def stopped(self) -> bool:
        """The learning rate has reached its floor: the run is over, also if it is started again."""
        return self.lr * self.lr_scale <= self.settings.min_lr * AT_MIN_LR

    def _improves(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.reference is None:
            return True
        return self.sign * (self.reference - value) > self.settings.threshold * abs(self.reference)

    def name_in(self, metrics: Mapping[str, float]) -> str | None:
        """The watched metric's name among ``metrics``: of one group, which is the worst and the mean, the pooled one."""
        pooled = self.metric.removesuffix("/worst_group").removesuffix("/mean_group")
        grouped = any(key.startswith(f"{pooled}/group_") for key in metrics)
        names = (self.metric,) if grouped else (self.metric, pooled)
        return next((name for name in names if name in metrics), None)

    def _read(self, metrics: Mapping[str, float]) -> float:
        name = self.name_in(metrics)
        if name is None:
            raise UserError(
                f"stopping.metric={self.metric}: the evaluation has no such metric{did_you_mean(self.metric, metrics)}; "
                "is its split in eval_splits, and does the data have it?"
            )
        value = float(metrics[name])
        if not math.isfinite(value):
            log.warning("%s=%g: not finite, counted as no improvement", name, value)
        return value

    def best_examples(self) -> int | None:
        """Training examples at the best evaluation so far."""
        return None if self.best is None else int(self.best["examples"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "cuts": self.cuts,
            "bad": self.bad,
            "cooling": self.cooling,
            "reference": self.reference,
            "best": None if self.best is None else dict(self.best),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("metric") != self.metric:
            # allowed by the user (resume_allow): the old counts mean nothing for another metric
            log.warning(
                "stopping: the checkpoint watched %s, now %s; starting to count anew",
                state.get("metric"),
                self.metric,
            )
            return
        self.cuts, self.bad, self.cooling = state["cuts"], state["bad"], state["cooling"]
        self.reference = state["reference"]
        self.best = None if state["best"] is None else dict(state["best"])
