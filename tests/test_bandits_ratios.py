"""Ratios of VRPO to the plain loss on the enumerable bed: what is averaged, lambda auto, and the files."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from bandits import tabular
from bandits.report import Report
from bandits.vrpo_study import Estimator, VRPOStudy
from utils import UserError


def test_the_margins_spread_is_their_variance_over_the_replicates():
    bed = tabular.five_prompts()
    theta = np.random.default_rng(0).normal(size=(50, 3))
    spread = tabular.margin_spread(bed, theta)
    margins = np.stack([bed.margin(t) for t in theta])  # (R, X, K, K)
    assert spread.mean() == pytest.approx((bed.pair_law * margins.var(0)).sum())
    assert spread.shape == (50,) and spread.min() > 0


def test_regret_value_and_excess_risk_equal_sums_over_arms_and_pairs():
    bed, theta, beta = tabular.five_prompts(), np.array([0.5, -1.0, 2.0]), 0.7
    best = tabular.population(bed)
    regret, value, risks = 0.0, 0.0, {"theta": 0.0, "best": 0.0}
    for x in range(5):
        scores = bed.features[x] @ theta
        regret += (bed.reward[x].max() - bed.reward[x][scores.argmax()]) / 5
        odds = bed.sampler[x] * np.exp(scores / beta)
        value += odds @ bed.reward[x] / odds.sum() / 5
        for i in range(10):
            for j in range(10):
                weight = bed.sampler[x, i] * bed.sampler[x, j] / 5
                for name, parameters in (("theta", theta), ("best", best)):
                    p = 1 / (1 + np.exp(-(bed.features[x, i] - bed.features[x, j]) @ parameters))
                    g = bed.preference[x, i, j]
                    risks[name] -= weight * (g * np.log(p) + (1 - g) * np.log(1 - p))
    found = tabular.policy_values(bed, theta[None], beta)
    assert (found[0][0], found[1][0]) == pytest.approx((regret, value)) and regret > 0.01
    assert tabular.excess_risk(bed, theta[None])[0] == pytest.approx(risks["theta"] - risks["best"])


def test_lambda_auto_is_m_over_m_plus_one():
    weights = [Estimator("e", "right", pairs=m, lam="auto").weight for m in (1, 4, None)]
    assert weights == [0.5, 0.8, 1.0] and Estimator("e", "right", pairs=3, lam=0.25).weight == 0.25
    with pytest.raises(UserError, match="or be auto"):
        Estimator("e", "right", lam=1.5)


def test_ratios_are_written_with_intervals_around_them(tmp_path):
    arms = [Estimator("plain", "none"), Estimator("a", "right", 4, "auto"), Estimator("b", "right", 1)]
    report = Report(tmp_path)
    VRPOStudy(estimators=arms, num=200, replicates=60, figures=["ratios"]).run(report)
    with (tmp_path / "ratios.csv").open() as handle:
        rows = {(r["estimator"], r["metric"]): r for r in csv.DictReader(handle)}
    assert {e for e, _ in rows} == {"a", "b"}
    for (label, metric), row in rows.items():
        low, ratio, high = (float(row[k]) for k in ("low", "ratio", "high"))
        top, bottom = (report.cells[name, metric].mean() for name in (label, "plain"))
        assert ratio == pytest.approx(top / bottom)
        assert low <= ratio <= high
    assert float(rows["a", "n_margin_variance"]["high"]) < 1
    assert (tmp_path / "figures" / "ratios.pdf").exists()
