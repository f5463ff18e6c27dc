"""The bandit entry: every experiment builds, tiny runs leave the announced files, mistakes are named, verdicts follow intervals."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from bandits import figures, run
from bandits.online import Curves
from bandits.report import Claim, Report
from engine.stats import Interval
from utils import UserError

TINY_ONLINE = [
    "study.num_seeds=2",
    "study.num_eval=5",
    "study.eval_every=2",
    "study.claims=[]",
    "study.rewards=[4]",
]


@pytest.mark.parametrize("name", run.experiments())
def test_every_experiment_builds_and_its_claims_name_existing_cells(name):
    _, plain = run.settings([f"+experiment={name}"])
    study = run.study(plain)
    if hasattr(study, "rewards"):
        cells = {study.cell(arm, reward) for arm in study.arms for reward in study.rewards}
    elif hasattr(study, "scenarios"):
        labels = [arm.label for arm in study.arms] + ["MLE reward"]
        cells = {f"{label}@{scenario}" for label in labels for scenario in study.scenarios}
    else:
        cells = {estimator.label for estimator in study.estimators}
    for claim in study.claims:
        assert claim.left in cells and (claim.right is None or claim.right in cells), claim.text
    assert study.num_seeds >= (5 if plain["study"].get("bandit") in ("sequence", "length") else 20)


def rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def small(tmp_path: Path, argv: list[str]) -> Path:
    assert run.main([*argv, f"run_root={tmp_path}"]) == 0
    folder = next(tmp_path.iterdir())
    for name in ("config.yaml", "provenance.json", "metrics.jsonl", "summary.csv"):
        assert (folder / name).stat().st_size > 0
    return folder


def test_a_small_on_policy_run_leaves_records_tables_and_figures(tmp_path):
    arms = [
        "{label: IPO, method: ipo, lr: 0.01, reuse: 4, prompts: 2, samples: 3}",
        "{label: IPO, method: ipo, lr: 0.01, reuse: 2, epochs: 2, prompts: 2, samples: 3}",
    ]
    figures = "study.figures=[curves,reward_kl,log_ratios,bars]"
    claim = '{text: more, left: "IPO, on-policy@R4", right: "IPO, offline@R4", metric: reward, at_least: -5}'
    argv = [
        "+experiment=onpolicy_c1",
        *TINY_ONLINE,
        figures,
        f"study.arms=[{','.join(arms)}]",
        f"study.claims=[{claim}]",
    ]
    folder = small(tmp_path, argv)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evals = [r for r in records if r["kind"] == "eval"]
    assert len(evals) == 2 * 3 * 2  # arms, steps 0 2 4, seeds
    assert evals[0]["split"] == "eval" and evals[0]["step"] == 0 and 0 < evals[0]["eval/reward"] < 1
    assert {r["examples"] for r in evals} == {6, 12}
    assert rows(folder / "claims.csv")[0]["verdict"] == "agrees"
    summary = rows(folder / "summary.csv")
    for row in summary:
        if row["metric"] == "log_ratio/chosen_drop":  # how far each seed's chosen ends below its own peak
            paths = [
                [r["eval/log_ratio/chosen"] for r in evals if (r["cell"], r["seed"]) == (row["cell"], s)]
                for s in (0, 1)
            ]
            assert float(row["mean"]) == pytest.approx(np.mean([max(path) - path[-1] for path in paths]))
            assert all(len(path) == 3 for path in paths)
    names = {row["metric"] for row in summary}
    assert {
        "reward",
        "kl_policy_reference",
        "kl_reference_policy",
        "entropy",
        "log_ratio/chosen_drop",
        "lr",
    } <= names
    made = {path.name for path in (folder / "figures").iterdir()}
    assert made == {f"{n}.{k}" for n in ("curves", "reward_kl", "log_ratios", "bars") for k in ("pdf", "png")}


def test_a_small_continuous_and_a_small_sequence_run(tmp_path):
    arms = "study.arms=[{label: a, method: reinforce, reuse: 2, prompts: 2, samples: 2, kl_coef: 0.1},{label: b, method: ppo, lr: 0.01, reuse: 2, prompts: 2, samples: 2}]"
    tuning = ["study.tuning_seeds=1", "study.lr_grid=[0.001,0.01]"]
    tiny = [*TINY_ONLINE[:-1], arms, *tuning, "study.figures=[curves]"]
    folder = small(
        tmp_path / "a", ["+experiment=continuous", *tiny, "study.rewards=[2]", "study.latent=cauchy"]
    )
    chosen = {
        row["cell"]: float(row["mean"]) for row in rows(folder / "summary.csv") if row["metric"] == "lr"
    }
    assert chosen["a, offline@R2"] in (0.001, 0.01) and chosen["b, offline@R2"] == 0.01
    small(tmp_path / "b", ["+experiment=sequence_r6", *tiny, "study.rewards=[6]", "study.dropout=0.1"])


def test_a_small_group_run(tmp_path):
    arms = [
        "{label: GR-DPO, loss: dpo, beta: 1.0, weighting: robust, iterations: 4}",
        "{label: GR-IPO, loss: ipo, beta: 0.1, weighting: robust, solver: closed_form, iterations: 4}",
    ]
    argv = ["+experiment=group_swapped", "study.num_seeds=2", "study.num_test=10", "study.claims=[]"]
    argv += [
        f"study.arms=[{','.join(arms)}]",
        "study.figures=[paper,weights,tradeoff,variants,errors]",
        "study.eval_every=2",
    ]
    folder = small(tmp_path, argv)
    cells = {row["cell"] for row in rows(folder / "summary.csv")}
    assert "GR-DPO@even_imbalanced" in cells and "true parameters of group_0@even_imbalanced" in cells
    assert {row["metric"] for row in rows(folder / "curves.csv")} >= {
        "val_loss/worst_group",
        "weights/group_0",
    }


@pytest.mark.parametrize("base", ["dpo", "ramp"])
def test_a_small_vrpo_run(tmp_path, base):
    estimators = "study.estimators=[{label: plain, preference: none},{label: m2, preference: right, pairs: 2},{label: inf, preference: half}]"
    figures = "[pairs,sources,lam,bias]" if base == "dpo" else "[bars]"
    argv = [
        "+experiment=vrpo_pairs",
        estimators,
        f"study.figures={figures}",
        "study.replicates=3",
        "study.claims=[]",
    ]
    folder = small(tmp_path, [*argv, f"study.base={base}", "study.steps=3"])
    if base == "dpo":
        exact = {
            r["cell"]: float(r["mean"]) for r in rows(folder / "summary.csv") if r["metric"] == "exact_n_mse"
        }
        assert exact["plain"] == pytest.approx(52.08, abs=0.01)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give +experiment=NAME"),
        (["+experiment=onpolicy_c7"], "did you mean 'onpolicy_c"),
        (["+experiment=onpolicy_c1", "study.num_sedes=3"], "did you mean 'num_seeds'"),
        (["+experiment=onpolicy_c1", "study.rewards=[6]"], "4, 5, 8, 9"),
        (["+experiment=onpolicy_c1", "study.num_seeds=1"], "num_seeds=1"),
        (["+experiment=onpolicy_c1", "study.vary=colour"], "vary=colour"),
        (["+experiment=onpolicy_c1", "study.eval_every=0"], "eval_every=0"),
        (["+experiment=group_chi", "study.num_validation=1"], "num_validation=1"),
        (["+experiment=group_chi", "num_threads=0"], "num_threads=0"),
        (["+experiment=group_chi", "study.scenarios=[even]"], "scenarios: even"),
        (["+experiment=vrpo_lam", "study.replicates=1"], "replicates=1"),
        (["+experiment=onpolicy_c1", "study.arms=[{label: x, method: dpo, lr: 0.1, beta: -1}]"], "beta=-1"),
        (
            ["+experiment=onpolicy_c1", "study.arms=[{label: x, method: dpo},{label: x, method: ipo}]"],
            "two arms",
        ),
        (["+experiment=onpolicy_c1", "study.bandit==1"], "study.bandit"),
        (["+experiment=onpolicy_c1", "num_seeds=3"], "unknown key num_seeds"),
        (["+experiment=onpolicy_c1", "num_threads=0"], "num_threads=0"),
    ],
)
def test_mistakes_end_with_code_2_and_one_message(argv, message, tmp_path, capsys):
    assert run.main([*argv, f"run_root={tmp_path}"]) == 2
    assert message in capsys.readouterr().err


def test_bands_and_whiskers_are_95_percent_t_intervals_of_the_mean():
    values = np.random.default_rng(0).normal(size=(3, 7))
    low, high = stats.t.interval(0.95, 6, loc=values.mean(1), scale=stats.sem(values, axis=1))
    assert figures.half_width(values) == pytest.approx((high - low) / 2)


def test_a_tuned_arm_takes_the_learning_rate_that_ends_highest_on_other_seeds(monkeypatch):
    study = run.study(run.settings(["+experiment=onpolicy_c1"])[1])
    seen = []

    def train(self, arm, reward, seeds, eval_every):
        seen.append(list(seeds))
        ends = {0.0003: 0.2, 0.001: 0.5, 0.003: 0.4, 0.01: 0.1}
        return Curves([0], [0], {"reward": torch.full((1, len(seeds)), ends[arm.lr])})

    monkeypatch.setattr(type(study), "train", train)
    assert study.tuned(study.arms[0], 4).lr == 0.001 and len(seen) == 4
    reported = set(range(study.seed, study.seed + study.num_seeds))
    assert all(len(seeds) == study.tuning_seeds and not reported & set(seeds) for seeds in seen)


def test_verdicts_follow_the_whole_interval():
    claim = Claim("x", "a", "m", at_least=0.4)
    verdicts = [claim.verdict(Interval(m, m - 0.1, m + 0.1, 5)) for m in (0.2, 0.45, 0.6)]
    assert verdicts == ["disagrees", "undecided", "agrees"]
    close = Claim("x", "a", "m", at_least=-0.1, at_most=0.1)
    assert [close.verdict(Interval(0, -h, h, 5)) for h in (0.05, 0.2)] == ["agrees", "undecided"]
    assert close.verdict(Interval(1, 0.9, 1.1, 5)) == "disagrees"


def test_claims_compare_seed_by_seed_and_unknown_cells_are_named(tmp_path):
    report = Report(tmp_path)
    base = np.array([0.1, 0.5, 0.9])
    report.cell("a", "reward", base + np.array([0.2, 0.21, 0.19]))
    report.cell("b", "reward", base)
    (row,) = report.decide([Claim("x", "a", "reward", "b", at_least=0.1)])
    assert row["value"] == pytest.approx(0.2) and row["verdict"] == "agrees" and row["n"] == 3
    with pytest.raises(UserError, match="'c'"):
        report.decide([Claim("x", "c", "reward", at_least=0)])
