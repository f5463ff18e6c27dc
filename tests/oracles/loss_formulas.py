"""The losses again, from the papers, one pair at a time with math on Python floats. Nothing here looks at the torch code."""

from __future__ import annotations

import math
from collections.abc import Callable

from tests.oracles.cases import Response, Row


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def label_p(row: Row) -> float:
    """P(chosen preferred): the column or certainty."""
    return row.scalars.get("p_chosen", 1.0)


# ------------------------------------------------------------------------------------------------------- implied scores


def implied(
    r: Response, *, reference_free=False, per_token=False, divergence="reverse_kl", alpha=None
) -> float:
    """f'(u), u = pi/pi_ref (Wang et al. 2023, table 1), without the constant that makes f'(1) what it is."""
    log_u = r.policy - (0.0 if reference_free else r.reference)
    if per_token:
        log_u /= r.tokens
    u = math.exp(log_u)
    if divergence == "reverse_kl":
        return math.log(u)
    if divergence == "js":
        return math.log(2 * u / (1 + u))
    return (1 - u**-alpha) / alpha


def gap(row: Row, **how) -> float:
    """h of the labelled pair."""
    return implied(row["chosen"], **how) - implied(row["rejected"], **how)


def both_labels(p: float, loss_of_order: Callable[[float], float], h: float) -> float:
    """The loss of a label that is "chosen" with probability p: the other label sees the pair swapped."""
    return p * loss_of_order(h) + (1 - p) * loss_of_order(-h)


# --------------------------------------------------------------------------------------------------------------- links


def bradley_terry_nll(h: float, beta: float) -> float:
    """-log of e^{beta h} / (e^{beta h} + 1): the paper's softmax over the two rewards."""
    return -math.log(math.exp(beta * h) / (math.exp(beta * h) + 1))


def ipo_square(h: float, tau: float) -> float:
    return (h - 1 / (2 * tau)) ** 2


def hinge_loss(h: float, beta: float) -> float:
    return max(0.0, 1 - beta * h)


def ramp_loss(h: float, beta: float) -> float:
    """Piecewise: 3/2 up to u = -1/2, then 1 - u, then 0 from u = 1."""
    u = beta * h
    if u <= -0.5:
        return 1.5
    return 1 - u if u < 1 else 0.0


# -------------------------------------------------------------------------------------------------------------- losses


def dpo(row: Row, beta: float, eps: float = 0.0, **how) -> float:
    """Conservative DPO: the label is believed with probability 1 - eps."""
    p = label_p(row)
    believed = p * (1 - eps) + (1 - p) * eps
    return both_labels(believed, lambda h: bradley_terry_nll(h, beta), gap(row, **how))


def ipo(row: Row, tau: float, **how) -> float:
    return both_labels(label_p(row), lambda h: ipo_square(h, tau), gap(row, **how))


def rdpo_noise(row: Row, beta: float, eps: float, **how) -> float:
    """Chowdhury et al.: ((1-eps) l(w, l) - eps l(l, w)) / (1 - 2 eps), averaged over the label."""

    def unbiased(h: float) -> float:
        return ((1 - eps) * bradley_terry_nll(h, beta) - eps * bradley_terry_nll(-h, beta)) / (1 - 2 * eps)

    return both_labels(label_p(row), unbiased, gap(row, **how))


def hinge(row: Row, beta: float, **how) -> float:
    return both_labels(label_p(row), lambda h: hinge_loss(h, beta), gap(row, **how))


def ramp(row: Row, beta: float, **how) -> float:
    return both_labels(label_p(row), lambda h: ramp_loss(h, beta), gap(row, **how))


def base(row: Row) -> float:
    win, lose = row["chosen"].policy, row["rejected"].policy
    return -1.0 if win > lose else -0.5 if win == lose else 0.0


def reward(row: Row, eps: float = 0.0, centre: float = 0.0) -> float:
    """Bradley-Terry with a margin: the label "rejected wins" sees the negated difference and the negated margin."""
    win, lose = row["chosen"].reward, row["rejected"].reward
    d, p = row.scalars.get("margin", 0.0), label_p(row)
    believed = p * (1 - eps) + (1 - p) * eps
    return (
        -believed * math.log(sigmoid(win - lose - d))
        - (1 - believed) * math.log(sigmoid(lose - win - (-d)))
        + centre * (win + lose) ** 2
    )


def gpm(row: Row, tau: float) -> float:
    """Zhang et al.: s(v, w) = sum_b v_{2b} w_{2b+1} - v_{2b+1} w_{2b} on unit vectors, P = sigmoid(s / tau)."""
    v, w = row["chosen"].embedding, row["rejected"].embedding
    norm_v, norm_w = math.sqrt(sum(x * x for x in v)), math.sqrt(sum(x * x for x in w))
    score = 0.0
    for b in range(len(v) // 2):
        score += v[2 * b] * w[2 * b + 1] - v[2 * b + 1] * w[2 * b]
    prob = sigmoid(score / (norm_v * norm_w) / tau)
    p = label_p(row)
    return -p * math.log(prob) - (1 - p) * math.log(1 - prob)


# ----------------------------------------------------------------------------------------------------------------- VRPO

LINKS = {
    "dpo": bradley_terry_nll,
    "bradley_terry": bradley_terry_nll,
    "ipo": ipo_square,
    "hinge": hinge_loss,
    "ramp": ramp_loss,
}


def three_terms(
    psi: Callable[[float], float],
    p: float,
    g: float,
    h: float,
    aux: list[tuple[float, float]],
    lam: float | str,
    shift: float = 0.0,
) -> float:
    """l(h, z) - lam [g psi(h) + (1-g) psi(-h)] + lam/M sum_m [g* psi(h*) + (1-g*) psi(-h*)], z ~ Bernoulli(p).

    aux: (h*, g*) per auxiliary pair; lam "auto" is M/(M+1); without pairs only the first term is left.
    """
    data = p * psi(h - shift) + (1 - p) * psi(-(h - shift))
    m = len(aux)
    if m == 0:
        return data
    weight = m / (m + 1) if lam == "auto" else lam
    same_pair = g * psi(h - shift) + (1 - g) * psi(-(h - shift))
    fresh = 0.0
    for h_star, g_star in aux:
        fresh += (g_star * psi(h_star) + (1 - g_star) * psi(-h_star)) / m
    return data - weight * same_pair + weight * fresh


def vrpo(row: Row, base: str, beta: float, lam: float | str = 1.0, nll: float = 0.0, **how) -> float:
    aux = [(implied(a, **how) - implied(b, **how), a.preference) for a, b in row.aux]
    g = row.scalars.get("chosen_preference", float("nan"))
    loss = three_terms(lambda h: LINKS[base](h, beta), label_p(row), g, gap(row, **how), aux, lam)
    return loss + nll * -row["chosen"].policy / row["chosen"].tokens


def vrpo_reward(row: Row, base: str, lam: float | str = 1.0, centre: float = 0.0) -> float:
    win, lose = row["chosen"].reward, row["rejected"].reward
    aux = [(a.reward - b.reward, a.preference) for a, b in row.aux]
    g = row.scalars.get("chosen_preference", float("nan"))
    shift = row.scalars.get("margin", 0.0)
    loss = three_terms(lambda h: LINKS[base](h, 1.0), label_p(row), g, win - lose, aux, lam, shift)
    return loss + centre * (win + lose) ** 2
