"""Auxiliary preference models on tokenised rows: a Bradley-Terry reward model or a general preference model.

Both give log-odds that are antisymmetric by construction; the probability is sigmoid(log-odds / temperature).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.schema import Batch, Row
from engine import archives, models
from engine.model_spec import ModelSpec
from engine.scoring import LayoutName, Scorer
from losses.gpm import preference_score
from losses.types import Needs
from utils import UserError

ROLES = ("chosen", "rejected", "aux_1", "aux_2")
OUTPUTS = {
    "reward": "reward",
    "gpm": "embedding",
}  # scorer, named like its loss -> what the head of its model gives
EPSILON = 1e-6


def pair_positions(roles: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of (chosen, rejected), then of the m-th aux_1 with the m-th aux_2."""
    where = {role: [i for i, r in enumerate(roles) if r == role] for role in ROLES}
    return [(where["chosen"][0], where["rejected"][0]), *zip(where["aux_1"], where["aux_2"], strict=True)]


def log_odds(p: np.ndarray) -> np.ndarray:
    """Of probabilities, which are kept EPSILON from 0 and 1, where log-odds end."""
    p = np.clip(p, EPSILON, 1.0 - EPSILON)
    return np.log(p) - np.log1p(-p)


def load_function(path: str, key: str) -> Callable[..., Any]:
    """The function at ``module:function``, a value of the setting ``key``. Raises UserError."""
    module_name, colon, name = path.partition(":")
    if not colon:
        raise UserError(f"{key}={path}: must be module:function, e.g. commands.oracles:opinions")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}={path}: cannot be imported ({error})") from error


def function_odds(value: Any, pairs: Sequence[tuple[int, int]], number: int, who: str) -> np.ndarray:
    """Log-odds of ``pairs`` from what a user's function says of ``number`` responses: one score per response, or the
    matrix of P(i preferred to j), of which both orders are averaged. UserError, beginning with ``who``, for anything else."""
    found = np.asarray(value, dtype=np.float64)
    first, second = map(list, zip(*pairs, strict=True))
    if found.shape == (number,):
        odds = found[first] - found[second]
    elif found.shape == (number, number):
        forward, backward = found[first, second], found[second, first]
        if not (((forward >= 0) & (forward <= 1)).all() and ((backward >= 0) & (backward <= 1)).all()):
            raise UserError(f"{who} gave {found.tolist()}: not probabilities in [0, 1]")
        odds = log_odds((forward + 1.0 - backward) / 2)
    else:
        raise UserError(
            f"{who} gave an array of shape {found.shape}; {number} scores or a {number} x {number} matrix of probabilities "
            f"are due, for {number} responses"
        )
    if not np.isfinite(odds).all():
        raise UserError(f"{who} gave {found.tolist()}: scores must be finite")
    return odds


@dataclass(frozen=True)
class ModelPreference:
    """scorer: a Scorer with output "reward", or "embedding" with ``tau``, the general preference model's temperature."""

    scorer: Scorer
    tau: float | None = None

    @torch.no_grad()
    def __call__(self, rows: Sequence[Row]) -> list[np.ndarray]:
        """Per row (1 + M,) float64 log-odds that the first response of a pair is preferred: the labelled pair, the
        auxiliary ones."""
        scored = self.scorer(Batch.collate(list(rows)), ROLES)
        values = scored.values.double().cpu()
        found, start = [], 0
        for row in rows:
            mine = values[start : start + len(row.roles)]
            start += len(row.roles)
            first, second = (mine[list(side)] for side in zip(*pair_positions(row.roles), strict=True))
            odds = first - second if self.tau is None else preference_score(first, second) / self.tau
            found.append(odds.numpy())
        return found


def load(
    spec: ModelSpec,
    archive: str,
    needs: Needs,
    *,
    tau: float | None,
    device: torch.device,
    tokenizer: Any,
    layout: LayoutName = "shared_prefix",
) -> tuple[ModelPreference, str]:
    """(the trained model of ``archive``, the hash of its weights). ``tokenizer`` made the rows that it will score.

    Raises UserError for an archive without a head: a language model, whose rewards would be noise; and for a model of
    another tokenizer.
    """
    if models.load_tokenizer(spec).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"{archive}: its model {spec.name} has another tokenizer than the policy; use commands.sample and commands.annotate"
        )
    stored = archives.read(archive)
    if not any(models.HEAD in name.split(".") for name in (*stored.base, *stored.adapter)):
        raise UserError(
            f"{archive}: has no {needs.output} head: it is a language model; train one with loss=reward or loss=gpm"
        )
    model = models.build_policy(
        spec, archive=archive, output=needs.output, dim=needs.dim, seed=0, device=device, tokenizer=tokenizer
    )
    model.requires_grad_(False).eval()
    adapter = models.POLICY_ADAPTER if models.is_peft(model) else None
    scorer = Scorer(model, layout=layout, output=needs.output)
    return ModelPreference(scorer, tau), models.weights_hash(model, adapter)[:16]
