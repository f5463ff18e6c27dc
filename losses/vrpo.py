"""Variance-reduced preference optimisation: any pairwise link plus a mean-zero correction from fresh reference samples.

Ye, Zhou, Zhu, Quinzan and Shi 2025 (arXiv 2504.03784). Roles per example: chosen and rejected, and any number M of auxiliary
pairs (the m-th aux_1 with the m-th aux_2). Columns: ``chosen_preference`` g = the auxiliary model's probability that chosen
beats rejected, and per auxiliary pair ``aux_preference`` g* (at the aux_1 positions). Both are numbers without gradient.

    L = E_p[link](h)  -  lam E_g[link](h)  +  lam (1/M) sum_m E_{g*_m}[link](h*_m)          I1 - lam I2 + lam I3
    E_q[link](h) = q link(h) + (1 - q) link(-h)

I2 and I3 have the same mean when the labelled responses and the auxiliary ones come from the same law, so the correction
averages to zero for every g and every lam, and it lowers the variance when g resembles the truth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from data.schema import Batch
from losses import vrpo_metrics
from losses.auxiliary import AUX, PREFERENCES, AuxPairs, aux_pairs
from losses.pairwise import DPO, IPO, PAIR, Hinge, PairwiseLoss, Ramp, expected, require
from losses.reward import centring, margin_column
from losses.types import LossOutput, Needs, Scored, reward_metrics, soft_label
from losses.vrpo_metrics import Link

BASES = {"dpo": DPO, "ipo": IPO, "hinge": Hinge, "ramp": Ramp}
REWARD_BASES = {"bradley_terry": DPO, "hinge": Hinge, "ramp": Ramp}


def check_lam(lam: float | str) -> None:
    """Raise UserError unless lam is "auto" or a number in [0, 1]."""
    ok = lam == "auto" or (not isinstance(lam, str) and 0 <= lam <= 1)
    require(ok, "lam", lam, 'must be in [0, 1] or "auto"; 1 is the paper, 0 the plain loss')


def variance_reduced(
    link: Link,
    lam: float | str,
    p: Tensor,
    h: Tensor,
    h_aux: Tensor,
    aux: AuxPairs,
    offset: Tensor | float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) losses I1 - lam I2 + lam I3 and their ``vrpo/*`` metrics (B,), see ``losses.vrpo_metrics.term_metrics``.

    p (B,) label probabilities; h (B,) margins of the labelled pairs and h_aux (A,) of the auxiliary ones; offset (B,) is
    subtracted from h inside I1 and I2. lam="auto" is M/(M+1) for an example with M pairs, which minimises the response part
    of the variance, V [(1 - lam)^2 + lam^2 / M], when g is right. An example without pairs has the plain loss I1.
    """
    count = aux.count.to(h)  # before dividing: int64 / int64 is float32
    weight = count / (count + 1) if lam == "auto" else lam * (count > 0).to(h)
    shifted = h - offset
    i1, i2 = expected(link, p, shifted), expected(link, aux.data_preference, shifted)
    i3 = aux.mean(expected(link, aux.preference, h_aux))
    metrics = vrpo_metrics.term_metrics(link, weight, (i1, i2, i3), p, h, h_aux, aux, offset)
    return i1 + weight * (i3 - i2), metrics


@dataclass(frozen=True)
class VarianceReduced(PairwiseLoss):
    """VRPO, one-stage: variance-reduced DPO, IPO, hinge or ramp on reference-corrected margins.

    Ye et al. 2025 (arXiv 2504.03784); the formula is in this module's head, with h as in ``PairwiseLoss`` and

        link = the base loss's own link,  loss = L + nll * (-log pi(w) / tokens of w)

    base     dpo | ipo | hinge | ramp. dpo is the paper's method; ramp is what the authors' code trains
             (vrpo_trainer.py:1302), non-convex and without gradient beyond |beta h| = 1.
    lam      in [0, 1], or "auto" = M/(M+1) per example. 1 is the paper's. With M = 1 and lam = 1 a perfect g reduces nothing;
             "auto" then halves the response part of the variance.
    nll      >= 0, weight of the chosen response's mean negative log-likelihood (nats per token).
    beta, reference_free, length_norm, f_divergence, alpha as in ``PairwiseLoss``; they act on all 2 + 2M responses.
    p        column ``p_chosen`` or 1, in I1 only.

    An example without auxiliary pairs (an evaluation set, say) has the base loss; ``vrpo/plain`` counts them.
    Raises UserError for values out of range, unpaired auxiliary responses, and preferences that are not probabilities.
    Deviations from the authors' code: the link is the one configured, M may vary by row, no frozen self-copy as g (at its
    fixed point that is exactly the plain loss).
    """

    base: str = "dpo"
    lam: float | str = 1.0
    nll: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.base in BASES, "base", self.base, f"must be one of {tuple(BASES)}")
        require(self.nll >= 0, "nll", self.nll, "must be >= 0; 0 turns it off")
        check_lam(self.lam)

    @property
    def needs(self) -> Needs:
        roles = PAIR + AUX
        return Needs(
            policy=roles,
            reference=() if self.reference_free else roles,
            optional_roles=AUX,
            optional_scalars=PREFERENCES,
        )

    def link(self, margin: Tensor) -> Tensor:
        return BASES[self.base](beta=self.beta).link(margin)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return vrpo_metrics.diagnostics(means)

    def advice(self, means: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, str]:
        return vrpo_metrics.advice(means, counts)

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        scores = self.scores(policy, reference)
        chosen, rejected = policy.one("chosen"), policy.one("rejected")
        h = scores[chosen] - scores[rejected]
        aux = aux_pairs(policy, batch, h)
        h_aux = scores[aux.first] - scores[aux.second]
        losses, metrics = variance_reduced(self.link, self.lam, soft_label(batch, h), h, h_aux, aux)
        losses = losses - self.nll * policy.logps[chosen] / policy.num_tokens[chosen]
        more = {
            **vrpo_metrics.model_metrics(self.beta * h, aux),
            **vrpo_metrics.law_metrics(policy, reference, aux, h),
            "rewards/aux": aux.mean_of_responses(self.beta * scores.detach()),
            "logps/aux": aux.mean_of_responses(policy.logps.detach()),
        }
        return LossOutput(losses, {**self.metrics(policy, reference, scores), **metrics, **more})


@dataclass(frozen=True)
class VarianceReducedReward:
    """VRPO, first of two stages: variance-reduced Bradley-Terry on a scalar reward head.

    Ye et al. 2025 (arXiv 2504.03784); the formula is in this module's head with h = r(w) - r(l), h* = r(aux_1) - r(aux_2) and

        I1 and I2 at h - d,  I3 at h*,  loss = L + c (r(w) + r(l))^2

    base    bradley_terry (link -log sigmoid(h)) | hinge (max(0, 1 - h)) | ramp.
    lam     as in ``VarianceReduced``.
    d       column ``margin`` in units of reward, 0 without it. It is in I1 and I2 alike, and the swapped label sees -d, so
            that with a right g the two cancel; auxiliary pairs have no margin. Where d is not 0 the correction's mean is
            therefore not exactly 0: E[I2] is taken at h - d and E[I3] at h.
    center_rewards_coefficient  c >= 0, as in ``Reward``; labelled responses only.

    An example without auxiliary pairs has the plain loss. Raises UserError as ``VarianceReduced`` does.
    Deviation from the authors' code (vrreward_trainer.py:546): there the margin is in I1 only, which biases the loss even
    when g is right.
    """

    base: str = "bradley_terry"
    lam: float | str = 1.0
    center_rewards_coefficient: float = 0.0

    def __post_init__(self) -> None:
        require(self.base in REWARD_BASES, "base", self.base, f"must be one of {tuple(REWARD_BASES)}")
        require(
            self.center_rewards_coefficient >= 0,
            "center_rewards_coefficient",
            self.center_rewards_coefficient,
            "must be >= 0; 0 turns it off",
        )
        check_lam(self.lam)

    @property
    def needs(self) -> Needs:
        return Needs(policy=PAIR + AUX, optional_roles=AUX, optional_scalars=PREFERENCES, output="reward")

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return vrpo_metrics.diagnostics(means)

    def advice(self, means: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, str]:
        return vrpo_metrics.advice(means, counts)

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        chosen, rejected = policy.value("chosen"), policy.value("rejected")
        h = chosen - rejected
        aux = aux_pairs(policy, batch, h)
        h_aux = policy.values[aux.first] - policy.values[aux.second]
        link = REWARD_BASES[self.base](beta=1.0).link
        losses, metrics = variance_reduced(
            link, self.lam, soft_label(batch, h), h, h_aux, aux, offset=margin_column(batch, h)
        )
        losses = losses + centring(chosen, rejected, self.center_rewards_coefficient)
        more = {
            **vrpo_metrics.model_metrics(h, aux),
            **vrpo_metrics.law_metrics(policy, None, aux, h),
            "rewards/aux": aux.mean_of_responses(policy.values.detach()),
        }
        return LossOutput(losses, {**reward_metrics(chosen, rejected), **metrics, **more})
