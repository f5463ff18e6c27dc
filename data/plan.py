"""Which rows make which optimizer step: a pure function of (seed, rows, step), so the data position needs no state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.schema import Row
from utils import UserError, stream


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 (hex) over everything a step can depend on: ids, roles, uids, groups, weights and scalars of all rows."""
    arrays = [array for row in rows for array in (row.prompt, *row.responses)]
    digest = hashlib.sha256()
    for block in (
        np.array([len(array) for array in arrays], dtype="<i8"),
        np.concatenate(arrays).astype("<i4", copy=False) if arrays else np.empty(0, "<i4"),
        np.array([row.group for row in rows], dtype="<i8"),
        np.array([row.weight for row in rows], dtype="<f8"),
    ):
        digest.update(block.tobytes())
    # of rows without scalars nothing is written: naming them costs more than all the rest
    scalars = [
        (i, dict(row.scalars), dict(row.response_scalars))
        for i, row in enumerate(rows)
        if row.scalars or row.response_scalars
    ]
    names = [[row.uid for row in rows], [row.roles for row in rows], scalars]
    digest.update(json.dumps(names, sort_keys=True, separators=(",", ":")).encode())
    return digest.hexdigest()


class _Units:
    """Rows that stay adjacent: all rows of one prompt (and stratum) in data order, or every row by itself."""

    def __init__(self, rows: Sequence[Row], strata: np.ndarray, sep_pairs: bool) -> None:
        if sep_pairs:
            unit = np.arange(len(rows))
        else:
            known: dict[tuple[int, str], int] = {}
            keys = zip(strata.tolist(), (row.prompt_key for row in rows), strict=True)
            unit = np.array([known.setdefault(key, len(known)) for key in keys], dtype=np.int64)
        self.rows = np.argsort(unit, kind="stable")  # rows, unit by unit
        self.sizes = np.bincount(unit)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.strata = strata[self.rows[self.starts]]  # (U,)

    def __len__(self) -> int:
        return len(self.sizes)

    def rows_of(self, units: np.ndarray) -> np.ndarray:
        """The rows of the given units, in the given order of units."""
        sizes = self.sizes[units]
        before = np.cumsum(sizes) - sizes
        return self.rows[np.repeat(self.starts[units] - before, sizes) + np.arange(sizes.sum())]


@dataclass(frozen=True)
class _Position:
    """Where the stratified stream of rows stands at the start of an epoch."""

    epoch: int
    queues: tuple[np.ndarray, ...]  # per stratum: the units left in its current permutation
    pending: np.ndarray  # rows of a unit that the last epoch's end cut in two


class Plan:
    """Step -> row indices.

    Units are prompts (all pairs of a prompt adjacent, in data order); with ``sep_pairs`` every row is its own unit.

    Plain: every epoch is a permutation of all units from ``stream(seed, "plan", epoch)``; each row once an epoch, the
    last batch of an epoch may be short. Stratified (``strata``, ``strata_probs``): each position of the stream of units
    draws a stratum, which gives the next unit of its own permutation; a stratum starts a new permutation when its own
    is used up, so rows repeat only after the whole stratum was seen. An epoch is then ``len(rows)`` rows. Units of
    stratum s are drawn with probability proportional to ``strata_probs[s] / (mean unit size of s)``, so that the share
    of ROWS of s is ``strata_probs[s]`` however many pairs its prompts have.

    rows          what the indices point into
    seed          of the named streams; nothing else is random
    batch_size    rows of an optimizer step, over all ranks and micro-batches
    n_epochs      passes; ``n_examples``: rows; the smaller wins, and the last batch stops exactly at ``n_examples``
    strata        (N,) stratum of every row; ``strata_probs``: (S,) non-negative, normalised here
    num_groups    G, when the last groups may have no row

    Raises UserError for impossible settings.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        seed: int,
        batch_size: int,
        n_epochs: int | None = None,
        n_examples: int | None = None,
        sep_pairs: bool = False,
        strata: Sequence[int] | np.ndarray | None = None,
        strata_probs: Sequence[float] | np.ndarray | None = None,
        num_groups: int | None = None,
    ) -> None:
        if not rows:
            raise UserError(
                "the training data has no rows; check datasets= and the truncation counts in the log"
            )
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        if n_epochs is None and n_examples is None:
            raise UserError("n_epochs=null and n_examples=null: set one of them, for example n_epochs=1")
        for key, value in (("n_epochs", n_epochs), ("n_examples", n_examples)):
            if value is not None and value < 1:
                raise UserError(f"{key}={value}: must be at least 1")
        if (strata is None) != (strata_probs is None):
            raise ValueError("strata and strata_probs go together")
        self._data = rows
        self.seed = seed
        self.batch_size = batch_size
        self.rows_per_epoch = len(rows)
        limits = [n_epochs * len(rows) if n_epochs else None, n_examples]
        self.num_examples = min(limit for limit in limits if limit is not None)
        self._steps_per_epoch = -(-len(rows) // batch_size)
        whole, rest = divmod(self.num_examples, len(rows))
        self.num_steps = whole * self._steps_per_epoch + -(-rest // batch_size)

        groups = np.array([row.group for row in rows], dtype=np.int64)
        self.group_counts = np.bincount(groups, minlength=num_groups or 0)  # (G,)
        stratum = (
            np.zeros(len(rows), dtype=np.int64) if strata is None else np.asarray(strata, dtype=np.int64)
        )
        self._units = _Units(rows, stratum, sep_pairs)
        self._orders: dict[int, np.ndarray] = {}  # the epoch last asked for
        self._probs: np.ndarray | None = None
        if strata_probs is None:
            self.group_probs = self.group_counts / len(rows)  # (G,)
            return
        self._probs = _checked_probs(stratum, np.asarray(strata_probs, dtype=np.float64), len(rows))
        num_strata = len(self._probs)
        table = np.zeros((num_strata, len(self.group_counts)))
        np.add.at(table, (stratum, groups), 1.0)
        self.group_probs = self._probs @ (table / np.maximum(table.sum(1, keepdims=True), 1.0))
        members = [np.flatnonzero(self._units.strata == s) for s in range(num_strata)]
        mean_size = np.array([self._units.sizes[m].mean() if len(m) else 1.0 for m in members])
        self._unit_probs = self._probs / mean_size / (self._probs / mean_size).sum()
        self._members = members
        self._position = self._start()

    @cached_property
    def fingerprint(self) -> str:
        """Of the data, not of the settings: see :func:`fingerprint`."""
        return fingerprint(self._data)

    def epoch_of(self, step: int) -> int:
        """0-based epoch of a 0-based step."""
        return step // self._steps_per_epoch

    def examples_before(self, step: int) -> int:
        """Rows consumed when ``step`` begins."""
        epoch, position = divmod(step, self._steps_per_epoch)
        return min(epoch * self.rows_per_epoch + position * self.batch_size, self.num_examples)

    def step_rows(self, step: int) -> np.ndarray:
        """(b,) int64 row indices of a 0-based step; b <= batch_size, short at the end of an epoch or of the run."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of a plan of {self.num_steps} steps")
        first = self.examples_before(step) - self.epoch_of(step) * self.rows_per_epoch
        count = self.examples_before(step + 1) - self.examples_before(step)
        return self._order(self.epoch_of(step))[first : first + count]

    def _order(self, epoch: int) -> np.ndarray:
        """(N,) the rows of an epoch in order."""
        if epoch not in self._orders:
            if self._probs is None:
                units = stream(self.seed, "plan", epoch).permutation(len(self._units))
                order = self._units.rows_of(units)
            else:
                order = self._stratified_order(epoch)
            self._orders = {epoch: order}
        return self._orders[epoch]

    # ---------------------------------------------------------------------------------------------- stratified

    def _start(self) -> _Position:
        empty = np.empty(0, dtype=np.int64)
        return _Position(0, (empty,) * len(self._members), empty)

    def _stratified_order(self, epoch: int) -> np.ndarray:
        position = self._position if self._position.epoch <= epoch else self._start()
        while True:
            order, following = self._advance(position)
            if position.epoch == epoch:
                self._position = position  # not `following`: this epoch may be asked for again
                return order
            position = following

    def _advance(self, at: _Position) -> tuple[np.ndarray, _Position]:
        """One epoch of the stratified stream, and where the next one starts."""
        missing = self.rows_per_epoch - len(at.pending)
        # `missing` units always suffice, for a unit has at least one row
        draws = stream(self.seed, "plan/strata", at.epoch).choice(
            len(self._members), size=missing, p=self._unit_probs
        )
        units = np.empty(missing, dtype=np.int64)
        queues = []
        for s, members in enumerate(self._members):
            where = np.flatnonzero(draws == s)
            queue = at.queues[s]
            if (cycles := -(-(len(where) - len(queue)) // max(len(members), 1))) > 0:
                fresh = np.broadcast_to(members, (cycles, len(members)))
                shuffled = stream(self.seed, "plan/stratum", s, at.epoch).permuted(fresh, axis=1)
                queue = np.concatenate([queue, shuffled.ravel()])
            units[where] = queue[: len(where)]
            queues.append(queue)
        used = int(np.searchsorted(np.cumsum(self._units.sizes[units]), missing)) + 1
        taken = np.bincount(draws[:used], minlength=len(self._members))
        rows = np.concatenate([at.pending, self._units.rows_of(units[:used])])
        left = tuple(queue[count:] for queue, count in zip(queues, taken.tolist(), strict=True))
        return rows[: self.rows_per_epoch], _Position(at.epoch + 1, left, rows[self.rows_per_epoch :])


def _checked_probs(strata: np.ndarray, probs: np.ndarray, num_rows: int) -> np.ndarray:
    """(S,) normalised probabilities; UserError where a drawn stratum has no rows."""
    if strata.shape != (num_rows,) or strata.min() < 0 or strata.max() >= len(probs):
        raise ValueError(f"strata: expected {num_rows} indices below {len(probs)}")
    if not np.isfinite(probs).all() or (probs < 0).any() or probs.sum() <= 0:
        raise UserError(f"mixing weights {probs.tolist()}: must be finite, non-negative and not all zero")
    empty = np.flatnonzero((np.bincount(strata, minlength=len(probs)) == 0) & (probs > 0))
    if len(empty):
        raise UserError(
            f"mixing weights {probs.tolist()}: entry {empty[0]} has a weight but no training rows"
        )
    return probs / probs.sum()


def micro_batches(
    rows: Sequence[Row], indices: np.ndarray, *, num_micro: int | None = None, tokens: int | None = None
) -> list[np.ndarray]:
    """The fixed composition of one optimizer step: contiguous parts of ``indices``, in order, none empty.

    num_micro   that many parts with sizes that differ by at most one (fewer parts when there are fewer rows)
    tokens      as many rows a part as fit this budget of tokens; a prompt counts once for consecutive rows that share
                it; a row above the budget gets a part of its own
    """
    if (num_micro is None) == (tokens is None):
        raise ValueError("micro_batches: give exactly one of num_micro and tokens")
    if num_micro is not None:
        return np.array_split(indices, min(num_micro, len(indices))) if len(indices) else []
    cuts, used, last = [], 0, ""
    for position, index in enumerate(indices.tolist()):
        row = rows[index]
        cost = row.num_tokens - (len(row.prompt) if position and row.prompt_key == last else 0)
        if position and used + cost > tokens:
            cuts.append(position)
            used, cost = 0, row.num_tokens
        used, last = used + cost, row.prompt_key
    return np.split(indices, cuts) if len(indices) else []
