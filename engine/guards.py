"""Watchmen of the loop: numbers that are not finite, sudden spikes, signals, and what the loss has to say about its metrics."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from losses.types import advice
from utils import UserError, log, rank, write_atomic


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite; no parameter has moved."""


class NonFiniteGuard:
    """Stands between the backward pass and the optimizer: a step that is not finite is never taken.

    mode             "raise": stop with the step's uids in ``bad_batch-step-<N>.json``; "skip": leave the step out
    max_consecutive  skipped steps in a row that "skip" bears; one more raises
    """

    def __init__(self, run_dir: Path, mode: str = "raise", max_consecutive: int = 3) -> None:
        if mode not in ("raise", "skip"):
            raise UserError(f"nonfinite={mode}: must be raise or skip")
        if max_consecutive < 1:
            raise UserError(f"max_consecutive_nonfinite={max_consecutive}: must be at least 1")
        self.run_dir, self.mode, self.max_consecutive = Path(run_dir), mode, max_consecutive
        self.skipped = 0
        self.consecutive = 0

    def check(
        self, finite: bool, step: int, uids: Sequence[str], facts: Mapping[str, Any] | None = None
    ) -> bool:
        """True: take the step. ``finite`` must be what all ranks agreed on, so that all act alike.

        uids   of the examples to blame, as narrow as the caller knows
        facts  written beside them (loss, gradient norm, ...)

        Raises NonFiniteError in mode "raise", or when too many steps in a row were skipped.
        """
        if finite:
            self.consecutive = 0
            return True
        self.skipped += 1
        self.consecutive += 1
        path = self.run_dir / f"bad_batch-step-{step}.json"
        if rank() == 0:
            told = {
                k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in (facts or {}).items()
            }
            write_atomic(path, json.dumps({"step": step, "uids": list(uids), **told}, indent=1) + "\n")
        message = f"step {step}: loss or gradient is not finite; its {len(uids)} examples are in {path}"
        if self.mode == "raise":
            raise NonFiniteError(
                f"{message}; no parameter was changed (nonfinite=skip leaves such steps out)"
            )
        if self.consecutive > self.max_consecutive:
            raise NonFiniteError(
                f"{message}; {self.consecutive} steps in a row, more than max_consecutive_nonfinite={self.max_consecutive}"
            )
        log.warning("%s; skipped (%d so far)", message, self.skipped)
        return False

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "consecutive": self.consecutive}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.skipped, self.consecutive = state["skipped"], state["consecutive"]


class SpikeGuard:
    """Warns when the loss or the gradient norm jumps above a multiple of its moving average, and keeps the uids.

    Nothing is rolled back or skipped: a spike is a hint about data or learning rate. The average is of absolute values
    (losses may be negative), over about ``window`` steps; it judges only after that many. A spike enters it clipped to
    the limit, so one outlier does not blind it and a lasting change of level is learnt.

    factor  > 1, or None: off
    """

    def __init__(self, factor: float | None = 10.0, window: int = 50, run_dir: Path | None = None) -> None:
        if factor is not None and not factor > 1:
            raise UserError(f"spike_factor={factor}: must be > 1, or null to switch it off")
        if window < 1:
            raise UserError(f"spike_window={window}: must be at least 1 step")
        self.factor, self.window, self.run_dir = factor, window, run_dir
        self.count = 0
        self.steps = 0
        self.means: dict[str, float] = {}

    def update(self, step: int, loss: float, grad_norm: float, uids: Sequence[str]) -> list[str]:
        """Take in one step (global values, the same on every rank). Names what spiked: "loss", "grad_norm"."""
        if self.factor is None:
            return []
        spiked = []
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                continue  # NonFiniteGuard's business
            size = abs(value)
            mean = self.means.get(name, size)
            limit = self.factor * mean
            if self.steps >= self.window and size > limit:
                spiked.append(name)
                log.warning(
                    "step %d: %s %.4g is over %g x its average %.4g", step, name, value, self.factor, mean
                )
                size = limit
            # the first steps weigh alike, so the average is not ruled by where it began
            weight = max(2.0 / (self.window + 1), 1.0 / (self.steps + 1))
            self.means[name] = mean + weight * (size - mean)
        self.steps += 1
        if spiked:
            self.count += 1
            self._record(
                {"step": step, "spiked": spiked, "loss": loss, "grad_norm": grad_norm, "uids": list(uids)}
            )
        return spiked

    def _record(self, row: Mapping[str, Any]) -> None:
        if self.run_dir is not None and rank() == 0:
            with (Path(self.run_dir) / "spikes.jsonl").open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "steps": self.steps, "means": dict(self.means)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.steps, self.means = state["count"], state["steps"], dict(state["means"])


class Adviser:
    """Logs what the loss advises about the metrics of the last ``window`` training rows or more; each kind of advice once.

    Nothing depends on it, so it is in no checkpoint: a continued run may repeat itself.
    """

    WINDOW = 1000  # rows

    def __init__(self, loss: Any, window: int = WINDOW) -> None:
        self.loss, self.window = loss, window
        self.said: set[str] = set()
        self._clear()

    def _clear(self) -> None:
        self.rows = 0
        self.totals: dict[str, tuple[float, float]] = {}  # name -> sum, count

    def update(self, step: int, totals: Mapping[str, tuple[float, float]], rows: int) -> None:
        """Take in one step's sums and counts of every metric (global values), and judge when the window is full."""
        for name, (value, count) in totals.items():
            before = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (before[0] + value, before[1] + count)
        self.rows += rows
        if self.rows >= self.window:
            self.judge(step)

    def judge(self, step: int) -> None:
        """Say what is to be said about the rows since the last time."""
        means = {name: value / count for name, (value, count) in self.totals.items() if count}
        found = advice(self.loss, means, {name: count for name, (_, count) in self.totals.items()})
        for kind, text in found.items():
            if kind not in self.said:
                self.said.add(kind)
                log.warning("step %d: %s", step, text)
        self._clear()


class SignalFlag:
    """While open, SIGTERM and SIGINT only set a flag, which the loop reads between steps; a second one exits at once.

    A launcher passes on the signal that the terminal or the scheduler has already sent to the whole process group, so
    what follows the first within ``ECHO_S`` seconds is taken for the same signal.
    The handler does no I/O and no collectives: it may run in the middle of either. Main thread only.
    """

    ECHO_S = 1.0
    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.number: int | None = None
        self._at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> SignalFlag:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > self.ECHO_S:
            os._exit(128 + number)

    @property
    def is_set(self) -> bool:
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after SIGINT, 0 without a signal."""
        return 0 if self.number is None else 128 + self.number
