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

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.schema import Batch
from losses.pairwise import DPO, IPO, PAIR, Hinge, PairwiseLoss, Ramp, expected, require
from losses.reward import centring, margin_column
from losses.types import LossOutput, Needs, Scored, reward_metrics, soft_label
from utils import UserError

AUX = ("aux_1", "aux_2")
BASES = {"dpo": DPO, "ipo": IPO, "hinge": Hinge, "ramp": Ramp}
REWARD_BASES = {"bradley_terry": DPO, "hinge": Hinge, "ramp": Ramp}
Link = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AuxPairs:
    """The A auxiliary pairs of a micro-batch of B examples.

    first, second    (A,) positions of aux_1 and aux_2 among the scored responses
    example          (A,) the example of each pair
    preference       (A,) g*, the probability that aux_1 is preferred
    data_preference  (B,) g, the probability that chosen is preferred; 1/2 (unused) where an example has no pair
    count            (B,) M
    """

    first: Tensor
    second: Tensor
    example: Tensor
    preference: Tensor
    data_preference: Tensor
    count: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """(A,) -> (B,) mean over each example's pairs; 0 where it has none."""
        total = torch.zeros_like(self.count, dtype=values.dtype).index_add(0, self.example, values)
        return total / self.count.clamp(min=1)


def aux_pairs(policy: Scored, batch: Batch, like: Tensor) -> AuxPairs:
    """Read and check the auxiliary pairs. Raises UserError (row named) for unpaired responses and bad preferences."""
    where = batch.positions(["aux_1"])
    count, other = (
        torch.bincount(batch.example[batch.positions([role])], minlength=len(batch)) for role in AUX
    )
    for i in torch.nonzero(count != other).flatten().tolist():
        raise UserError(
            f"{batch.uids[i]}: {int(count[i])} aux_1 but {int(other[i])} aux_2 responses; every aux_1 needs its aux_2"
        )
    g = batch.scalars.get("chosen_preference", torch.full((len(batch),), torch.nan))
    g_aux = batch.response_scalars.get("aux_preference", torch.full((len(batch.roles),), torch.nan))[where]
    owner = batch.example[where]
    for name, values, examples in (
        ("chosen_preference", g[count > 0], torch.nonzero(count > 0).flatten()),
        ("aux_preference", g_aux, owner),
    ):
        for i in torch.nonzero(~((values >= 0) & (values <= 1))).flatten().tolist():
            raise UserError(
                f"{batch.uids[examples[i]]}: {name}={float(values[i])}: an example with auxiliary responses needs a "
                "probability in [0, 1] here; add the column with commands.annotate"
            )
    return AuxPairs(
        first=policy.index("aux_1"),
        second=policy.index("aux_2"),
        example=owner.to(like.device),
        preference=g_aux.detach().to(like),
        data_preference=torch.where(count > 0, g, 0.5).detach().to(like),
        count=count.to(like.device),
    )


def slope(link: Link, margin: Tensor) -> Tensor:
    """(B,) derivative of the link at the (detached) margin; works under no_grad and inference_mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        at = margin.detach().clone().requires_grad_()
        return torch.autograd.grad(link(at).sum(), at)[0]


def expected_slope(link: Link, p: Tensor, margin: Tensor) -> Tensor:
    """(B,) derivative of ``expected(link, p, margin)`` with respect to the margin, detached."""
    return p * slope(link, margin) - (1 - p) * slope(link, -margin)


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
    """(B,) losses I1 - lam I2 + lam I3 and the ``vrpo/*`` metrics (B,).

    p (B,) label probabilities; h (B,) margins of the labelled pairs and h_aux (A,) of the auxiliary ones; offset (B,) is
    subtracted from h inside I1 and I2. lam="auto" is M/(M+1) for an example with M pairs, which minimises the response part
    of the variance, V [(1 - lam)^2 + lam^2 / M], when g is right. An example without pairs has the plain loss I1.

    Metrics, NaN for plain examples except i1, p and plain:
        vrpo/i1, i2, i3    the three terms, lam not applied
        vrpo/plain         1 for an example without auxiliary pairs, else 0
        vrpo/p, g, brier   label probability, auxiliary preference of the chosen response, (g - p)^2: the mean of brier is
                           the Brier score of g on the human labels
        vrpo/gg, gp, pp    (g - 1/2)^2, (g - 1/2)(p - 1/2), (p - 1/2)^2, which do not depend on which response is named first
        vrpo/coef_plain    d I1/dh, the plain loss's gradient coefficient on grad h
        vrpo/coef_data     d (I1 - lam I2)/dh
        vrpo/coef_aux      lam (1/M) sum_m d E_{g*_m}[link](h*_m)/dh*_m
        vrpo/grad_plain    derivative of I1 along "scale all scores by c" at c = 1: h dI1/dh
        vrpo/grad_vr       the same derivative of the whole loss: h coef_data + lam (1/M) sum_m h*_m d(..)/dh*_m
        vrpo/grad_plain_sq, vrpo/grad_vr_sq    their squares

    What to average: the plain mean of each over examples. mean(grad_*_sq) - mean(grad_*)^2 is then the per-example
    variance of the gradient along the score-scale direction, plain against variance-reduced; that direction is used since
    it does not depend on which response of a pair is named first. The correction pays while grad_vr's variance is the
    smaller. mean(grad_plain) and mean(grad_vr) estimate the same number: a gap beyond noise says that the auxiliary
    responses do not follow the law of the labelled ones. At h = 0 (step 0) all four vanish. ``diagnostics`` derives the
    numbers to look at.
    """
    g, has_aux = aux.data_preference, aux.count > 0
    shifted = h - offset
    i1, i2 = expected(link, p, shifted), expected(link, g, shifted)
    i3 = aux.mean(expected(link, aux.preference, h_aux))
    count = aux.count.to(h)  # before dividing: int64 / int64 is float32
    weight = count / (count + 1) if lam == "auto" else lam * has_aux.to(h)

    d1, d2 = expected_slope(link, p, shifted), expected_slope(link, g, shifted)
    d3 = expected_slope(link, aux.preference, h_aux)
    coef_data = d1 - weight * d2
    grad_plain = d1 * h.detach()
    grad_vr = coef_data * h.detach() + weight * aux.mean(d3 * h_aux.detach())
    where_aux = {
        "i2": i2,
        "i3": i3,
        "g": g,
        "brier": (g - p) ** 2,
        "gg": (g - 0.5) ** 2,
        "gp": (g - 0.5) * (p - 0.5),
        "pp": (p - 0.5) ** 2,
        "coef_plain": d1,
        "coef_data": coef_data,
        "coef_aux": weight * aux.mean(d3),
        "grad_plain": grad_plain,
        "grad_vr": grad_vr,
        "grad_plain_sq": grad_plain**2,
        "grad_vr_sq": grad_vr**2,
    }
    metrics = {"vrpo/i1": i1.detach(), "vrpo/p": p.detach(), "vrpo/plain": (~has_aux).to(h)}
    metrics |= {f"vrpo/{name}": torch.where(has_aux, x.detach(), torch.nan) for name, x in where_aux.items()}
    return i1 + weight * (i3 - i2), metrics


def diagnostics(means: Mapping[str, float]) -> dict[str, float]:
    """What the means of the ``vrpo/*`` metrics over a step or an evaluation say; what cannot be told is left out.

    vrpo/variance_removed   1 - Var(grad_vr) / Var(grad_plain): the share of the plain loss's per-example gradient variance,
                            along the score-scale direction, that the correction removes on the same examples; below 0 it
                            adds. Not before the margins have left 0
    vrpo/i3_minus_i2        mean I3 - mean I2: 0 on average if the auxiliary responses follow the law of the labelled ones
    vrpo/calibration_slope  slope of p - 1/2 on g - 1/2: 1 for a calibrated g, below 1 for an overconfident one, 0 for one
                            that knows nothing
    vrpo/correlation        of g - 1/2 and p - 1/2 about 0
    """
    out: dict[str, float] = {}
    if "vrpo/i2" not in means:
        return out
    out["vrpo/i3_minus_i2"] = means["vrpo/i3"] - means["vrpo/i2"]
    plain, reduced = (means[f"vrpo/{n}_sq"] - means[f"vrpo/{n}"] ** 2 for n in ("grad_plain", "grad_vr"))
    if plain > 1e-8 * means["vrpo/grad_plain_sq"]:
        out["vrpo/variance_removed"] = 1 - reduced / plain
    gg, gp, pp = (means[f"vrpo/{n}"] for n in ("gg", "gp", "pp"))
    if gg > 0:
        out["vrpo/calibration_slope"] = gp / gg
    if gg * pp > 0:
        out["vrpo/correlation"] = gp / math.sqrt(gg * pp)
    return out


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
        return Needs(policy=roles, reference=() if self.reference_free else roles, optional_roles=AUX)

    def link(self, margin: Tensor) -> Tensor:
        return BASES[self.base](beta=self.beta).link(margin)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return diagnostics(means)

    def __call__(self, policy: Scored, reference: Scored | None, batch: Batch) -> LossOutput:
        scores = self.scores(policy, reference)
        chosen, rejected = policy.one("chosen"), policy.one("rejected")
        h = scores[chosen] - scores[rejected]
        aux = aux_pairs(policy, batch, h)
        h_aux = scores[aux.first] - scores[aux.second]
        losses, metrics = variance_reduced(self.link, self.lam, soft_label(batch, h), h, h_aux, aux)
        losses = losses - self.nll * policy.logps[chosen] / policy.num_tokens[chosen]
        return LossOutput(losses, {**self.metrics(policy, reference, scores), **metrics})


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
        return Needs(policy=PAIR + AUX, optional_roles=AUX, output="reward")

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        return diagnostics(means)

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
        return LossOutput(losses, {**reward_metrics(chosen, rejected), **metrics})
