"""VRPO's losses against the oracle, the estimator's identities, and what goes wrong in a row."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from losses.pairwise import DPO, IPO, Hinge, Ramp
from losses.reward import Reward
from losses.vrpo import VarianceReduced, VarianceReducedReward
from tests.oracles import loss_formulas as oracle
from tests.oracles.cases import Case, Response, Row, build, call, random_rows, with_leaf
from tests.test_losses import numeric_gradient
from utils import UserError

PLAIN = {"dpo": DPO, "ipo": IPO, "hinge": Hinge, "ramp": Ramp}
BETA = {"dpo": 0.3, "ipo": 0.1, "hinge": 0.3, "ramp": 0.3}

POLICY = [
    (f"{base}_{lam}", VarianceReduced(BETA[base], base=base, lam=lam), (base, BETA[base], lam), {})
    for base in PLAIN
    for lam in (1.0, 0.3, "auto")
] + [
    ("nll", VarianceReduced(0.3, nll=0.2), ("dpo", 0.3, 1.0, 0.2), {}),
    ("free", VarianceReduced(0.3, reference_free=True), ("dpo", 0.3), {"reference_free": True}),
    ("per_token", VarianceReduced(0.1, base="ipo", length_norm="token"), ("ipo", 0.1), {"per_token": True}),
    ("js", VarianceReduced(0.3, f_divergence="js"), ("dpo", 0.3), {"divergence": "js"}),
    (
        "alpha",
        VarianceReduced(0.3, base="ramp", f_divergence="alpha", alpha=0.3),
        ("ramp", 0.3),
        {"divergence": "alpha", "alpha": 0.3},
    ),
]
CASES = [
    (n, loss, "logps", lambda r, a=a, how=how: oracle.vrpo(r, *a, **how)) for n, loss, a, how in POLICY
] + [
    (
        f"reward_{base}_{lam}_{centre}",
        VarianceReducedReward(base=base, lam=lam, center_rewards_coefficient=centre),
        "reward",
        lambda r, a=(base, lam, centre): oracle.vrpo_reward(r, *a),
    )
    for base, lam, centre in [("bradley_terry", 1.0, 0.0), ("ramp", "auto", 0.1), ("hinge", 0.5, 0.0)]
]
IDS = [name for name, *_ in CASES]


@pytest.mark.parametrize(("name", "loss", "output", "formula"), CASES, ids=IDS)
def test_loss_and_gradient_equal_the_oracle_with_varying_m(name, loss, output, formula):
    rows = random_rows(1, 12, num_aux=(1, 3, 0, 2)) + random_rows(
        2, 8, num_aux=(2, 1), p_chosen=True, margin=True
    )
    case = build(rows, output)
    out = call(loss, case)
    np.testing.assert_allclose(out.losses.detach(), [formula(row) for row in rows], rtol=1e-12, atol=1e-12)
    out.losses.sum().backward()
    # 1e-6: error of a central difference with step 1e-6
    np.testing.assert_allclose(case.leaf.grad, numeric_gradient(formula, rows, output), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "loss", "output", "formula"), CASES, ids=IDS)
def test_gradcheck_in_float64(name, loss, output, formula):
    case = build(random_rows(3, 3, num_aux=(2, 1, 0), p_chosen=True, margin=True), output)
    assert torch.autograd.gradcheck(lambda leaf: call(loss, with_leaf(case, leaf)).losses, case.leaf)


# ------------------------------------------------------------------------------------------------ golden arithmetic


def pair_row(h: float, aux: list[tuple[float, float]], **scalars: float) -> Row:
    """A row with reference scores 0, margin h and auxiliary margins and preferences aux; rewards equal log-probs."""

    def response(role: str, score: float, preference: float = float("nan")) -> Response:
        return Response(role, score, 0.0, 1, score, (1.0, 0.0, 0.0, 0.0), preference)

    responses = [response("chosen", h), response("rejected", 0.0)]
    for h_star, g_star in aux:
        responses += [response("aux_1", h_star, g_star), response("aux_2", 0.0)]
    return Row(tuple(responses), scalars)


def test_worked_by_hand_for_both_links():
    """beta h = 0.25, g = 0.8; beta h* = -0.5 with g* = 0.3 and 2 with g* = 0.9."""
    row = pair_row(0.5, [(-1.0, 0.3), (4.0, 0.9)], chosen_preference=0.8)

    def soft(u):
        return math.log1p(math.exp(-u))

    i1, i2 = soft(0.25), 0.8 * soft(0.25) + 0.2 * soft(-0.25)
    i3 = (0.3 * soft(-0.5) + 0.7 * soft(0.5) + 0.9 * soft(2) + 0.1 * soft(-2)) / 2
    out = call(VarianceReduced(0.5), build([row]))
    assert out.losses.item() == pytest.approx(i1 - i2 + i3, rel=1e-12)
    assert [out.metrics[f"vrpo/i{k}"].item() for k in (1, 2, 3)] == pytest.approx([i1, i2, i3], rel=1e-12)
    assert out.metrics["vrpo/i3_minus_i2"].item() == pytest.approx(i3 - i2, rel=1e-12)
    auto = call(VarianceReduced(0.5, lam="auto"), build([row])).losses.item()
    assert auto == pytest.approx(i1 + 2 / 3 * (i3 - i2), rel=1e-12)
    # ramp: T(.25) = .75, T(-.25) = 1.25, T(-.5) = 1.5, T(.5) = .5, T(2) = 0, T(-2) = 1.5
    i1, i2, i3 = 0.75, 0.8 * 0.75 + 0.2 * 1.25, (0.3 * 1.5 + 0.7 * 0.5 + 0.9 * 0 + 0.1 * 1.5) / 2
    assert call(VarianceReduced(0.5, base="ramp"), build([row])).losses.item() == pytest.approx(
        i1 - i2 + i3, rel=1e-12
    )


def test_reward_margin_shifts_both_terms_of_the_labelled_pair():
    """d in I1 and I2, negated for the swapped label; not in I3."""
    row = pair_row(1.0, [(0.5, 0.6)], chosen_preference=0.7, margin=0.4)

    def soft(u):
        return math.log1p(math.exp(-u))

    want = soft(0.6) - (0.7 * soft(0.6) + 0.3 * soft(-0.6)) + 0.6 * soft(0.5) + 0.4 * soft(-0.5)
    assert call(VarianceReducedReward(), build([row], "reward")).losses.item() == pytest.approx(
        want, rel=1e-12
    )


@pytest.mark.parametrize(
    ("base", "value"), [("dpo", math.log(2)), ("ramp", 1.0), ("hinge", 1.0), ("ipo", 25.0)]
)
def test_value_at_step_zero_is_the_base_losss(base, value):
    """All margins 0: the correction vanishes whatever the preferences."""
    row = pair_row(0.0, [(0.0, 0.3), (0.0, 0.9)], chosen_preference=0.8)
    assert call(VarianceReduced(0.1, base=base), build([row])).losses.item() == pytest.approx(
        value, rel=1e-12
    )


def test_logistic_identity():
    """Ye et al. with logistic psi: L = softplus(h*) - g* h* - (1 - g) h, its gradient on h is -(1 - g)."""
    h, g, h_star, g_star = 0.7, 0.8, -1.3, 0.35
    case = build([pair_row(h, [(h_star, g_star)], chosen_preference=g)])
    out = call(VarianceReduced(1.0), case)
    want = math.log1p(math.exp(h_star)) - g_star * h_star - (1 - g) * h
    assert out.losses.item() == pytest.approx(want, rel=1e-12)
    out.losses.sum().backward()
    slope = 1 / (1 + math.exp(-h_star)) - g_star
    assert case.leaf.grad.tolist() == pytest.approx([-(1 - g), 1 - g, slope, -slope], rel=1e-12)


# ------------------------------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("base", PLAIN)
def test_sure_preference_for_chosen_removes_the_data_term(base):
    """g = 1: the labelled pair gets no gradient, only the auxiliary pairs do."""
    case = build([pair_row(0.8, [(-0.4, 0.3)], chosen_preference=1.0)])
    call(VarianceReduced(BETA[base], base=base), case).losses.sum().backward()
    assert case.leaf.grad[:2].tolist() == pytest.approx([0, 0], abs=1e-14)
    assert case.leaf.grad[2:].abs().min() > 0


def swapped(row: Row) -> Row:
    """Every pair named the other way round: Z -> 0, g -> 1 - g, g* -> 1 - g*."""
    other = {"chosen": "rejected", "rejected": "chosen", "aux_1": "aux_2", "aux_2": "aux_1"}
    flipped = {first.preference: second for first, second in row.aux}
    assert len(flipped) == len(row.aux)
    responses = [dataclasses.replace(row[other[role]], role=role) for role in ("chosen", "rejected")]
    for first, second in row.aux:
        responses.append(dataclasses.replace(second, role="aux_1", preference=1 - first.preference))
        responses.append(dataclasses.replace(first, role="aux_2", preference=float("nan")))
    scalars = {"p_chosen": 0.0, "chosen_preference": 1 - row.scalars["chosen_preference"]}
    return Row(tuple(responses), scalars)


@pytest.mark.parametrize("base", PLAIN)
@pytest.mark.parametrize("lam", [1.0, 0.4, "auto"])
def test_naming_the_pairs_the_other_way_round_changes_nothing(base, lam):
    rows = random_rows(4, 6, num_aux=(1, 2, 3))
    loss = VarianceReduced(BETA[base], base=base, lam=lam)
    a, b = call(loss, build(rows)), call(loss, build([swapped(r) for r in rows]))
    torch.testing.assert_close(a.losses, b.losses)
    for name in ("vrpo/grad_plain", "vrpo/grad_vr"):  # the diagnostics do not depend on the order either
        torch.testing.assert_close(a.metrics[name], b.metrics[name])


def with_data_as_aux(row: Row, num: int, g: float) -> Row:
    aux = []
    for _ in range(num):
        aux.append(dataclasses.replace(row["chosen"], role="aux_1", preference=g))
        aux.append(dataclasses.replace(row["rejected"], role="aux_2"))
    return Row((row["chosen"], row["rejected"], *aux), {**row.scalars, "chosen_preference": g})


@pytest.mark.parametrize("base", PLAIN)
@pytest.mark.parametrize("lam", [1.0, 0.3, "auto"])
def test_auxiliary_pairs_equal_to_the_data_pair_cancel_exactly(base, lam):
    rows = random_rows(5, 5, p_chosen=True)
    preferences = (0.0, 0.2, 0.5, 0.9, 1.0)
    copies = [with_data_as_aux(row, 1 + i % 3, preferences[i]) for i, row in enumerate(rows)]
    loss = VarianceReduced(BETA[base], base=base, lam=lam)
    torch.testing.assert_close(
        call(loss, build(copies)).losses, call(PLAIN[base](BETA[base]), build(rows)).losses
    )


@pytest.mark.parametrize("base", PLAIN)
def test_zero_weight_is_the_base_loss(base):
    rows = random_rows(6, 6, num_aux=(1, 2, 0), p_chosen=True)
    plain = [Row(row.responses[:2], {"p_chosen": row.scalars["p_chosen"]}) for row in rows]
    ours = call(VarianceReduced(BETA[base], base=base, lam=0.0), build(rows))
    base_out = call(PLAIN[base](BETA[base]), build(plain))
    torch.testing.assert_close(ours.losses, base_out.losses)
    for name, metric in base_out.metrics.items():  # and it reports what the base loss reports
        torch.testing.assert_close(ours.metrics[name], metric)


def test_rows_without_auxiliary_pairs_get_the_plain_loss():
    """Mixed with rows that have some, and when no row of the batch has any (an ordinary evaluation set)."""
    rows = random_rows(7, 6, num_aux=(0, 2))
    loss, plain = VarianceReduced(0.3, lam="auto"), DPO(0.3)
    out = call(loss, build(rows))
    alone = call(plain, build(rows[::2]))
    torch.testing.assert_close(out.losses[::2], alone.losses)
    assert out.metrics["vrpo/plain"].tolist() == [1, 0] * 3
    for name in ("i2", "i3", "g", "brier", "coef_plain", "coef_data", "coef_aux", "grad_plain", "grad_vr"):
        assert out.metrics[f"vrpo/{name}"].isnan().tolist() == [True, False] * 3, name
    only = call(loss, build(rows[::2]))
    torch.testing.assert_close(only.losses, alone.losses)
    reward = call(VarianceReducedReward(), build(rows[::2], "reward"))
    torch.testing.assert_close(reward.losses, call(Reward(), build(rows[::2], "reward")).losses)


def test_a_batch_without_preference_columns_is_plain_too():
    rows = random_rows(8, 3)
    case = build(rows)
    bare = dataclasses.replace(case, batch=dataclasses.replace(case.batch, response_scalars={}))
    torch.testing.assert_close(call(VarianceReduced(0.3), bare).losses, call(DPO(0.3), case).losses)


def test_roles_asked_of_policy_and_reference():
    every = ("chosen", "rejected", "aux_1", "aux_2")
    loss, free = VarianceReduced(0.3), VarianceReduced(0.3, reference_free=True)
    assert loss.needs.policy == loss.needs.reference == free.needs.policy == every
    assert free.needs.reference == VarianceReducedReward().needs.reference == ()  # none is loaded
    assert loss.needs.optional_roles == VarianceReducedReward().needs.optional_roles == every[2:]


@pytest.mark.parametrize("base", PLAIN)
def test_own_frozen_preference_changes_nothing_for_dpo_only(base):
    """g = sigmoid(beta h) on every pair: with the logistic link each slope of I2 and I3 is 0, so the gradient is DPO's."""
    beta = BETA[base]
    rows = []
    for row in random_rows(9, 4, num_aux=(1, 2)):
        responses = list(row.responses)
        for k, (first, second) in enumerate(row.aux):
            h = oracle.implied(first) - oracle.implied(second)
            responses[2 + 2 * k] = dataclasses.replace(first, preference=oracle.sigmoid(beta * h))
        rows.append(Row(tuple(responses), {"chosen_preference": oracle.sigmoid(beta * oracle.gap(row))}))
    ours, plain = build(rows), build(rows)
    call(VarianceReduced(beta, base=base), ours).losses.sum().backward()
    call(VarianceReduced(beta, base=base, lam=0.0), plain).losses.sum().backward()
    same = torch.allclose(ours.leaf.grad, plain.leaf.grad, atol=1e-12)
    assert same == (base == "dpo")


@pytest.mark.parametrize("loss", [VarianceReduced(0.3, lam="auto", nll=0.1), VarianceReducedReward(lam=0.5)])
def test_cutting_into_micro_batches_changes_no_row(loss):
    rows = random_rows(10, 9, num_aux=(1, 0, 3), margin=True)
    whole = build(rows, loss.needs.output)
    losses = call(loss, whole).losses
    parts = [build(rows[a:b], loss.needs.output) for a, b in ((0, 2), (2, 3), (3, 8), (8, 9))]
    outs = [call(loss, part) for part in parts]
    equal = functools.partial(
        torch.testing.assert_close, rtol=1e-14, atol=0
    )  # a vector's rest may round differently
    equal(torch.cat([o.losses for o in outs]), losses)
    losses.sum().backward()
    for out in outs:
        out.losses.sum().backward()
    equal(torch.cat([p.leaf.grad for p in parts]), whole.leaf.grad)
    order = [4, 0, 8, 2, 6, 1, 3, 7, 5]
    permuted = call(loss, build([rows[i] for i in order], loss.needs.output)).losses
    equal(permuted, losses[order])


def test_order_of_a_rows_auxiliary_pairs_is_immaterial():
    row = random_rows(11, 1, num_aux=(3,))[0]
    r = row.responses
    other = Row((*r[:2], *r[4:6], *r[2:4], *r[6:]), row.scalars)
    grouped = Row((*r[:2], r[2], r[4], r[6], r[3], r[5], r[7]), row.scalars)  # aux_1 x 3, then aux_2 x 3
    losses = [call(VarianceReduced(0.3), build([x])).losses.item() for x in (row, other, grouped)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-12)


def test_no_gradient_reaches_preferences_labels_or_reference():
    case = build(random_rows(12, 4, num_aux=(1, 2), p_chosen=True))
    reference = dataclasses.replace(case.reference, logps=case.reference.logps.clone().requires_grad_())
    leaves = [*case.batch.scalars.values(), *case.batch.response_scalars.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    VarianceReduced(0.3, lam="auto")(case.policy, reference, case.batch).losses.sum().backward()
    assert case.leaf.grad is not None and case.leaf.grad.abs().min() > 0
    assert all(leaf.grad is None for leaf in [reference.logps, *leaves])


# ------------------------------------------------------------------------------------------------------ diagnostics


@pytest.mark.parametrize("base", PLAIN)
@pytest.mark.parametrize("mode", ["train", "no_grad", "inference"])
def test_diagnostics_are_derivatives_of_the_loss(base, mode):
    """grad_* are derivatives along "scale all scores"; coef_* those along h and h*. Reference scores are 0 here."""
    rng = np.random.default_rng(13)
    rows = [
        pair_row(
            rng.normal() * 2,
            [(rng.normal() * 2, rng.uniform()) for _ in range(m)],
            chosen_preference=rng.uniform(),
        )
        for m in (1, 2, 3)
    ]
    beta, lam = BETA[base], 0.7
    loss = VarianceReduced(beta, base=base, lam=lam)
    case = build(rows)
    with {"train": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
        metrics = call(loss, case).metrics
    step = 1e-6

    def scaled(row: Row, c: float) -> Row:
        return Row(tuple(dataclasses.replace(r, policy=c * r.policy) for r in row.responses), row.scalars)

    def derivative(row: Row, weight: float) -> float:
        up, down = (oracle.vrpo(scaled(row, 1 + s * step), base, beta, weight) for s in (1, -1))
        return (up - down) / (2 * step)

    plain, reduced = ([derivative(row, w) for row in rows] for w in (0.0, lam))
    assert metrics["vrpo/grad_plain"].tolist() == pytest.approx(plain, rel=1e-5, abs=1e-7)
    assert metrics["vrpo/grad_vr"].tolist() == pytest.approx(reduced, rel=1e-5, abs=1e-7)
    assert metrics["vrpo/grad_vr_sq"].tolist() == pytest.approx([g * g for g in reduced], rel=1e-4, abs=1e-7)
    assert metrics["vrpo/grad_plain_sq"].tolist() == pytest.approx([g * g for g in plain], rel=1e-4, abs=1e-7)
    graph = build(rows)
    call(loss, graph).losses.sum().backward()
    by_role = {role: graph.leaf.grad[graph.policy.index(role)] for role in ("chosen", "aux_1")}
    torch.testing.assert_close(metrics["vrpo/coef_data"], by_role["chosen"])
    owner = graph.policy.example[graph.policy.index("aux_1")]
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, owner, by_role["aux_1"])
    torch.testing.assert_close(metrics["vrpo/coef_aux"], sums)
    assert not any(m.requires_grad for m in metrics.values())


def test_reward_diagnostics_follow_the_scores_not_the_margin_column():
    """Scaling the scores leaves d alone: the derivative is h psi'(h - d), not (h - d) psi'(h - d)."""
    row = pair_row(1.0, [(0.5, 0.6)], chosen_preference=0.7, margin=0.4)
    metrics = call(VarianceReducedReward(), build([row], "reward")).metrics
    assert metrics["vrpo/grad_plain"].item() == pytest.approx(-1.0 / (1 + math.exp(0.6)), rel=1e-12)


def test_calibration_metrics():
    row = pair_row(1.0, [(0.5, 0.6)], chosen_preference=0.7, p_chosen=0.9)
    metrics = call(VarianceReduced(0.3), build([row])).metrics
    assert metrics["vrpo/g"].item() == pytest.approx(0.7)
    assert metrics["vrpo/p"].item() == pytest.approx(0.9)
    assert metrics["vrpo/brier"].item() == pytest.approx(0.04)
    assert [metrics[f"vrpo/{name}"].item() for name in ("gg", "gp", "pp")] == pytest.approx(
        [0.04, 0.08, 0.16]
    )


def test_metrics_of_the_auxiliary_responses_and_of_the_two_laws():
    rows = [
        pair_row(1.0, [(0.5, 0.6), (-1.5, 0.2)], chosen_preference=0.7),
        pair_row(2.0, [], chosen_preference=math.nan),
    ]
    sizes = iter(((9, 0.3), (2, -0.4), (3, 0.1), (4, 0.7), (1, -1.2), (5, 0.2), (7, 0.0), (7, 0.0)))
    rows = [
        dataclasses.replace(
            row,
            responses=tuple(
                dataclasses.replace(r, tokens=tokens, reference=reference)
                for r, (tokens, reference) in zip(row.responses, sizes, strict=False)
            ),
        )
        for row in rows
    ]
    case = build(rows)
    metrics = call(VarianceReduced(0.3), case).metrics
    roles, logps = case.policy.roles[:6], case.policy.logps[:6].detach()
    assert roles == ("chosen", "rejected", "aux_1", "aux_2", "aux_1", "aux_2")
    gap = (0.3 - 0.4) / 2 - (0.1 + 0.7 - 1.2 + 0.2) / 4
    own = 1 / (1 + math.exp(-0.3 * (1.0 - (0.3 + 0.4))))
    expected = {
        "logps/aux": logps[2:].mean(),
        "rewards/aux": 0.3 * (logps - case.reference.logps[:6])[2:].mean(),
        "vrpo/length_gap": (9 + 2) / 2 - (3 + 4 + 1 + 5) / 4,
        "vrpo/logp_ref_gap": gap,
        "vrpo/logp_ref_gap_sq": gap**2,
        "vrpo/p_model": own,
        "vrpo/g_error": (0.7 - own) ** 2,
    }
    for name, value in expected.items():
        assert metrics[name][0].item() == pytest.approx(float(value), rel=1e-6, abs=1e-9), name
        assert math.isnan(metrics[name][1]) == (name != "vrpo/p_model"), name


# ----------------------------------------------------------------------------------------------------- bad rows


def broken(case: Case, name: str, position: int, value: float) -> Case:
    source = case.batch.scalars if name in case.batch.scalars else case.batch.response_scalars
    source[name][position] = value
    return case


@pytest.mark.parametrize("loss", [VarianceReduced(0.3), VarianceReducedReward()], ids=["policy", "reward"])
@pytest.mark.parametrize(
    ("name", "position", "value", "uid"),
    [
        ("chosen_preference", 1, 1.3, "made/up:1"),
        ("chosen_preference", 1, float("nan"), "made/up:1"),
        ("aux_preference", 8, -0.2, "made/up:1"),
        ("aux_preference", 8, float("nan"), "made/up:1"),
        ("aux_preference", 8, float("inf"), "made/up:1"),
    ],
)
def test_preferences_that_are_no_probabilities_name_the_row(loss, name, position, value, uid):
    """Row 0 has 2 + 2 responses, so position 8 is the second aux_1 of row 1."""
    case = broken(build(random_rows(14, 2, num_aux=(1, 2)), loss.needs.output), name, position, value)
    assert case.batch.roles[8] == "aux_1" and int(case.batch.example[8]) == 1
    with pytest.raises(UserError, match=f"{uid}: {name}={value}"):
        call(loss, case)


def test_an_auxiliary_response_without_its_partner_names_the_row():
    rows = random_rows(15, 2, num_aux=(2,))
    rows[1] = Row(rows[1].responses[:-1], rows[1].scalars)
    with pytest.raises(UserError, match=r"made/up:1: 2 aux_1 but 1 aux_2"):
        call(VarianceReduced(0.3), build(rows))
