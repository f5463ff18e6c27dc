"""Every loss against an independent formula, its gradient, its invariances, and its YAML."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from config.build import build as build_config
from losses.base import Base
from losses.gpm import GPM, preference_score
from losses.pairwise import DPO, IPO, Hinge, Ramp, RDPONoise, divergence_score
from losses.reward import Reward
from losses.sft import SFT
from losses.types import Loss, Scored
from losses.vrpo import VarianceReduced, VarianceReducedReward
from tests.oracles import loss_formulas as oracle
from tests.oracles.cases import Case, Response, Row, build, call, random_rows, with_leaf
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
TOKEN = {"per_token": True}
FREE = {"reference_free": True}

# (name, loss, oracle on a row); log-probs here are O(3) nats apart, betas such that both branches of the kinks occur
PAIRWISE = [
    ("dpo", DPO(0.3), lambda r: oracle.dpo(r, 0.3)),
    ("cdpo", DPO(0.3, label_smoothing=0.1), lambda r: oracle.dpo(r, 0.3, eps=0.1)),
    ("dpo_reference_free", DPO(0.3, reference_free=True), lambda r: oracle.dpo(r, 0.3, **FREE)),
    ("dpo_per_token", DPO(2.0, length_norm="token"), lambda r: oracle.dpo(r, 2.0, **TOKEN)),
    ("dpo_js", DPO(0.3, f_divergence="js"), lambda r: oracle.dpo(r, 0.3, divergence="js")),
    ("dpo_alpha", DPO(0.3, f_divergence="alpha", alpha=0.4), lambda r: oracle.dpo(r, 0.3, divergence="alpha", alpha=0.4)),
    ("ipo", IPO(0.1), lambda r: oracle.ipo(r, 0.1)),
    ("ipo_per_token", IPO(0.1, length_norm="token"), lambda r: oracle.ipo(r, 0.1, **TOKEN)),
    ("ipo_reference_free", IPO(0.1, reference_free=True), lambda r: oracle.ipo(r, 0.1, **FREE)),
    ("rdpo_noise", RDPONoise(0.3, flip_rate=0.2), lambda r: oracle.rdpo_noise(r, 0.3, 0.2)),
    ("hinge", Hinge(0.3), lambda r: oracle.hinge(r, 0.3)),
    ("ramp", Ramp(0.3), lambda r: oracle.ramp(r, 0.3)),
]  # fmt: skip
OTHERS = [
    ("reward", Reward(), "reward", lambda r: oracle.reward(r)),
    ("reward_smooth_centred", Reward(0.1, 0.05), "reward", lambda r: oracle.reward(r, 0.1, 0.05)),
    ("gpm", GPM(0.4), "embedding", lambda r: oracle.gpm(r, 0.4)),
]
ALL = [(name, loss, "logps", formula) for name, loss, formula in PAIRWISE] + OTHERS
IDS = [name for name, *_ in ALL]


def shifted(row: Row, index: int, amount: float, field: str, coordinate: int = 0) -> Row:
    """The row with one response's score moved."""
    responses = list(row.responses)
    value = getattr(responses[index], field)
    if field == "embedding":
        value = tuple(v + amount * (i == coordinate) for i, v in enumerate(value))
    else:
        value = value + amount
    responses[index] = dataclasses.replace(responses[index], **{field: value})
    return Row(tuple(responses), row.scalars)


def numeric_gradient(formula: Callable[[Row], float], rows: list[Row], output: str) -> np.ndarray:
    """Central differences of the oracle's summed loss with respect to every score, in leaf order."""
    field, width = {"logps": ("policy", 1), "reward": ("reward", 1), "embedding": ("embedding", 4)}[output]
    step, out = 1e-6, []
    for row in rows:
        for i in range(len(row.responses)):
            for c in range(width):
                up, down = (formula(shifted(row, i, s * step, field, c)) for s in (1, -1))
                out.append((up - down) / (2 * step))
    return np.array(out)


@pytest.mark.parametrize(("name", "loss", "output", "formula"), ALL, ids=IDS)
def test_loss_and_gradient_equal_the_papers_formula(name, loss, output, formula):
    rows = random_rows(1, 12) + random_rows(2, 12, p_chosen=True, margin=True)
    case = build(rows, output)
    out = call(loss, case)
    assert out.losses.dtype == torch.float64
    np.testing.assert_allclose(out.losses.detach(), [formula(row) for row in rows], rtol=1e-12, atol=1e-12)
    out.losses.sum().backward()
    # 1e-6: error of a central difference with step 1e-6
    expected = numeric_gradient(formula, rows, output).reshape(case.leaf.shape)
    np.testing.assert_allclose(case.leaf.grad, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "loss", "output", "formula"), ALL, ids=IDS)
def test_gradcheck_in_float64(name, loss, output, formula):
    case = build(random_rows(3, 4, p_chosen=True, margin=True), output)
    assert torch.autograd.gradcheck(lambda leaf: call(loss, with_leaf(case, leaf)).losses, case.leaf)


def test_links_cover_every_branch_of_the_kinks():
    """The oracle comparison means little unless the random margins reach all pieces of the ramp."""
    margins = 0.3 * np.array([oracle.gap(row) for row in random_rows(1, 12) + random_rows(2, 12)])
    assert (margins < -0.5).any() and ((margins > -0.5) & (margins < 1)).any() and (margins > 1).any()


# ------------------------------------------------------------------------------------------------- closed forms


def one_pair(
    chosen: float, rejected: float, *, reference: tuple[float, float] = (0.0, 0.0), tokens=(3, 5), **scalars
) -> Row:
    embedding = (1.0, 0.5, -0.2, 0.3)
    return Row(
        (
            Response("chosen", chosen, reference[0], tokens[0], chosen, embedding),
            Response("rejected", rejected, reference[1], tokens[1], rejected, embedding[::-1]),
        ),
        scalars,
    )


def test_dpo_gradient_is_minus_beta_times_the_probability_of_being_wrong():
    case = build(random_rows(4, 6))
    loss = DPO(0.7)
    h = loss.margin(case.policy, case.reference).detach()
    call(loss, case).losses.sum().backward()
    want = -0.7 * torch.sigmoid(-0.7 * h)
    torch.testing.assert_close(case.leaf.grad[case.policy.one("chosen")], want)
    torch.testing.assert_close(case.leaf.grad[case.policy.one("rejected")], -want)


def test_losses_at_step_zero():
    """Policy = reference: ln 2, (1/2beta)^2, 1, 1, and ln 2 for the unbiased loss (its two terms are equal there)."""
    row = one_pair(-3.0, -9.0, reference=(-3.0, -9.0))
    values = {
        DPO(0.1): math.log(2), DPO(0.1, label_smoothing=0.3): math.log(2), RDPONoise(0.1, flip_rate=0.3): math.log(2),
        IPO(0.01): 2500.0, Hinge(0.1): 1.0, Ramp(0.1): 1.0,
        DPO(0.1, f_divergence="js"): math.log(2), DPO(0.1, f_divergence="alpha", alpha=1.0): math.log(2),
    }  # fmt: skip
    for loss, value in values.items():
        out = call(loss, build([row]))
        assert float(out.losses.detach()) == pytest.approx(value, rel=1e-12)
        assert float(out.metrics["rewards/chosen"]) == pytest.approx(
            0, abs=1e-12
        )  # implied rewards start at zero


def test_hand_worked_values():
    """beta h = 0.5 * (1 - (-1)) = 1; and u = -1 for the swapped pair."""
    won, lost = one_pair(1.0, -1.0), one_pair(-1.0, 1.0)
    case = build([won, lost])
    log1pexp = math.log1p(math.exp(-1))
    for loss, values in [
        (DPO(0.5), [log1pexp, 1 + log1pexp]),
        (DPO(0.5, label_smoothing=0.1), [0.1 + log1pexp, 0.9 + log1pexp]),
        (IPO(0.5), [1.0, 9.0]),
        (
            RDPONoise(0.5, flip_rate=0.25),
            [1.5 * log1pexp - 0.5 * (1 + log1pexp), 1.5 * (1 + log1pexp) - 0.5 * log1pexp],
        ),
        (Hinge(0.5), [0.0, 2.0]),
        (Ramp(0.5), [0.0, 1.5]),
    ]:
        assert call(loss, case).losses.tolist() == pytest.approx(values, rel=1e-12)
    assert call(Base(), case).losses.tolist() == [-1.0, 0.0]
    assert call(Base(), build([one_pair(1.0, 1.0)])).losses.tolist() == [-0.5]


def test_unbiased_loss_averages_over_flips_to_the_clean_loss():
    """E_flip[rdpo_noise] = DPO, by enumeration of the flip, for hard and soft labels."""
    rate, loss = 0.3, RDPONoise(0.4, flip_rate=0.3)
    for row in random_rows(5, 6) + random_rows(6, 6, p_chosen=True):
        p = row.scalars.get("p_chosen", 1.0)
        flipped = Row(row.responses, {**row.scalars, "p_chosen": 1 - p})
        kept, swapped = call(loss, build([row, flipped])).losses.tolist()
        clean = call(DPO(0.4), build([row])).losses.item()
        assert (1 - rate) * kept + rate * swapped == pytest.approx(clean, rel=1e-11)


def test_label_smoothing_is_the_inverse_of_the_unbiased_loss():
    """Smoothing maps p to eps + (1 - 2 eps) p, the unbiased loss maps it back."""
    p = torch.linspace(0, 1, 5, dtype=torch.float64)
    there = DPO(1.0, label_smoothing=0.2).label(p)
    torch.testing.assert_close(RDPONoise(1.0, flip_rate=0.2).label(there), p)
    assert there[0] == 0.2 and there[-1] == pytest.approx(0.8)


@pytest.mark.parametrize("loss", [loss for _, loss, _ in PAIRWISE], ids=[n for n, *_ in PAIRWISE])
def test_soft_label_of_one_half_does_not_care_which_is_chosen(loss):
    rows = [Row(r.responses, {"p_chosen": 0.5}) for r in random_rows(7, 5)]
    swapped = [
        Row(
            (
                dataclasses.replace(r["rejected"], role="chosen"),
                dataclasses.replace(r["chosen"], role="rejected"),
            ),
            r.scalars,
        )
        for r in rows
    ]
    torch.testing.assert_close(call(loss, build(rows)).losses, call(loss, build(swapped)).losses)


@pytest.mark.parametrize(
    "loss", [DPO(0.3), IPO(0.1), Hinge(0.3), Ramp(0.3)], ids=["dpo", "ipo", "hinge", "ramp"]
)
def test_soft_label_zero_is_the_swapped_pair(loss):
    rows = random_rows(8, 5)
    zero = [Row(r.responses, {"p_chosen": 0.0}) for r in rows]
    swapped = [
        Row(
            (
                dataclasses.replace(r["rejected"], role="chosen"),
                dataclasses.replace(r["chosen"], role="rejected"),
            )
        )
        for r in rows
    ]
    torch.testing.assert_close(call(loss, build(zero)).losses, call(loss, build(swapped)).losses)


def test_rows_without_p_chosen_count_as_certain():
    rows = random_rows(9, 3, p_chosen=True) + random_rows(10, 3)
    losses = call(DPO(0.3), build(rows)).losses
    torch.testing.assert_close(losses[3:], call(DPO(0.3), build(rows[3:])).losses)


def test_ipo_soft_label_minimiser_is_the_scaled_target():
    """argmin of p (h - t)^2 + (1 - p)(h + t)^2 is (2p - 1) t, t = 1/(2 beta)."""
    loss, p = IPO(0.1), torch.tensor([0.8], dtype=torch.float64)
    h = torch.tensor([(2 * 0.8 - 1) / (2 * 0.1)], dtype=torch.float64, requires_grad=True)
    (p * loss.link(h) + (1 - p) * loss.link(-h)).sum().backward()
    assert float(h.grad) == pytest.approx(0, abs=1e-12)


# ----------------------------------------------------------------------------------------------------- divergences


def test_divergence_scores_are_zero_at_equality_and_increase():
    x = torch.linspace(-60, 60, 241, dtype=torch.float64)
    for kind, alpha in [("reverse_kl", None), ("js", None), ("alpha", 0.5), ("alpha", 1.0)]:
        score = divergence_score(x, kind, alpha)
        assert float(divergence_score(torch.zeros(1, dtype=torch.float64), kind, alpha)) == pytest.approx(
            0, abs=1e-15
        )
        # saturation (js above, alpha above) may round to equality, never decrease
        assert (score.diff() >= 0).all() and (score[:120].diff() > 0).all()


def test_small_alpha_is_the_reverse_kl():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(divergence_score(x, "alpha", 1e-7), x, rtol=1e-5, atol=1e-6)


def test_alpha_tail_is_continued_smoothly_and_keeps_its_gradient():
    edge = -20.0  # alpha = 1
    x = torch.tensor([edge - 1e-6, edge + 1e-6, -1e4], dtype=torch.float64, requires_grad=True)
    score = divergence_score(x, "alpha", 1.0)
    (slope,) = torch.autograd.grad(score.sum(), x)
    assert float((score[1] - score[0]).detach() / 2e-6) == pytest.approx(math.exp(20), rel=1e-5)
    assert slope.tolist() == pytest.approx([math.exp(20)] * 3, rel=1e-5)
    assert torch.isfinite(divergence_score(torch.tensor([-1e4]), "alpha", 1.0)).all()  # float32


# ------------------------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize(("name", "loss", "output", "formula"), ALL, ids=IDS)
def test_permuting_examples_permutes_losses_and_a_batch_of_one_is_a_row(name, loss, output, formula):
    rows = random_rows(11, 6, p_chosen=True, margin=True)
    order = [3, 0, 5, 1, 4, 2]
    losses = call(loss, build(rows, output)).losses
    permuted = call(loss, build([rows[i] for i in order], output)).losses
    equal = functools.partial(
        torch.testing.assert_close, rtol=1e-14, atol=0
    )  # a vector's rest may round differently
    equal(permuted, losses[order])
    equal(call(loss, build(rows[2:3], output)).losses, losses[2:3])


FINITE = [
    DPO(0.3),
    DPO(5.0, label_smoothing=0.2),
    IPO(0.01),
    RDPONoise(0.3, flip_rate=0.4),
    Hinge(1.0),
    Ramp(1.0),
] + [
    cls(0.5, **how)
    for cls in (DPO, IPO)
    for how in ({"f_divergence": "js"}, {"f_divergence": "alpha", "alpha": 1.0}, {"length_norm": "token"})
]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1e4, 0), min_size=4, max_size=4),
    st.sampled_from(FINITE),
    st.sampled_from([0.0, 0.3, 1.0]),
)
def test_losses_and_gradients_are_finite_in_float32(logps, loss, p):
    case = build([one_pair(*logps[:2], reference=tuple(logps[2:]), p_chosen=p)], dtype=torch.float32)
    out = call(loss, case)
    out.losses.sum().backward()
    assert torch.isfinite(out.losses).all() and torch.isfinite(case.leaf.grad).all()
    assert all(torch.isfinite(m).all() for m in out.metrics.values())


@settings(max_examples=25, deadline=None)
@given(st.floats(-50, 50), st.integers(0, 1000))
def test_shifting_policy_and_reference_together_changes_nothing(shift, seed):
    row = random_rows(seed, 1)[0]
    moved = Row(
        tuple(
            dataclasses.replace(r, policy=r.policy + shift, reference=r.reference + shift)
            for r in row.responses
        )
    )
    for loss in (DPO(0.3), IPO(0.1), Ramp(0.3)):
        a, b = (call(loss, build([r])).losses for r in (row, moved))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_no_gradient_reaches_the_reference_or_the_labels():
    case = build(random_rows(12, 4, p_chosen=True))
    reference = dataclasses.replace(case.reference, logps=case.reference.logps.clone().requires_grad_())
    p = case.batch.scalars["p_chosen"].requires_grad_()
    for _, loss, _ in PAIRWISE:
        if loss.needs.reference:
            loss(case.policy, reference, case.batch).losses.sum().backward()
    assert reference.logps.grad is None and p.grad is None and case.leaf.grad is not None


def test_reference_free_ignores_the_reference_and_asks_for_none():
    rows = random_rows(13, 4)
    loss = DPO(0.3, reference_free=True)
    assert loss.needs.reference == ()
    case = build(rows)
    torch.testing.assert_close(
        loss(case.policy, case.reference, case.batch).losses, loss(case.policy, None, case.batch).losses
    )
    assert DPO(0.3).needs.reference == ("chosen", "rejected")


def test_a_reference_of_other_responses_is_refused():
    case = build(random_rows(14, 2))
    other = dataclasses.replace(case.reference, roles=case.reference.roles[::-1])
    with pytest.raises(ValueError, match="same responses"):
        DPO(0.3)(case.policy, other, case.batch)
    with pytest.raises(ValueError, match="same responses"):
        DPO(0.3)(case.policy, None, case.batch)


# --------------------------------------------------------------------------------------------------------- metrics


def test_pairwise_metrics():
    row = one_pair(-3.0, -5.0, reference=(-4.0, -4.0))
    tie = one_pair(-5.0, -5.0, reference=(-4.0, -4.0))
    moved = one_pair(-5.0, -3.0, reference=(-4.0, -5.0))
    metrics = call(IPO(0.5), build([row, tie, moved])).metrics
    want = {
        "rewards/chosen": [0.5, -0.5, -0.5],
        "rewards/rejected": [-0.5, -0.5, 1.0],
        "rewards/margins": [1.0, 0.0, -1.5],
        "rewards/accuracies": [1.0, 0.5, 0.0],
        "logps/chosen": [-3.0, -5.0, -5.0],
        "logps/rejected": [-5.0, -5.0, -3.0],
        "policy_accuracies": [1.0, 0.5, 0.0],
        "reference_accuracies": [0.5, 0.5, 1.0],
    }
    assert {name: m.tolist() for name, m in metrics.items()} == want
    assert not any(m.requires_grad for m in metrics.values())
    free = call(DPO(0.5, reference_free=True), build([row])).metrics
    assert "reference_accuracies" not in free


def test_gpm_is_skew_symmetric_and_allows_cycles():
    gen = torch.Generator().manual_seed(0)
    v, w = torch.randn(2, 20, 6, generator=gen, dtype=torch.float64)
    torch.testing.assert_close(preference_score(v, w), -preference_score(w, v), rtol=0, atol=0)
    torch.testing.assert_close(preference_score(5 * v, w), preference_score(v, w))  # unit norm
    assert (preference_score(v, w).abs() <= 1).all()
    angles = torch.tensor([0.0, 2 * math.pi / 3, 4 * math.pi / 3])
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    beats = [float(preference_score(circle[i], circle[(i + 1) % 3])) for i in range(3)]
    assert beats == pytest.approx([math.sin(2 * math.pi / 3)] * 3, rel=1e-5)  # each beats the next
    with pytest.raises(ValueError, match="even"):
        preference_score(torch.ones(3), torch.ones(3))


def test_reward_margin_and_centring_by_hand():
    row = one_pair(1.5, 0.5, margin=0.25)
    out = call(Reward(center_rewards_coefficient=0.1), build([row], "reward"))
    assert out.losses.item() == pytest.approx(math.log1p(math.exp(-0.75)) + 0.1 * 4.0, rel=1e-12)
    assert out.metrics["rewards/margins"].item() == 1.0  # without the margin column


def sft_case(logps: list[float], tokens: list[int]) -> Case:
    leaf = torch.tensor(logps, dtype=torch.float64, requires_grad=True)
    scored = Scored(
        leaf, torch.tensor(tokens), ("target",) * len(logps), torch.arange(len(logps)), len(logps)
    )
    return Case(scored, scored, build(random_rows(0, len(logps))).batch, leaf)


def test_sft_is_the_token_sum_whatever_the_unit():
    case = sft_case([-6.0, -2.5], [3, 5])
    for loss in (SFT(), SFT(unit="token"), SFT(sft_on="all")):
        out = loss(case.policy, None, case.batch)
        assert out.losses.tolist() == [6.0, 2.5]
        assert out.metrics["nll_per_token"].tolist() == [2.0, 0.5]
        assert loss.needs.policy == ("target",) and loss.needs.reference == ()
    assert SFT().needs.unit == "example" and SFT(unit="token").needs.unit == "token"
    SFT()(case.policy, None, case.batch).losses.sum().backward()
    assert case.leaf.grad.tolist() == [-1.0, -1.0]


def test_base_is_for_evaluation_only():
    assert not Base().needs.trains and Base().needs.reference == ()
    assert all(loss.needs.trains for _, loss, _, _ in ALL)


# ---------------------------------------------------------------------------------------------------- user mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPO(-1), r"loss\.beta=-1: must be > 0; try loss\.beta=0\.1"),
        (lambda: DPO(0.1, label_smoothing=0.5), r"loss\.label_smoothing=0\.5"),
        (lambda: RDPONoise(0.1, flip_rate=0.5), r"loss\.flip_rate=0\.5"),
        (lambda: IPO(0.1, length_norm="mean"), r"loss\.length_norm=mean: must be one of"),
        (lambda: DPO(0.1, f_divergence="kl"), r"loss\.f_divergence=kl"),
        (lambda: DPO(0.1, f_divergence="alpha"), r"loss\.alpha=None: must be > 0"),
        (lambda: DPO(0.1, alpha=0.5), r"loss\.alpha=0\.5: only loss\.f_divergence=alpha uses it"),
        (lambda: GPM(0.0), r"loss\.tau=0\.0"),
        (lambda: Reward(center_rewards_coefficient=-1), r"loss\.center_rewards_coefficient=-1"),
        (lambda: Reward(label_smoothing=0.7), r"loss\.label_smoothing=0\.7"),
        (lambda: SFT(unit="batch"), r"loss\.unit=batch"),
        (lambda: SFT(sft_on="rejected"), r"loss\.sft_on=rejected"),
        (lambda: VarianceReduced(0.1, base="sigmoid"), r"loss\.base=sigmoid"),
        (lambda: VarianceReduced(0.1, lam=1.5), r"loss\.lam=1\.5"),
        (lambda: VarianceReduced(0.1, lam="1"), r"loss\.lam=1: must be"),
        (lambda: VarianceReduced(0.1, nll=-1), r"loss\.nll=-1"),
        (lambda: VarianceReducedReward(base="dpo"), r"loss\.base=dpo"),
        (lambda: VarianceReducedReward(center_rewards_coefficient=-1), r"loss\.center_rewards_coefficient"),
    ],
)
def test_bad_values_are_refused_by_the_key_as_typed(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --------------------------------------------------------------------------------------------- the YAMLs' contract

FILES = sorted((ROOT / "config" / "loss").rglob("*.yaml"))
COMPONENTS = [f for f in FILES if "class" in yaml.safe_load(f.read_text())]
REQUIRED = {"beta": 0.3, "flip_rate": 0.2}  # values for the keys that have no default
MOVED = {  # another legal value per field, with what it takes to be legal
    "beta": {"beta": 0.45},
    "flip_rate": {"flip_rate": 0.1},
    "label_smoothing": {"label_smoothing": 0.15},
    "alpha": {"f_divergence": "alpha", "alpha": 0.7},
    "f_divergence": {"f_divergence": "js"},
    "reference_free": {"reference_free": True},
    "length_norm": {"length_norm": "token"},
    "lam": {"lam": "auto"},
    "nll": {"nll": 0.5},
    "base": {"base": "ramp"},
    "center_rewards_coefficient": {"center_rewards_coefficient": 0.2},
    "tau": {"tau": 0.7},
    "dim": {"dim": 2},
    "unit": {"unit": "token"},
}
READ_ELSEWHERE = {("sft", "sft_on")}  # the data layer's key; its effect is tested with the data


def load(path: Path, **changes) -> Loss:
    values = yaml.safe_load(path.read_text())
    module, _, name = values.pop("class").rpartition(".")
    values.pop("name")
    values = {k: REQUIRED[k] if v == "???" else v for k, v in values.items()} | changes
    return build_config(getattr(importlib.import_module(module), name), values, "loss.")


def contract_case(loss: Loss) -> Case:
    """Rows with every optional column, and only the roles the loss asks for."""
    if loss.needs.policy == ("target",):
        return sft_case([-6.0, -2.5, -4.0], [3, 5, 4])
    num_aux = (0, 1, 3) if loss.needs.optional_roles else (0,)
    return build(random_rows(20, 7, num_aux=num_aux, p_chosen=True, margin=True), loss.needs.output)


def signature(loss: Loss) -> tuple:
    case = contract_case(loss)
    return tuple(call(loss, case).losses.tolist()), loss.needs


def test_the_contract_covers_every_loss_file():
    assert len(COMPONENTS) >= 11
    for path in set(FILES) - set(COMPONENTS):  # presets: a component under another name
        base = yaml.safe_load(path.read_text())["defaults"][0]
        assert (path.parent / f"{base.removesuffix('@loss')}.yaml") in COMPONENTS, path


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: p.stem)
def test_yaml_keys_are_the_fields_and_each_has_a_comment(path):
    values = yaml.safe_load(path.read_text())
    loss = load(path)
    assert values["name"] == path.stem
    assert set(values) - {"name", "class"} == {f.name for f in dataclasses.fields(loss)}
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        if ":" in line and not line.startswith(("#", "class:")):
            assert lines[i - 1].startswith("#"), f"{path.name}:{i + 1}: {line} has no comment"
    assert isinstance(loss, Loss)


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: p.stem)
def test_loss_gets_by_on_what_it_needs_and_returns_one_loss_per_example(path):
    loss = load(path)
    case = contract_case(loss)
    assert set(case.policy.roles) == set(loss.needs.policy)
    assert set(loss.needs.reference) <= set(loss.needs.policy) and set(loss.needs.optional_roles) <= set(
        loss.needs.policy
    )
    case = dataclasses.replace(
        case, batch=dataclasses.replace(case.batch, scalars={k: v for k, v in case.batch.scalars.items() if k == "chosen_preference" or k in loss.needs.scalars})
    )  # fmt: skip
    out = call(loss, case)
    num = case.policy.num_examples
    assert out.losses.shape == (num,) and torch.isfinite(out.losses).all()
    assert out.losses.requires_grad == loss.needs.trains
    for name, metric in out.metrics.items():
        assert metric.shape == (num,) and not metric.requires_grad, name
    rerun = call(loss, case)
    assert torch.equal(rerun.losses, out.losses)


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda p: p.stem)
def test_every_key_changes_something(path):
    fields = [f.name for f in dataclasses.fields(load(path)) if (path.stem, f.name) not in READ_ELSEWHERE]
    for name in fields:
        changes = MOVED[name]
        before = {k: v for k, v in changes.items() if k != name}  # alpha is compared under f_divergence=alpha
        if before:
            before[name] = 0.3
        assert signature(load(path, **changes)) != signature(load(path, **before)), (
            f"{path.stem}: {name} has no effect"
        )


@pytest.mark.parametrize("path", [p for p in COMPONENTS if load(p).needs.trains], ids=lambda p: p.stem)
def test_gradcheck_of_every_configured_loss(path):
    loss = load(path)
    case = contract_case(loss)
    assert torch.autograd.gradcheck(lambda leaf: call(loss, with_leaf(case, leaf)).losses, case.leaf)


@pytest.mark.parametrize("path", [p for p in COMPONENTS if p.stem != "sft"], ids=lambda p: p.stem)
def test_float32_scores_give_float32_losses(path):
    loss = load(path)
    case = build(random_rows(20, 4, num_aux=(1,)), loss.needs.output, dtype=torch.float32)
    out = call(loss, case)
    assert out.losses.dtype == torch.float32
    assert all(m.dtype == torch.float32 for m in out.metrics.values())
