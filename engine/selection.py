"""Which rows of a large batch are trained on: all, some at random, or those with the largest reducible holdout loss.

A settings dataclass (its fields are the keys of config/data_selection/<name>.yaml) builds a selector, or None for "all":

    selector(indices, step, losses) -> the chosen ones of ``indices``, in their order

``losses(indices)`` gives the rows' (n,) losses under the current weights, without gradient. A choice is a pure function of
the plan's rows, the step and the weights, so a continued run chooses the same and nothing has to be saved. Selection comes
before anything of the step is counted: the step is that of the chosen rows, only the examples counter advances by the large
batch.

What group weights mean then: the weighting still divides by the probabilities p_g with which the plan draws the groups, of
the large batch. Uniform selection leaves these as they are, so the objective is unchanged. RHO-loss does not: with q_g the
share of group g among the chosen rows, an example counts a_g / p_g, so that group g's mean loss over its CHOSEN rows counts
a_g q_g / p_g, and the robust update sees that product, not the group's mean loss. weighting.normalizer=in_batch_mean weighs
the groups' mean losses over chosen rows themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.schema import Batch, Row
from engine import archives
from engine.parallel import World
from losses.types import Loss
from utils import UserError, stream

Losses = Callable[[np.ndarray], np.ndarray]
Selector = Callable[[np.ndarray, int, Losses], np.ndarray]
Holdout = Callable[
    [str, str], np.ndarray
]  # (tuned archive, its reference's archive) -> (N,) losses of all training rows


@torch.no_grad()
def row_losses(
    rows: Sequence[Row],
    parts: Sequence[np.ndarray],
    *,
    world: World,
    loss: Loss,
    policy: Callable,
    reference: Callable | None,
) -> np.ndarray:
    """(n,) float64 losses, weights not applied, of the rows in ``parts``, in order; ranks share the parts."""
    needs = loss.needs
    found = []
    for (k, part), live in world.share(list(enumerate(parts))):
        batch = Batch.collate([rows[i] for i in part])
        ref = reference(batch, needs.reference) if needs.reference else None
        losses = loss(policy(batch, needs.policy), ref, batch).losses.double().tolist()
        if live:
            found.append((k, losses))
    return np.array([x for _, losses in sorted(world.gather(found)) for x in losses])


@dataclass(frozen=True)
class NoSelection:
    """Every row."""

    def check(self, loss: Loss) -> None:
        """Any loss will do."""

    def check_archives(self) -> None:
        """There are none."""

    def build(self, size: int | None, seed: int, holdout: Holdout) -> None:
        return None


@dataclass(frozen=True)
class UniformSelection(NoSelection):
    """``size`` rows without replacement, from the stream (seed, step)."""

    def build(self, size: int, seed: int, holdout: Holdout) -> Selector:
        def select(indices: np.ndarray, step: int, losses: Losses) -> np.ndarray:
            chosen = stream(seed, "data selection", step).permutation(len(indices))[:size]
            return indices[np.sort(chosen)]

        return select


@dataclass(frozen=True)
class RHOLoss:
    """The ``size`` rows with the largest rho = loss(policy, reference) - loss(tuned, start); the earlier row on ties.

    Mindermann et al. 2022 (arXiv 2206.07137), eq. 3, with a preference loss on both sides: the second term, the loss of a
    model tuned on held-out preferences relative to the SFT model it started from, is what cannot be learned (label noise).
    It is computed once for all rows, in a fixed order; then the two models are dropped. Example weights are not applied.

    ft_state_dict_path   archive of the tuned model
    sft_state_dict_path  archive of the model it started from

    A row whose loss is not finite is chosen, so that the step's guard sees it. Raises UserError for losses without a
    reference or with auxiliary responses.
    """

    ft_state_dict_path: str
    sft_state_dict_path: str

    def check(self, loss: Loss) -> None:
        """Raise UserError unless the loss compares a pair with a reference."""
        if not loss.needs.reference or loss.needs.optional_roles or loss.needs.output != "logps":
            raise UserError(
                f"data_selection=rho_loss_dpo: {type(loss).__name__} does not compare a pair with a reference; use it with "
                "loss=dpo, ipo or another pairwise loss, or data_selection=uniform"
            )

    def check_archives(self) -> None:
        """Raise UserError unless both are there: they are opened only after the reference has scored its rows."""
        archives.find(self.ft_state_dict_path, "data_selection.ft_state_dict_path")
        archives.find(self.sft_state_dict_path, "data_selection.sft_state_dict_path")

    def build(self, size: int, seed: int, holdout: Holdout) -> Selector:
        irreducible = holdout(self.ft_state_dict_path, self.sft_state_dict_path)

        def select(indices: np.ndarray, step: int, losses: Losses) -> np.ndarray:
            if len(indices) <= size:
                return indices
            rho = losses(indices) - irreducible[indices]
            rho = np.where(np.isfinite(rho), rho, np.inf)
            return indices[np.sort(np.argsort(-rho, kind="stable")[:size])]

        return select
