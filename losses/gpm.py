"""General preference model: preferences that need not come from a scalar reward, so cycles are allowed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import normalize

from data.schema import Batch
from losses.pairwise import PAIR, accuracy, expected, require
from losses.reward import logistic
from losses.types import LossOutput, Needs, Scored, soft_label


def preference_score(first: Tensor, second: Tensor) -> Tensor:
    """(...,) skew-symmetric score in [-1, 1] of two (..., 2k) embeddings; > 0: the first is preferred.

        s(v, w) = sum_b (v_{2b} w_{2b+1} - v_{2b+1} w_{2b}),     v and w scaled to unit norm first

    s(v, w) = -s(w, v) by construction. Raises ValueError for an odd dimension.
    """
    if first.shape[-1] % 2:
        raise ValueError(
            f"embeddings have dimension {first.shape[-1]}; the score pairs coordinates, so it must be even"
        )
    v, w = normalize(first, dim=-1), normalize(second, dim=-1)
    return (v[..., 0::2] * w[..., 1::2] - v[..., 1::2] * w[..., 0::2]).sum(dim=-1)


@dataclass(frozen=True)
class GPM:
    """General preference model.

    Zhang et al. 2024 (arXiv 2410.02197): P(w > l) = sigmoid(s(v_w, v_l) / tau).

        loss = p link(s/tau) + (1 - p) link(-s/tau),     link(m) = -log sigmoid(m)

    tau > 0: temperature of the score, which lies in [-1, 1]; 0.1 lets P reach 1 - 5e-5. The VRPO authors' models have
    tau = 1, so their P stays within [0.27, 0.73]. p is the column ``p_chosen`` or 1.
    dim: width 2k of the embedding, even, >= 2; 2 is the authors' and already allows cycles, each two more add another plane.

    Raises UserError for tau <= 0 and for an odd dim. Metrics: ``rewards/margins`` is s/tau, the log-odds; there are no rewards of single
    responses. Deviation: no prompt-dependent scale of the coordinate pairs.
    """

    tau: float = 0.1
    dim: int = 8

    def __post_init__(self) -> None:
        require(self.tau > 0, "tau", self.tau, "must be > 0; try loss.tau=0.1")
        require(
            self.dim >= 2 and self.dim % 2 == 0,
            "dim",
            self.dim,
            "must be even and at least 2; try loss.dim=8",
        )

    @property
    def needs(self) -> Needs:
        return Needs(policy=PAIR, output="embedding", dim=self.dim)

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        margin = preference_score(policy.value("chosen"), policy.value("rejected")) / self.tau
        losses = expected(logistic, soft_label(batch, margin), margin)
        return LossOutput(
            losses, {"rewards/margins": margin.detach(), "rewards/accuracies": accuracy(margin, -margin)}
        )
