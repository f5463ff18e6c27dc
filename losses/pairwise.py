"""Losses on the margin between a chosen and a rejected response: DPO, IPO, flip-robust DPO, hinge, ramp.

Every class here is one ``link``, a scalar function of the margin. The base class turns log-probs into the margin, averages
the link over the label, and reports the metrics. Per-example weights are the loop's business, not the loss's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from data.schema import Batch
from losses.types import LossOutput, Needs, Scored, reward_metrics, soft_label
from utils import UserError

PAIR = ("chosen", "rejected")
DIVERGENCES = ("reverse_kl", "js", "alpha")
LENGTH_NORMS = ("none", "token")
MAX_ALPHA_EXPONENT = 20.0  # e^20 = 4.9e8; its square and 1e4 times it stay far inside float32


def require(ok: bool, key: str, value: object, rule: str) -> None:
    """Raise a ``UserError`` that names the key as the user types it, unless ``ok``."""
    if not ok:
        raise UserError(f"loss.{key}={value}: {rule}")


def expected(link: Callable[[Tensor], Tensor], p: Tensor, margin: Tensor) -> Tensor:
    """(B,) mean of the link over the label: ``p link(margin) + (1 - p) link(-margin)``."""
    return p * link(margin) + (1 - p) * link(-margin)


def divergence_score(log_ratio: Tensor, f_divergence: str, alpha: float | None) -> Tensor:
    """f'(u) of the divergence's generator f at u = exp(log_ratio), shifted to be 0 at u = 1. Shape is kept.

    Wang et al. 2023 (arXiv 2309.16240): with an f-divergence instead of the KL in the alignment objective the implied
    reward is beta f'(pi / pi_ref) plus a constant that cancels in the margin.

        reverse_kl   f'(u) = log u                          DPO's own
        js           f'(u) = log(2u / (1 + u))              = log_ratio - softplus(log_ratio) + log 2
        alpha        f'(u) = (1 - u^-alpha) / alpha         alpha -> 0: reverse KL; alpha = 1: forward KL

    Deviation: below log_ratio = -20/alpha the exponential u^-alpha is continued by its tangent. It would overflow float32
    at -88/alpha, and clamping it instead would cut the gradient of exactly the responses that need it most.
    """
    if f_divergence == "reverse_kl":
        return log_ratio
    if f_divergence == "js":
        return logsigmoid(log_ratio) + math.log(2)
    exponent = -alpha * log_ratio
    beyond = (exponent - MAX_ALPHA_EXPONENT).clamp(min=0)
    return (1 - torch.exp(exponent.clamp(max=MAX_ALPHA_EXPONENT)) * (1 + beyond)) / alpha


def accuracy(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(B,) 1 where chosen > rejected, 1/2 on a tie, 0 else; detached."""
    chosen, rejected = chosen.detach(), rejected.detach()
    return (chosen > rejected).to(chosen) + 0.5 * (chosen == rejected).to(chosen)


def logp_metrics(policy: Scored, reference: Scored | None) -> dict[str, Tensor]:
    """``logps/*`` (B,) in nats of the policy, and who ranks chosen above rejected by raw log-prob.

    ``reference_accuracies`` only where the loss has a reference.
    """
    chosen, rejected = policy["chosen"], policy["rejected"]
    metrics = {
        "logps/chosen": chosen.detach(),
        "logps/rejected": rejected.detach(),
        "policy_accuracies": accuracy(chosen, rejected),
    }
    if reference is not None:
        metrics["reference_accuracies"] = accuracy(reference["chosen"], reference["rejected"])
    return metrics


@dataclass(frozen=True)
class PairwiseLoss(ABC):
    """A link on the margin h = s(chosen) - s(rejected), with s = f'(exp(log-ratio)) of each response.

    The log-ratio is log pi(y|x) - log pi_ref(y|x), summed over response tokens; no gradient reaches pi_ref. With the
    default reverse KL s is the log-ratio itself. beta lies inside the link, so h is in plain nats.

    beta            > 0; what it means is in each link's formula. No default: 0.1 is usual for DPO, 0.01 for IPO.
    reference_free  take log pi_ref = 0 for every response; then no reference is loaded.
    length_norm     "none": summed log-ratios. "token": each log-ratio divided by its response's number of tokens.
    f_divergence    reverse_kl | js | alpha, see ``divergence_score``.
    alpha           > 0, required with f_divergence=alpha and refused without it.

    Metrics: ``rewards/*`` are the implied rewards beta s(y), so ``rewards/margins`` = beta h; for IPO as well.
    """

    beta: float
    reference_free: bool = False
    length_norm: str = "none"
    f_divergence: str = "reverse_kl"
    alpha: float | None = None

    def __post_init__(self) -> None:
        require(
            self.beta > 0 and math.isfinite(self.beta), "beta", self.beta, "must be > 0; try loss.beta=0.1"
        )
        require(
            self.length_norm in LENGTH_NORMS,
            "length_norm",
            self.length_norm,
            f"must be one of {LENGTH_NORMS}",
        )
        require(
            self.f_divergence in DIVERGENCES,
            "f_divergence",
            self.f_divergence,
            f"must be one of {DIVERGENCES}",
        )
        if self.f_divergence == "alpha":
            ok = self.alpha is not None and self.alpha > 0
            require(
                ok,
                "alpha",
                self.alpha,
                "must be > 0; alpha -> 0 is loss.f_divergence=reverse_kl, 1 is forward KL",
            )
        else:
            require(
                self.alpha is None,
                "alpha",
                self.alpha,
                f"only loss.f_divergence=alpha uses it, and f_divergence={self.f_divergence}; set loss.alpha=null",
            )

    @property
    def needs(self) -> Needs:
        return Needs(policy=PAIR, reference=() if self.reference_free else PAIR)

    @abstractmethod
    def link(self, margin: Tensor) -> Tensor:
        """(B,) loss as a function of the (B,) margin in nats, for the label "chosen is preferred"."""

    def label(self, p: Tensor) -> Tensor:
        """(B,) the label probability that the loss is averaged over, from the data's own."""
        return p

    def scores(self, policy: Scored, reference: Scored | None) -> Tensor:
        """(S,) s(y) of every scored response, in batch order."""
        log_ratio = policy.logps
        if not self.reference_free:
            if reference is None or reference.roles != policy.roles:
                raise ValueError(
                    "the reference must score the same responses as the policy, in the same order"
                )
            log_ratio = log_ratio - reference.logps.detach().to(log_ratio)
        if self.length_norm == "token":
            log_ratio = log_ratio / policy.num_tokens
        return divergence_score(log_ratio, self.f_divergence, self.alpha)

    def margin(self, policy: Scored, reference: Scored | None) -> Tensor:
        """(B,) h = s(chosen) - s(rejected)."""
        scores = self.scores(policy, reference)
        return scores[policy.one("chosen")] - scores[policy.one("rejected")]

    def metrics(self, policy: Scored, reference: Scored | None, scores: Tensor) -> dict[str, Tensor]:
        """The pair's metrics (B,) from the (S,) scores."""
        rewards = self.beta * scores
        return {
            **reward_metrics(rewards[policy.one("chosen")], rewards[policy.one("rejected")]),
            **logp_metrics(policy, None if self.reference_free else reference),
        }

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        scores = self.scores(policy, reference)
        margin = scores[policy.one("chosen")] - scores[policy.one("rejected")]
        losses = expected(self.link, self.label(soft_label(batch, margin)), margin)
        return LossOutput(losses, self.metrics(policy, reference, scores))


@dataclass(frozen=True)
class DPO(PairwiseLoss):
    """Direct preference optimisation; with label_smoothing, conservative DPO.

    Rafailov et al. 2023 (arXiv 2305.18290) eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy preferences".

        link(h) = -log sigmoid(beta h)
        loss    = q link(h) + (1 - q) link(-h),   q = (1 - eps) p + eps (1 - p)

    label_smoothing  eps in [0, 1/2): the assumed probability that a label is flipped.
    p                column ``p_chosen``, the probability that "chosen" is preferred; 1 for rows without it. Smoothing acts
                     on p: a row with p = 1 gets q = 1 - eps, a row with p = 1/2 keeps q = 1/2.

    beta is the KL coefficient of the underlying objective, per nat; the gradient at h is -beta sigmoid(-beta h).
    Raises UserError for label_smoothing outside [0, 1/2).
    Deviation: none (eric-mitchell/direct-preference-optimization trainers.py:45-87 for p = 1). TRL's sigmoid loss no longer
    has the smoothing. length_norm=token is the length-normalised DPO of Tulu 3 (Lambert et al. 2024, arXiv 2411.15124).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.label_smoothing < 0.5,
            "label_smoothing",
            self.label_smoothing,
            "must be in [0, 0.5): at 0.5 a label says nothing",
        )

    def link(self, margin: Tensor) -> Tensor:
        return softplus(-self.beta * margin)

    def label(self, p: Tensor) -> Tensor:
        return self.label_smoothing + (1 - 2 * self.label_smoothing) * p


@dataclass(frozen=True)
class IPO(PairwiseLoss):
    """Identity preference optimisation.

    Azar et al. 2023 (arXiv 2310.12036) eq. 17; the paper's tau is our beta.

        link(h) = (h - 1 / (2 beta))^2

    beta > 0 sets the target 1/(2 beta) of the margin, in nats (nats per token with length_norm=token). At h = 0 the loss is
    1/(2 beta)^2: 2500 for beta = 0.01. With soft labels p the minimiser is h = (2p - 1)/(2 beta).
    length_norm=none (summed) is what the paper writes and what eric-mitchell/direct-preference-optimization
    (trainers.py:45-87), rsshyam/Group-robust-preference-optimization and OpenRLHF train; TRL (dpo_trainer.py:1440-1451,
    after asking the authors) and HALOs use length_norm=token.
    Deviation: reference_free works here (h = log pi(w) - log pi(l)); upstream accepts the key and ignores it.
    """

    def link(self, margin: Tensor) -> Tensor:
        return (margin - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class RDPONoise(PairwiseLoss):
    """Flip-robust DPO: unbiased for the clean loss when labels are flipped with a known probability.

    Chowdhury, Kini and Natarajan 2024, "Provably Robust DPO" (arXiv 2403.00409); TRL calls it "robust". Not the
    group-robust DPO that some repositories call rdpo: that is a weighting, not a loss.

        link(h) = -log sigmoid(beta h)
        loss    = [(1 - eps) link(h) - eps link(-h)] / (1 - 2 eps)

    flip_rate  eps in [0, 1/2), the probability that a label was flipped. No default: it is a fact about the data.
    p          with soft labels the loss is q link(h) + (1 - q) link(-h), q = (p - eps)/(1 - 2 eps): the inverse of
               label smoothing, and linear, so flipping p to 1 - p with probability eps still averages to the clean loss.

    The loss has no lower bound: as h -> infinity it falls like -eps beta h/(1 - 2 eps). That is the paper's estimator.
    Raises UserError for flip_rate outside [0, 1/2).
    """

    flip_rate: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.flip_rate < 0.5,
            "flip_rate",
            self.flip_rate,
            "must be in [0, 0.5): at 0.5 a label says nothing",
        )

    def link(self, margin: Tensor) -> Tensor:
        return softplus(-self.beta * margin)

    def label(self, p: Tensor) -> Tensor:
        return (p - self.flip_rate) / (1 - 2 * self.flip_rate)


@dataclass(frozen=True)
class Hinge(PairwiseLoss):
    """Hinge loss on the margin (SLiC type).

    Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425) with the reference-corrected margin of Liu et al. 2023 (RSO, arXiv
    2309.06657, "hinge-norm").

        link(h) = max(0, 1 - beta h)

    1/beta is the margin, in nats, past which a pair no longer counts. Deviation: no separate regularisation term;
    reference_free=true gives SLiC's calibration loss up to the factor beta, with delta = 1/beta.
    """

    def link(self, margin: Tensor) -> Tensor:
        return torch.relu(1 - self.beta * margin)


@dataclass(frozen=True)
class Ramp(PairwiseLoss):
    """Truncated hinge: a pair that is far on the wrong side stops pulling.

    Wu and Liu 2007, "Robust truncated hinge loss support vector machines" (JASA) with s = -1/2; the loss that the VRPO
    authors' code trains (VRPO/VRPO vrpo_trainer.py:1302).

        link(h) = max(0, 1 - u) - max(0, -1/2 - u),   u = beta h          in [0, 3/2]; 1 at h = 0

    Non-convex, and without gradient outside -1/2 < u < 1: reward magnitudes are not identified, and where training stops
    depends on where it starts.
    """

    def link(self, margin: Tensor) -> Tensor:
        u = self.beta * margin
        return torch.relu(1 - u) - torch.relu(-0.5 - u)
