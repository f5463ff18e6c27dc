"""The numbers derived from VRPO's metrics: right formulas, in training steps and in evaluations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.schema import Row
from losses.pairwise import DPO
from losses.types import derived
from losses.vrpo import VarianceReduced, diagnostics
from tests.trainer_tools import make_rows, make_trainer


def means_of(columns: dict[str, np.ndarray]) -> dict[str, float]:
    return {f"vrpo/{name}": float(values.mean()) for name, values in columns.items()}


def test_derived_numbers_are_those_of_the_samples():
    rng = np.random.default_rng(0)
    plain, reduced = rng.normal(1.0, 2.0, 500), rng.normal(1.0, 1.0, 500)
    p, g = rng.uniform(size=500).round(), rng.uniform(0.2, 0.9, 500)
    columns = {
        "i2": rng.normal(size=500), "i3": rng.normal(size=500), "grad_plain": plain, "grad_vr": reduced,
        "grad_plain_sq": plain**2, "grad_vr_sq": reduced**2,
        "gg": (g - 0.5) ** 2, "gp": (g - 0.5) * (p - 0.5), "pp": (p - 0.5) ** 2,
    }  # fmt: skip
    found = diagnostics(means_of(columns))
    assert found["vrpo/variance_removed"] == pytest.approx(1 - reduced.var() / plain.var())
    assert found["vrpo/i3_minus_i2"] == pytest.approx(columns["i3"].mean() - columns["i2"].mean())
    slope = np.linalg.lstsq((g - 0.5)[:, None], p - 0.5, rcond=None)[0][0]
    assert found["vrpo/calibration_slope"] == pytest.approx(slope)
    # about 0: every pair also stands for its swap, so the correlation is that of the doubled sample
    both = np.concatenate([g, 1 - g]), np.concatenate([p, 1 - p])
    assert found["vrpo/correlation"] == pytest.approx(np.corrcoef(*both)[0, 1])


def test_a_calibrated_g_has_slope_one():
    rng = np.random.default_rng(1)
    g = rng.uniform(0.05, 0.95, 200_000)
    p = (rng.uniform(size=g.size) < g).astype(float)
    gg, gp, pp = ((g - 0.5) ** 2).mean(), ((g - 0.5) * (p - 0.5)).mean(), 0.25
    zero = dict.fromkeys(("i2", "i3", "grad_plain", "grad_vr", "grad_plain_sq", "grad_vr_sq"), np.zeros(1))
    found = diagnostics(means_of(zero) | {"vrpo/gg": gg, "vrpo/gp": gp, "vrpo/pp": pp})
    assert found["vrpo/calibration_slope"] == pytest.approx(1.0, abs=0.02)  # 3 standard errors: 0.013
    assert "vrpo/variance_removed" not in found  # margins of 0: nothing to compare


def test_nothing_is_derived_without_auxiliary_pairs_or_from_other_losses():
    assert diagnostics({"vrpo/i1": 0.7, "vrpo/p": 1.0}) == {}
    assert derived(DPO(0.1), {"loss": 1.0}) == {}
    assert derived(VarianceReduced(0.1), {}) == {}


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
        for name in ("variance_removed", "i3_minus_i2", "calibration_slope", "correlation"):
            assert math.isfinite(values[f"{prefix}/vrpo/{name}"])
    plain = metrics["train/vrpo/grad_plain_sq"] - metrics["train/vrpo/grad_plain"] ** 2
    reduced = metrics["train/vrpo/grad_vr_sq"] - metrics["train/vrpo/grad_vr"] ** 2
    assert metrics["train/vrpo/variance_removed"] == pytest.approx(1 - reduced / plain)


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
