"""Auxiliary preference models on tokenised rows: a Bradley-Terry reward model or a general preference model.

Both give log-odds that are antisymmetric by construction; the probability is sigmoid(log-odds / temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.schema import Batch, Row
from engine import archives, models
from engine.models import ModelSpec
from engine.scoring import LayoutName, Scorer
from losses.gpm import preference_score
from losses.types import Needs
from utils import UserError

ROLES = ("chosen", "rejected", "aux_1", "aux_2")


def pair_positions(roles: Sequence[str]) -> list[tuple[int, int]]:
    """Positions of (chosen, rejected), then of the m-th aux_1 with the m-th aux_2."""
    where = {role: [i for i, r in enumerate(roles) if r == role] for role in ROLES}
    return [(where["chosen"][0], where["rejected"][0]), *zip(where["aux_1"], where["aux_2"], strict=True)]


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
    tokenizer: object,
    layout: LayoutName = "shared_prefix",
) -> tuple[ModelPreference, str]:
    """(the trained model of ``archive``, the hash of its weights).

    Raises UserError for an archive without a head: a language model, whose rewards would be noise.
    """
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
