"""How much each group's examples count: uniformly, by fixed weights, or by how badly the group is doing.

A settings dataclass (its fields are the keys of config/weighting/<name>.yaml) builds a state object, which the loop uses as

    w = state.weights(batch.group, step_counts, micro_size)     multiplies the micro-batch's per-example losses; the loop then
                                                                divides by the number of examples B of the whole step
    state.update(loss_sums, step_counts, num_examples)          once per optimizer step
    state.on_lr_cut()                                           whenever the stopping rule cuts the learning rate

With p_g the probability with which the batch plan draws group g (N_g/N for plain epochs, the mixing weight for mixtures, 1/K
for uniform group sampling), sum_{i in g} loss_i / (B p_g) is an unbiased estimate of group g's mean loss, however it is
sampled. So an example of a group with weight a_g counts a_g / p_g. State is float64 and lives on the CPU; equal inputs give
equal state on every rank. Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils import UserError, did_you_mean

Vector = Sequence[float] | np.ndarray | Tensor  # (G,)


def _require(ok: bool, key: str, value: object, rule: str) -> None:
    if not ok:
        raise UserError(f"weighting.{key}={value}: {rule}")


def _check_drawn(groups: Sequence[str], counts: Sequence[int], probs: Sequence[float]) -> None:
    """Every group must be drawn: a weight on a group that never appears in a batch means nothing."""
    assert len(groups) == len(counts) == len(probs) and abs(sum(probs) - 1) < 1e-6, (
        "one count and probability per group"
    )
    for name, count, p in zip(groups, counts, probs, strict=True):
        if count <= 0 or p <= 0:
            raise UserError(
                f"weighting: group {name!r} has {count} training examples and is drawn with probability {p}; "
                "group weights need every group in training: drop the group or use weighting=uniform"
            )


def _array(values: Vector) -> np.ndarray:
    """(G,) float64 on the CPU."""
    return torch.as_tensor(values, dtype=torch.float64).cpu().numpy()


def _check_groups(saved: Sequence[str], groups: Sequence[str]) -> None:
    if list(saved) != list(groups):
        raise UserError(
            f"the checkpoint has group weights for {list(saved)}, this run has groups {list(groups)}"
        )


# ------------------------------------------------------------------------------------------------------- fixed weights


class FixedWeights:
    """Weights that never change. group_weights (G,) is what each group's mean loss counts in the objective (sums to one),
    example_weights (G,) what multiplies an example's loss."""

    def __init__(self, groups: Sequence[str], group_weights: np.ndarray, example_weights: np.ndarray) -> None:
        self._groups = tuple(groups)
        self._group_weights = group_weights
        self._example_weights = torch.from_numpy(example_weights)

    def weights(self, group: Tensor, step_counts: Vector, micro_size: int) -> Tensor:
        """(B,) float64 on the CPU from (B,) int64 group indices."""
        return self._example_weights[group.cpu()]

    def update(self, loss_sums: Vector, step_counts: Vector, num_examples: float) -> dict[str, float]:
        """Nothing to learn from the losses; returns ``metrics()``."""
        return self.metrics()

    def on_lr_cut(self) -> None:
        """A cut of the learning rate does not concern fixed weights."""

    def metrics(self) -> dict[str, float]:
        """``weights/<group>``: the weight of the group's mean loss in the objective."""
        return {
            f"weights/{name}": float(w) for name, w in zip(self._groups, self._group_weights, strict=True)
        }

    def state_dict(self) -> dict:
        """JSON-able."""
        return {"groups": list(self._groups)}

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError when the checkpoint's groups are not this run's."""
        _check_groups(state["groups"], self._groups)


@dataclass(frozen=True)
class Uniform:
    """Every example counts the same, so group g's mean loss counts p_g."""

    def build(self, groups: Sequence[str], counts: Sequence[int], probs: Sequence[float]) -> FixedWeights:
        return FixedWeights(groups, np.asarray(probs, dtype=np.float64), np.ones(len(groups)))


@dataclass(frozen=True)
class ImportanceWeighted:
    """Fixed group weights: the objective is sum_g w_g * (mean loss of group g), so an example counts w_g / p_g.

    imp_weights  list in group order, or dict by group name; finite, >= 0, normalised to sum one. None: importance sampling
                 proper, every example counts 1/N_g, which is w_g = 1/K for every group (Ramesh et al. 2024, arXiv
                 2405.20304, the chi = 0 end of their trade-off).

    Raises UserError (here and in ``build``) for a wrong length, unknown or missing names, and weights that cannot be normalised.
    Deviation from rsshyam/Group-robust-preference-optimization: there 1/N_g is put on the group *means*, i.e. counted twice, and
    given weights are not normalised. imp_weights=[1/N_1, ...] reproduces the former.
    """

    imp_weights: list[float] | dict[str, float] | None = None

    def build(self, groups: Sequence[str], counts: Sequence[int], probs: Sequence[float]) -> FixedWeights:
        _check_drawn(groups, counts, probs)
        given = self.imp_weights
        if isinstance(given, dict):
            for name in given:
                _require(
                    name in groups,
                    f"imp_weights.{name}",
                    given[name],
                    f"no such group{did_you_mean(name, groups)}",
                )
            missing = [name for name in groups if name not in given]
            _require(not missing, "imp_weights", given, f"no weight for group {', '.join(missing)}")
            given = [given[name] for name in groups]
        elif given is None:
            given = [1.0] * len(groups)
        _require(
            len(given) == len(groups),
            "imp_weights",
            given,
            f"{len(given)} weights for {len(groups)} groups {list(groups)}",
        )
        ok = all(math.isfinite(w) and w >= 0 for w in given) and sum(given) > 0
        _require(ok, "imp_weights", given, "weights must be finite, >= 0 and not all 0")
        group_weights = np.asarray(given, dtype=np.float64) / math.fsum(given)
        return FixedWeights(groups, group_weights, group_weights / np.asarray(probs, dtype=np.float64))


# ------------------------------------------------------------------------------------------------------ robust weights


@dataclass(frozen=True)
class GroupRobust:
    """Group-robust weights by exponentiated gradient ascent on the simplex.

    Ramesh et al. 2024 (arXiv 2405.20304) Algorithm 1, for min_theta max_alpha sum_g alpha_g (mean loss of group g); adj is
    that of Sagawa et al. 2020 (arXiv 1911.08731). Once per optimizer step, from the losses of its B examples,

        L_g          = sum_{i in g} loss_i / (B p_g)  +  adj_g / sqrt(N_g)                          (total_count)
        log alpha_g += clip(e_g - mean(e), -max_exponent, max_exponent),    e_g = step_size * chi * L_g
        alpha        = alpha / sum(alpha)                                                           (in log space)

    and a step's example counts a_g / p_g with a = (1 - chi)/K + chi alpha, alpha as the step before left it. alpha starts at
    1/K; step_size=0 keeps it there, which is the group-balanced loss.

    step_size           eta >= 0, in units of 1/loss.
    adj                 one value, or a list with one per group, in units of loss.
    chi                 in [0, 1]: 1 is the robust objective, 0 fixed equal group weights (importance sampling).
    adaptive_step_size  multiply step_size by step_factor > 0 at every ``on_lr_cut()``.
    normalizer          "total_count": above; unbiased for every way of sampling the groups; a group absent from the batch has
                        the estimate 0. "in_batch_mean": L_g = mean loss of g's members in the step's batch, and they count
                        a_g B / n_g; biased for small batches. Absent groups then keep their alpha exactly, and the present
                        ones share what they had.
    reference           the scale of rsshyam/Group-robust-preference-optimization (grouptrainerearlystop.py:438-464), which lacks
                        the 1/B: L_g = sum_{i in g} loss_i / p_g [+ adj], and an example counts (micro-batch size) a_g / p_g. Its
                        step_size 5e-7 at batch 16 is 8e-6 = 16 * 5e-7 without this switch. Two differences remain: it uses
                        the alpha that already contains the current micro-batch, and adds adj once per micro-batch.
    max_exponent        > 0. Only differences between groups matter, so exponents are bounded relative to their mean: one
                        update moves no log alpha_g further than this from the mean move. Losses may be negative or
                        large. Updates in which the bound acted are counted in ``exponent_bound_hits``.

    Raises UserError for values out of range, an adj list of the wrong length, and reference with in_batch_mean.
    """

    step_size: float = 0.01
    adj: float | list[float] = 0.0
    chi: float = 1.0
    adaptive_step_size: bool = False
    step_factor: float = 0.5
    normalizer: str = "total_count"
    reference: bool = False
    max_exponent: float = 1.0

    def __post_init__(self) -> None:
        finite = math.isfinite(self.step_size) and self.step_size >= 0
        _require(finite, "step_size", self.step_size, "must be >= 0; 0 keeps equal group weights")
        adj = self.adj if isinstance(self.adj, list) else [self.adj]
        _require(all(math.isfinite(c) for c in adj), "adj", self.adj, "must be finite")
        _require(0 <= self.chi <= 1, "chi", self.chi, "must be in [0, 1]; 1 is the robust objective")
        _require(self.step_factor > 0, "step_factor", self.step_factor, "must be > 0")
        _require(self.max_exponent > 0, "max_exponent", self.max_exponent, "must be > 0")
        known = ("total_count", "in_batch_mean")
        _require(self.normalizer in known, "normalizer", self.normalizer, f"must be one of {known}")
        _require(
            not (self.reference and self.normalizer == "in_batch_mean"),
            "reference",
            self.reference,
            "the reference scale is that of normalizer=total_count; in_batch_mean has no factor of the batch size to restore",
        )

    def build(self, groups: Sequence[str], counts: Sequence[int], probs: Sequence[float]) -> RobustWeights:
        _check_drawn(groups, counts, probs)
        adj = self.adj if isinstance(self.adj, list) else [self.adj] * len(groups)
        _require(
            len(adj) == len(groups),
            "adj",
            self.adj,
            f"{len(adj)} values for {len(groups)} groups {list(groups)}",
        )
        return RobustWeights(
            self, groups, np.asarray(adj) / np.sqrt(counts), np.asarray(probs, dtype=np.float64)
        )


def _log_sum_exp(x: np.ndarray) -> float:
    top = float(x.max())
    return top + math.log(math.fsum(np.exp(x - top)))


class RobustWeights:
    """State of ``GroupRobust``: log alpha, cuts of the step size, and how often the bound acted."""

    def __init__(
        self, settings: GroupRobust, groups: Sequence[str], adjustment: np.ndarray, probs: np.ndarray
    ) -> None:
        self._settings = settings
        self._groups = tuple(groups)
        self._adjustment = adjustment  # (G,) adj_g / sqrt(N_g)
        self._probs = probs
        self._log_alpha = np.full(len(groups), -math.log(len(groups)))
        self._cuts = 0
        self._bound_hits = 0

    @property
    def _step_size(self) -> float:
        return self._settings.step_size * self._settings.step_factor**self._cuts

    @property
    def alpha(self) -> np.ndarray:
        """(G,) float64, sums to one."""
        return np.exp(self._log_alpha)

    @property
    def effective(self) -> np.ndarray:
        """(G,) a = (1 - chi)/K + chi alpha: what each group's mean loss counts."""
        chi = self._settings.chi
        return (1 - chi) / len(self._groups) + chi * self.alpha

    def weights(self, group: Tensor, step_counts: Vector, micro_size: int) -> Tensor:
        """(B,) float64 on the CPU from (B,) int64 group indices.

        step_counts (G,): examples of each group in the whole step; micro_size: examples of this micro-batch.
        """
        if self._settings.normalizer == "total_count":
            per_group = self.effective / self._probs
            if self._settings.reference:
                per_group = per_group * micro_size
        else:
            counts = _array(step_counts)
            per_group = np.divide(
                self.effective * counts.sum(), counts, out=np.zeros_like(counts), where=counts > 0
            )
        return torch.from_numpy(per_group)[group.cpu()]

    def update(self, loss_sums: Vector, step_counts: Vector, num_examples: float) -> dict[str, float]:
        """One ascent step on alpha; returns ``metrics()``.

        loss_sums (G,): sum over the step's examples (all micro-batches and ranks) of data weight times loss, without the
        weights of this class; step_counts (G,): their numbers; num_examples: B. Raises ValueError when a sum is not finite:
        the loop must have refused that step.
        """
        sums, counts = _array(loss_sums), _array(step_counts)
        if not np.isfinite(sums).all():
            raise ValueError(f"group loss sums are not finite: {sums.tolist()}")
        settings = self._settings
        if settings.normalizer == "total_count":
            present = np.ones(len(sums), dtype=bool)
            loss = sums / self._probs / (1.0 if settings.reference else num_examples) + self._adjustment
        else:
            present = counts > 0
            loss = np.divide(sums, counts, out=np.zeros_like(sums), where=present) + self._adjustment
        if present.any():
            exponent = (self._step_size * settings.chi * loss)[present]
            exponent -= exponent.mean()
            bounded = np.clip(exponent, -settings.max_exponent, settings.max_exponent)
            self._bound_hits += int((bounded != exponent).any())
            old = self._log_alpha[present]
            new = old + bounded
            mass = 0.0 if present.all() else _log_sum_exp(old)  # what the present groups share
            self._log_alpha[present] = new - _log_sum_exp(new) + mass
        return self.metrics()

    def on_lr_cut(self) -> None:
        """The stopping rule has cut the learning rate."""
        if self._settings.adaptive_step_size:
            self._cuts += 1

    def metrics(self) -> dict[str, float]:
        """``weights/<group>``: the weight of the group's mean loss in the objective; step size; updates the bound changed."""
        shares = zip(self._groups, self.effective, strict=True)
        return {
            **{f"weights/{name}": float(a) for name, a in shares},
            "step_size": self._step_size,
            "exponent_bound_hits": float(self._bound_hits),
        }

    def state_dict(self) -> dict:
        """JSON-able; Python floats survive JSON bit for bit."""
        return {
            "groups": list(self._groups),
            "log_alpha": self._log_alpha.tolist(),
            "cuts": self._cuts,
            "bound_hits": self._bound_hits,
        }

    def load_state_dict(self, state: dict) -> None:
        """Raises UserError when the checkpoint's groups are not this run's."""
        _check_groups(state["groups"], self._groups)
        self._log_alpha = np.asarray(state["log_alpha"], dtype=np.float64)
        self._cuts = int(state["cuts"])
        self._bound_hits = int(state["bound_hits"])
