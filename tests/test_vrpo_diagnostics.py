"""The numbers derived from VRPO's metrics, in training steps and in evaluations, and the advice drawn from them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from data.schema import Row
from engine.guards import Adviser
from losses.pairwise import DPO
from losses.types import derived
from losses.vrpo import VarianceReduced
from losses.vrpo_metrics import advice, diagnostics
from tests.trainer_tools import make_rows, make_trainer


def means_of(columns: dict[str, np.ndarray]) -> dict[str, float]:
    return {f"vrpo/{name}": float(values.mean()) for name, values in columns.items()}


def columns_of(i1, i2, i3, lam=1.0, **more) -> dict[str, np.ndarray]:
    """Per-example columns as the loss reports them, from the three terms' derivatives."""
    vr = i1 - lam * i2 + lam * i3
    names = {"plain": i1, "i2": i2, "i3": i3, "vr": vr}
    columns = {f"grad_{n}": x for n, x in names.items()} | {f"grad_{n}_sq": x**2 for n, x in names.items()}
    columns |= {"grad_plain_i2": i1 * i2, "grad_plain_i3": i1 * i3, "grad_i2_i3": i2 * i3}
    half = np.full(len(i1), 0.5)
    p, g = more.pop("p", half), more.pop("g", half)
    columns |= {"gg": (g - 0.5) ** 2, "gp": (g - 0.5) * (p - 0.5), "pp": (p - 0.5) ** 2}
    return columns | {"i2": i2} | more


def test_derived_numbers_are_those_of_the_samples():
    rng = np.random.default_rng(0)
    common = rng.normal(1.0, 2.0, 500)
    terms = common + rng.normal(size=500), 0.8 * common, rng.normal(1.0, 1.5, 500)
    p, g = rng.uniform(size=500).round(), rng.uniform(0.2, 0.9, 500)
    found = diagnostics(means_of(columns_of(*terms, lam=0.7, p=p, g=g)))
    i1, i2, i3 = terms
    assert found["vrpo/variance_removed"] == pytest.approx(1 - (i1 - 0.7 * (i2 - i3)).var() / i1.var())
    for name, values in zip(("i1", "i2", "i3"), terms, strict=True):
        assert found[f"vrpo/variance_{name}"] == pytest.approx(values.var())
    assert found["vrpo/covariance_i1_i2"] == pytest.approx(np.cov(i1, i2, bias=True)[0, 1])
    tried = {lam: (i1 - lam * (i2 - i3)).var() for lam in np.linspace(-1, 2, 3001)}
    best = min(tried, key=tried.get)
    assert found["vrpo/best_lam"] == pytest.approx(best, abs=1e-3)
    assert found["vrpo/best_removed"] == pytest.approx(1 - tried[best] / i1.var(), abs=1e-6)
    slope = np.linalg.lstsq((g - 0.5)[:, None], p - 0.5, rcond=None)[0][0]
    assert found["vrpo/calibration_slope"] == pytest.approx(slope)
    # about 0: every pair also stands for its swap, so the correlation is that of the doubled sample
    both = np.concatenate([g, 1 - g]), np.concatenate([p, 1 - p])
    assert found["vrpo/correlation"] == pytest.approx(np.corrcoef(*both)[0, 1])


def test_a_calibrated_g_has_slope_one():
    rng = np.random.default_rng(1)
    g = rng.uniform(0.05, 0.95, 200_000)
    p = (rng.uniform(size=g.size) < g).astype(float)
    zero = np.zeros(g.size)
    found = diagnostics(means_of(columns_of(zero, zero, zero, p=p, g=g)))
    assert found["vrpo/calibration_slope"] == pytest.approx(1.0, abs=0.02)  # 3 standard errors: 0.013
    assert "vrpo/variance_removed" not in found  # margins of 0: nothing to compare


def test_nothing_is_derived_without_auxiliary_pairs_or_from_other_losses():
    assert diagnostics({"vrpo/i1": 0.7, "vrpo/p": 1.0}) == {}
    assert derived(DPO(0.1), {"loss": 1.0}) == {}
    assert derived(VarianceReduced(0.1), {}) == {}


# ------------------------------------------------------------------------------------------------------ advice


def advised(
    num: int = 2000,
    lam: float = 1.0,
    right: float = 1.0,
    sure: float = 1.0,
    gap: float = 0.0,
    noise: float = 1.0,
):
    """Advice on made-up rows: g = sigmoid(sure * right * z) for labels of log-odds z; gap of the laws in standard deviations."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=num)
    p = (rng.uniform(size=num) < 1 / (1 + np.exp(-z))).astype(float)
    g = 1 / (1 + np.exp(-sure * right * z))
    i2, i3, label = rng.normal(size=(3, num))
    length = rng.normal(gap, 1.0, num)
    terms = i2 + label, noise * i2, abs(noise) * i3
    columns = columns_of(*terms, lam, p=p, g=g, length_gap=length, length_gap_sq=length**2)
    return advice(means_of(columns), {f"vrpo/{name}": num for name in columns})


def test_a_good_run_gets_no_advice():
    assert advised(lam=0.5) == {}
    assert advice({"vrpo/plain": 1.0}, {"vrpo/plain": 5.0}) == {}


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ({"lam": 1.0}, "lam", r"loss\.lam=0\.5 would remove"),
        (
            {"lam": 1.0, "noise": 3.0},
            "lam",
            r"adds \d+% of the plain loss's gradient variance; loss\.lam=0\.1[5-9]",
        ),
        # beyond [0, 1] what is promised is what the end of the interval removes
        ({"lam": 0.25, "noise": 0.3}, "lam", r"removes \d+% .* loss\.lam=1 would remove (19|2[0-2])%"),
        ({"lam": 1.0, "noise": -1.0}, "lam", r"adds \d+% .* loss\.lam=0 would remove 0%"),
        ({"lam": 0.5, "gap": 0.5}, "law", r"\+0\.\d+ tokens on average over 2000 rows"),
        ({"lam": 0.5, "right": -1.0}, "g", "hardly predict the labels"),
        ({"lam": 0.5, "right": 0.0}, "g", "all 1/2"),
        ({"lam": 0.5, "sure": 8.0}, "g", "too sure"),
        ({"lam": 0.5, "sure": 0.2}, "g", "too timid"),
    ],
)
def test_each_fault_has_its_advice(how, kind, words):
    found = advised(**how)
    assert list(found) == [kind] and re.search(words, found[kind]), found


@pytest.mark.parametrize(
    "how", [{"lam": 0.5, "gap": 0.1}, {"lam": 1.0, "num": 100}, {"lam": 0.5, "num": 20, "sure": 3.0}]
)
def test_what_may_be_an_accident_or_does_not_matter_is_not_told(how):
    assert advised(**how) == {}


def test_the_adviser_pools_rows_and_says_each_kind_once(monkeypatch):
    said = []
    monkeypatch.setattr("engine.guards.log.warning", lambda *args: said.append(args[0] % args[1:]))

    class Loss:
        def advice(self, means, counts):
            return {"k": f"mean {means['a']:.2f} of {counts['a']:.0f}"} if means["a"] > 1 else {}

    adviser = Adviser(Loss(), window=10)
    for step, value in enumerate((1.0, 6.0, 1.0, 7.0, 9.0)):
        adviser.update(step, {"a": (value, 4.0), "b": (0.0, 0.0)}, 5)
    assert said == []  # of rows 0-9 and 10-19 the mean is not over 1; rows 20-24 are not judged yet
    adviser.judge(5)
    adviser.update(6, {"a": (90.0, 4.0)}, 10)
    assert said == ["step 5: mean 2.25 of 4"]


def with_aux(rows: list[Row], num_pairs: int, seed: int) -> list[Row]:
    """The rows with M auxiliary pairs of random tokens."""
    rng = np.random.default_rng(seed)
    nan, made = math.nan, []
    for row in rows:
        extra = tuple(
            np.append(rng.integers(3, 32, size=int(n)), 2).astype(np.int32)
            for n in rng.integers(0, 7, size=2 * num_pairs)
        )
        preferences = tuple(v for _ in range(num_pairs) for v in (float(rng.uniform()), nan))
        made.append(
            Row(
                row.uid, row.prompt, row.responses + extra, row.roles + ("aux_1", "aux_2") * num_pairs, row.group,
                row.prompt_key, row.weight, {**row.scalars, "chosen_preference": float(rng.uniform())},
                {"aux_preference": (nan, nan, *preferences)},
            )
        )  # fmt: skip
    return made


def test_training_steps_and_evaluations_report_them(tmp_path):
    rows = with_aux(make_rows(12), 2, 0)
    trainer = make_trainer(tmp_path / "a", VarianceReduced(0.5), rows=rows, batch_size=12, n_epochs=1)
    trainer.parts.evaluator.splits["validation"] = with_aux(make_rows(7, seed=7), 1, 1)
    found = trainer.parts.evaluator.run("validation", trainer.policy, 0).metrics
    metrics = trainer.step()
    for values, prefix in ((metrics, "train"), (found, "eval")):
        for name in ("variance_removed", "i3_minus_i2", "calibration_slope", "correlation", "best_lam"):
            assert math.isfinite(values[f"{prefix}/vrpo/{name}"])
    plain = metrics["train/vrpo/grad_plain_sq"] - metrics["train/vrpo/grad_plain"] ** 2
    reduced = metrics["train/vrpo/grad_vr_sq"] - metrics["train/vrpo/grad_vr"] ** 2
    assert metrics["train/vrpo/variance_removed"] == pytest.approx(1 - reduced / plain)
    assert {"train/logps/aux", "train/rewards/aux", "train/vrpo/logp_ref_gap"} <= set(metrics)


def test_they_do_not_depend_on_how_a_step_is_cut(tmp_path):
    rows, found = with_aux(make_rows(12), 2, 0), []
    for k in (1, 4):
        trainer = make_trainer(
            tmp_path / str(k),
            VarianceReduced(0.5),
            rows=rows,
            batch_size=12,
            n_epochs=1,
            gradient_accumulation_steps=k,
        )
        metrics = trainer.step()
        found.append({k: v for k, v in metrics.items() if "vrpo" in k})
    assert found[0] == pytest.approx(found[1], rel=1e-9, abs=1e-12)
