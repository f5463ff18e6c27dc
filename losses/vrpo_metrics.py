"""What VRPO reports of itself: its three terms, what they do to the gradient's variance, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from losses.auxiliary import AuxPairs
from losses.types import Scored

Link = Callable[[Tensor], Tensor]
TERMS = ("plain", "i2", "i3")  # of the derivative along the score scale; plain is I1's
SIGMAS, SHARE = 4.0, 0.2  # a gap is told when it exceeds so many standard errors and this share of its spread
SLOPES = (0.8, 1.25)  # calibration slopes outside are told, if they are no accident
WORTH, ENOUGH = 0.1, 500  # another lam is told if it removes so much more of the variance, by so many rows


def slope(link: Link, margin: Tensor) -> Tensor:
    """(B,) derivative of the link at the (detached) margin; works under no_grad and inference_mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        at = margin.detach().clone().requires_grad_()
        return torch.autograd.grad(link(at).sum(), at)[0]


def expected_slope(link: Link, p: Tensor, margin: Tensor) -> Tensor:
    """(B,) derivative of ``expected(link, p, margin)`` with respect to the margin, detached."""
    return p * slope(link, margin) - (1 - p) * slope(link, -margin)


def term_metrics(
    link: Link,
    weight: Tensor,
    terms: tuple[Tensor, Tensor, Tensor],
    p: Tensor,
    h: Tensor,
    h_aux: Tensor,
    aux: AuxPairs,
    offset: Tensor | float,
) -> dict[str, Tensor]:
    """``vrpo/*`` (B,), detached; NaN for an example without auxiliary pairs, but for i1, p and plain.

        i1, i2, i3        the three terms, lam not applied; i3_minus_i2 has mean 0 if labelled and auxiliary responses follow
                          one law (and the policy has not been fitted to the labelled ones)
        plain             1 for an example without auxiliary pairs, else 0
        p, g, brier       label probability, auxiliary preference of the chosen response, (g - p)^2: the mean of brier is the
                          Brier score of g on the human labels
        gg, gp, pp        (g - 1/2)^2, (g - 1/2)(p - 1/2), (p - 1/2)^2, which do not depend on which response is named first
        coef_plain        d I1/dh, the plain loss's gradient coefficient on grad h
        coef_data         d (I1 - lam I2)/dh
        coef_aux          lam (1/M) sum_m d E_{g*_m}[link](h*_m)/dh*_m
        grad_plain, grad_i2, grad_i3    derivative of each term along "scale all scores by c" at c = 1: h dI1/dh, h dI2/dh,
                          (1/M) sum_m h*_m dI3/dh*_m
        grad_vr           the same derivative of the whole loss
        grad_X_sq, grad_X_Y   squares of these four, products of the first three

    The plain mean of each over examples gives variances and covariances: mean(grad_vr_sq) - mean(grad_vr)^2 is the
    per-example variance of the loss's gradient along the score-scale direction, a direction that does not depend on which
    response of a pair is named first. mean(grad_plain) and mean(grad_vr) estimate the same number. At h = 0 (step 0) all
    vanish. ``diagnostics`` derives the numbers to look at.
    """
    h, h_aux = h.detach(), h_aux.detach()
    g, has_aux, shifted = aux.data_preference, aux.count > 0, h - offset
    i1, i2, i3 = terms
    d1, d2 = expected_slope(link, p, shifted), expected_slope(link, g, shifted)
    d3 = expected_slope(link, aux.preference, h_aux)
    grad = dict(zip(TERMS, (d1 * h, d2 * h, aux.mean(d3 * h_aux)), strict=True))
    grad_vr = grad["plain"] + weight * (grad["i3"] - grad["i2"])
    where_aux = {
        "i2": i2,
        "i3": i3,
        "i3_minus_i2": i3 - i2,
        "g": g,
        "brier": (g - p) ** 2,
        "gg": (g - 0.5) ** 2,
        "gp": (g - 0.5) * (p - 0.5),
        "pp": (p - 0.5) ** 2,
        "coef_plain": d1,
        "coef_data": d1 - weight * d2,
        "coef_aux": weight * aux.mean(d3),
        **{f"grad_{name}": x for name, x in grad.items()},
        **{f"grad_{name}_sq": x**2 for name, x in grad.items()},
        "grad_plain_i2": grad["plain"] * grad["i2"],
        "grad_plain_i3": grad["plain"] * grad["i3"],
        "grad_i2_i3": grad["i2"] * grad["i3"],
        "grad_vr": grad_vr,
        "grad_vr_sq": grad_vr**2,
    }
    metrics = {"vrpo/i1": i1.detach(), "vrpo/p": p.detach(), "vrpo/plain": (~has_aux).to(h)}
    return metrics | {
        f"vrpo/{name}": torch.where(has_aux, x.detach(), torch.nan) for name, x in where_aux.items()
    }


def model_metrics(margin: Tensor, aux: AuxPairs) -> dict[str, Tensor]:
    """(B,) from the (B,) margin of the implied or explicit rewards, detached; NaN as in ``term_metrics``.

    vrpo/p_model    sigmoid(margin), the policy's own preference for the chosen response
    vrpo/g_error    (g - p_model)^2; where it is 0 the correction changes no gradient of the logistic loss
    """
    own = torch.sigmoid(margin.detach())
    error = torch.where(aux.count > 0, (aux.data_preference - own) ** 2, torch.nan)
    return {"vrpo/p_model": own, "vrpo/g_error": error}


def law_metrics(policy: Scored, reference: Scored | None, aux: AuxPairs, like: Tensor) -> dict[str, Tensor]:
    """(B,) of the type of ``like``; NaN as in ``term_metrics``. Do labelled and auxiliary responses follow one law? Then both gaps have mean 0 for any policy.

    vrpo/length_gap      mean tokens of the labelled responses minus those of the auxiliary ones
    vrpo/logp_ref_gap    likewise for log pi_ref, nats; only where the loss has a reference
    .._sq                their squares
    """
    sizes = {"length_gap": policy.num_tokens.to(like)}
    if reference is not None:
        sizes["logp_ref_gap"] = reference.logps.detach().to(like)
    out: dict[str, Tensor] = {}
    for name, values in sizes.items():
        labelled = (values[policy.one("chosen")] + values[policy.one("rejected")]) / 2
        gap = labelled - aux.mean_of_responses(values)
        out |= {f"vrpo/{name}": gap, f"vrpo/{name}_sq": gap**2}
    return out


def diagnostics(means: Mapping[str, float]) -> dict[str, float]:
    """What the means of the ``vrpo/*`` metrics over a step or an evaluation say; what cannot be told is left out.

        vrpo/variance_i1, _i2, _i3   per-example variance of each term's derivative along the score scale
        vrpo/covariance_i1_i2        what the correction lives from
        vrpo/variance_removed        1 - Var(grad_vr) / Var(grad_plain): the share of the plain loss's gradient variance that the
                                     correction removes on the same examples; below 0 it adds
        vrpo/best_lam                Cov(I1, I2 - I3) / Var(I2 - I3): the one lam for all examples that would remove most, and
        vrpo/best_removed            the share it would remove (both along that direction; noisy in a single step)
        vrpo/calibration_slope       slope of p - 1/2 on g - 1/2: 1 for a calibrated g, below 1 for an overconfident one, 0 for
                                     one that knows nothing
        vrpo/correlation             of g - 1/2 and p - 1/2 about 0

    Variances are left out before the margins have left 0.
    """
    out: dict[str, float] = {}
    if "vrpo/i2" not in means:
        return out
    m = {name.removeprefix("vrpo/"): value for name, value in means.items() if name.startswith("vrpo/")}
    variance = {x: m[f"grad_{x}_sq"] - m[f"grad_{x}"] ** 2 for x in (*TERMS, "vr")}

    def covariance(x: str, y: str) -> float:
        return m[f"grad_{x}_{y}"] - m[f"grad_{x}"] * m[f"grad_{y}"]

    if variance["plain"] > 1e-8 * m["grad_plain_sq"]:
        out |= {
            f"vrpo/variance_{name}": variance[x] for name, x in zip(("i1", "i2", "i3"), TERMS, strict=True)
        }
        out["vrpo/covariance_i1_i2"] = covariance("plain", "i2")
        out["vrpo/variance_removed"] = 1 - variance["vr"] / variance["plain"]
        spread = variance["i2"] + variance["i3"] - 2 * covariance("i2", "i3")
        shared = covariance("plain", "i2") - covariance("plain", "i3")
        if spread > 1e-8 * (m["grad_i2_sq"] + m["grad_i3_sq"]):
            out["vrpo/best_lam"] = shared / spread
            out["vrpo/best_removed"] = shared**2 / (spread * variance["plain"])
    if m["gg"] > 0:
        out["vrpo/calibration_slope"] = m["gp"] / m["gg"]
    if m["gg"] * m["pp"] > 0:
        out["vrpo/correlation"] = m["gp"] / math.sqrt(m["gg"] * m["pp"])
    return out


# ------------------------------------------------------------------------------------------------------ advice


def advice(means: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, str]:
    """{kind: sentence} what to do, from means over ``counts`` examples each; empty where nothing is wrong."""
    num = int(counts.get("vrpo/i2", 0))
    if num < 2:
        return {}
    found = {
        "law": _law_advice(means, num),
        "g": _calibration_advice(means, num),
        "lam": _lam_advice(means, num),
    }
    return {kind: text for kind, text in found.items() if text}


def _law_advice(means: Mapping[str, float], num: int) -> str:
    told = []
    for name, unit in (("length_gap", "tokens"), ("logp_ref_gap", "nats of log pi_ref")):
        gap = means.get(f"vrpo/{name}", 0.0)
        spread = math.sqrt(max(means.get(f"vrpo/{name}_sq", 0.0) - gap**2, 0.0))
        if abs(gap) > max(SIGMAS / math.sqrt(num), SHARE) * spread:
            told.append(f"{gap:+.3g} {unit}")
    if not told:
        return ""
    return (
        f"labelled minus auxiliary responses: {' and '.join(told)} on average over {num} rows. They should follow one law, or "
        "the correction is biased: train the reference longer on both responses (loss=sft loss.sft_on=all), draw with "
        "temperature 1 and the run's max_length, or lower loss.lam"
    )


def _calibration_advice(means: Mapping[str, float], num: int) -> str:
    gg = means["vrpo/gg"]
    if gg == 0:
        return "the auxiliary preferences of the labelled pairs are all 1/2: they say nothing; use another scorer"
    ratio, error = means["vrpo/gp"] / gg, 0.5 / math.sqrt(num * gg)  # |p - 1/2| <= 1/2
    if ratio < SIGMAS * error and num >= ENOUGH:
        return (
            f"the auxiliary preferences hardly predict the labels (slope {ratio:.2g}, standard error {error:.2g}, {num} rows): "
            "the correction adds noise; train the scorer longer or use another, or set loss.lam=0"
        )
    low, high = ratio - SIGMAS * error, ratio + SIGMAS * error
    if high < SLOPES[0] or low > SLOPES[1]:
        how = "too sure" if ratio < 1 else "too timid"
        return (
            f"the auxiliary preferences are {how} (labels rise by {ratio:.2g} of what they say, {num} rows): calibrate them on "
            "labels that the scorer has not seen (annotate.calibrate, annotate.cross_fit; fresh_pairs.temperature)"
        )
    return ""


def _lam_advice(means: Mapping[str, float], num: int) -> str:
    found = diagnostics(means)
    if num < ENOUGH or "vrpo/best_lam" not in found:
        return ""
    removed, free = found["vrpo/variance_removed"], found["vrpo/best_lam"]
    lam = min(max(free, 0.0), 1.0)
    # what is removed is a parabola in lam with its top at ``free``
    best = found["vrpo/best_removed"] * lam * (2 * free - lam) / free**2 if free > 0 else 0.0
    if best - removed < WORTH:
        return ""
    return (
        f"the correction {'removes' if removed > 0 else 'adds'} {abs(removed):.0%} of the plain loss's gradient variance; "
        f"loss.lam={lam:.2g} would remove {best:.0%} (loss.lam=auto is best for a right scorer; more auxiliary pairs remove more)"
    )
