"""The summary's numbers against independent ones, and what it calls resolved."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from commands.summarize import decimals, main, number
from engine.stats import wilson
from plot_scripts.load import read_rows
from plot_scripts.sources import run as run_command
from tests.synthetic_runs import loss_at, make_run, share_at


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """ipo and gr_ipo differ by 0.3 in every logged loss, and by 0.3 + noise in every record; dpo differs from ipo by nothing."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1, 2):
        make_run(root, "ipo", seed, records=True)
        make_run(root, "gr_ipo", seed, offset=-0.3, records=True)
    for seed in (1, 2, 3):
        make_run(root, "dpo", seed, records=True)
    return root


def summary(capsys, *words):
    """(printed text, summary.csv, differences.csv, summary.tex)"""
    out = words[-1].removeprefix("out=")
    written = main(words)
    assert [p.name for p in written] == ["summary.md", "summary.csv", "differences.csv", "summary.tex"]
    text = capsys.readouterr().out
    assert written[0].read_text() in text
    return (
        text,
        pd.read_csv(f"{out}/summary.csv"),
        pd.read_csv(f"{out}/differences.csv"),
        written[3].read_text(),
    )


def test_the_table_holds_means_and_t_intervals_of_the_last_evaluation(runs, tmp_path, capsys):
    text, table, _, tex = summary(
        capsys, str(runs), "metric=loss", "labels={gr_ipo: GR_IPO}", f"out={tmp_path}"
    )
    row = table[(table["method"] == "GR_IPO") & (table["group"] == "all")].iloc[0]
    values = [loss_at(500, s, -0.3) for s in (0, 1, 2)]
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(values)
    assert (row["mean"], row["low"], row["high"], row["n"]) == pytest.approx(
        (np.mean(values), np.mean(values) - half, np.mean(values) + half, 3)
    )
    assert set(table["group"]) == {"all", "mean", "worst", "north", "south"}
    worst = table[(table["method"] == "ipo") & (table["group"] == "worst")].iloc[0]
    assert worst["mean"] == pytest.approx(np.mean([loss_at(500, s) + 0.2 for s in (0, 1, 2)]))
    assert f"{row['mean']:.2f} ± {half:.2f}" in text
    assert f"GR\\_IPO & 3 & ${row['mean']:.2f} \\pm {half:.2f}$ &" in tex
    assert tex.count("\\toprule") == 2  # the methods, and their differences


def test_differences_are_paired_over_the_common_seeds(runs, tmp_path, capsys):
    text, _, found, _ = summary(capsys, str(runs), "metric=loss", "group=all", f"out={tmp_path}")
    seeds = found[found["over"] == "seeds"].set_index(["a", "b"])
    exact = seeds.loc[("gr_ipo", "ipo")]
    assert exact["difference"] == pytest.approx(-0.3)  # the same in every seed: an interval of no width
    assert exact["resolved"]
    other = seeds.loc[("dpo", "gr_ipo")]
    assert other["n"] == 2  # seeds 1 and 2; dpo lacks 0, gr_ipo lacks 3
    assert "dpo: no run with seed 0, which other methods have" in text


def test_differences_over_prompts_use_the_records_and_cluster_by_prompt(runs, tmp_path, capsys):
    _, _, found, _ = summary(
        capsys, str(runs), "metric=loss", "group=all,south", "baseline=ipo", f"out={tmp_path}"
    )
    prompts = found[found["over"] == "prompts"].set_index(["a", "group"])
    tables = {
        m: [read_rows(runs / f"{m}_seed_{s}" / "records" / "test-500.jsonl") for s in (0, 1, 2)]
        for m in ("ipo", "gr_ipo")
    }
    means = {m: np.mean([[r["loss"] for r in rows] for rows in t], axis=0) for m, t in tables.items()}
    pairs = (
        (means["gr_ipo"] - means["ipo"]).reshape(-1, 2).mean(axis=1)
    )  # two rows a prompt: their mean is one observation
    half = scipy_stats.t.ppf(0.975, len(pairs) - 1) * scipy_stats.sem(pairs)
    row = prompts.loc[("gr_ipo", "all")]
    assert (row["n"], row["difference"], row["low"]) == pytest.approx((40, pairs.mean(), pairs.mean() - half))
    assert row["resolved"]
    assert prompts.loc[("gr_ipo", "south")]["n"] == 20
    assert prompts.loc[("gr_ipo", "south")]["difference"] == pytest.approx(pairs[20:].mean())
    assert set(found["b"]) == {"ipo"}
    # dpo has the seeds 1, 2 and 3: of each method the runs of the seeds that both have
    both = [
        np.mean(
            [
                [r["loss"] for r in read_rows(runs / f"{m}_seed_{s}" / "records" / "test-500.jsonl")]
                for s in (1, 2)
            ]
        )
        for m in ("dpo", "ipo")
    ]
    assert prompts.loc[("dpo", "all")]["difference"] == pytest.approx(both[0] - both[1])


def test_what_is_not_resolved_says_which_n_would_do(runs, tmp_path, capsys):
    text, _, found, tex = summary(capsys, str(runs), "metric=loss", "group=all", f"out={tmp_path}")
    row = found[(found["a"] == "dpo") & (found["b"] == "ipo") & (found["over"] == "prompts")].iloc[0]
    assert not row["resolved"]
    assert row["needed_n"] > row["n"]
    assert f"not resolved, about {row['needed_n']:,.0f} would" in text
    assert "**-0.30" in text  # the resolved one is bold
    line = next(t for t in tex.splitlines() if t.startswith("gr\\_ipo - ipo & test/loss & all & "))
    assert line.count("\\boldmath $-0.30") == 1


def test_the_last_evaluations_are_compared(tmp_path, capsys):
    for seed in (0, 1):
        make_run(tmp_path, "a", seed, last=300)
        make_run(tmp_path, "b", seed, last=500)
    _, _, found, _ = summary(capsys, str(tmp_path), "metric=loss", "group=all", f"out={tmp_path / 'out'}")
    assert found[found["over"] == "seeds"]["difference"].iloc[0] == pytest.approx(
        loss_at(300, 0) - loss_at(500, 0)
    )


def test_example_weights_count_in_losses(tmp_path, capsys):
    for loss, offset in (("a", 0.0), ("b", 1.0)):
        folder = make_run(tmp_path, loss, 0, offset=offset, records=True)
        path = folder / "records" / "test-500.jsonl"
        path.write_text(path.read_text().replace('"weight": 1.0', '"weight": 0.5'))
    _, _, found, _ = summary(capsys, str(tmp_path), "metric=loss", "group=all", f"out={tmp_path / 'out'}")
    assert found[found["over"] == "prompts"]["difference"].iloc[0] == pytest.approx(-0.5, abs=0.02)


def test_a_loss_per_token_is_compared_per_token(tmp_path, capsys):
    rows = {}
    for loss, offset in (("a", 0.0), ("b", 1.0)):
        folder = make_run(tmp_path, loss, 0, offset=offset, records=True)
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("  beta: 0.1", "  unit: token"))
        rows[loss] = read_rows(folder / "records" / "test-500.jsonl")
    _, _, found, _ = summary(capsys, str(tmp_path), "metric=loss", "group=all", f"out={tmp_path / 'out'}")
    per_token = {
        m: sum(r["loss"] for r in table) / sum(r["num_tokens"] for r in table) for m, table in rows.items()
    }
    prompts = found[found["over"] == "prompts"]["difference"].iloc[0]
    assert prompts == pytest.approx(per_token["a"] - per_token["b"]) and abs(prompts + 1) > 0.5


def test_only_the_last_records_and_common_examples_count(tmp_path, capsys):
    for loss in ("a", "b"):
        make_run(tmp_path, loss, 0, offset=0.0 if loss == "a" else 1.0, records=True)
    folder = tmp_path / "a_seed_0" / "records"
    kept = (folder / "test-500.jsonl").read_text().splitlines(keepends=True)[:30]
    (folder / "test-500.jsonl").write_text("".join(kept))
    (folder / "test-90.jsonl").write_text(
        "".join(kept).replace('"loss": ', '"loss": 9')
    )  # older, though later in the alphabet
    _, _, found, _ = summary(capsys, str(tmp_path), "metric=loss", "group=all", f"out={tmp_path / 'out'}")
    row = found[found["over"] == "prompts"].iloc[0]
    assert row["n"] == 15
    assert row["difference"] == pytest.approx(-1.0, abs=0.02)


def test_one_run_shows_the_interval_over_its_examples(runs, tmp_path, capsys):
    text, table, found, _ = summary(
        capsys, str(runs / "ipo_seed_1"), "metric=rewards/accuracies", f"out={tmp_path}"
    )
    row = table[table["group"] == "south"].iloc[0]
    exact = wilson(share_at(500, 1, 1) * 40, 40)
    assert (row["low"], row["high"], row["interval_over"]) == (
        pytest.approx(exact.low),
        pytest.approx(exact.high),
        "run",
    )
    assert f"{exact.estimate:.2f} [{exact.low:.2f}, {exact.high:.2f}]" in text
    assert found.empty


def test_numbers_show_two_digits_of_their_half_width():
    assert number(0.81234, 0.79999, 0.82469) == "0.812 ± 0.012"
    assert number(1234.5, 1200.5, 1268.5) == "1234 ± 34"
    assert number(0.7, 0.55, 0.8) == "0.70 [0.55, 0.80]"
    assert number(0.123456, math.nan, math.nan) == "0.1235"
    assert (decimals(0.0), decimals(3e-5), decimals(123.0)) == (4, 6, 0)


def test_mistakes_are_one_message(runs, capsys):
    for words, message in (
        ([str(runs), "metric=los"], "did you mean 'loss'"),
        ([str(runs), "group=sout"], "did you mean 'south'"),
        ([str(runs), "baseline=ip"], "did you mean 'ipo'"),
        ([str(runs), "basline=ipo"], "did you mean 'baseline'"),
        ([str(runs), "split=tset"], "did you mean 'test'"),
        ([str(runs), "entity=me"], "give project="),
        ([], "no runs named"),
        ([str(runs / "none")], "no metrics.jsonl there"),
    ):
        assert run_command(main, words) == 2
        assert message in capsys.readouterr().err


def test_folders_with_equals_signs_and_commas_are_folders(tmp_path, capsys):
    make_run(tmp_path, "dpo", 0, name="lr=0.1,seed=0")
    assert main([str(tmp_path / "lr=0.1,seed=0"), "metric=loss"]) == []
    assert "| dpo | 1 |" in capsys.readouterr().out


def test_losses_of_different_functions_are_not_compared(tmp_path, capsys):
    for loss, beta in (("ipo", 0.1), ("gr_ipo", 0.1), ("odd|one", 0.01)):
        folder = make_run(tmp_path, loss, 0, name=loss.replace("|", "_"))
        path = folder / "config.yaml"
        path.write_text(path.read_text().replace("beta: 0.1", f"beta: {beta}"))
    text, _, found, _ = summary(capsys, str(tmp_path), f"out={tmp_path / 'out'}")
    by_loss = found[found["metric"] == "loss"]
    assert set(zip(by_loss["a"], by_loss["b"], strict=True)) == {("gr_ipo", "ipo")}
    assert len(set(zip(found["a"], found["b"], strict=True))) == 3  # accuracies are compared all the same
    assert "ipo and odd|one: not compared by loss, their losses are different functions" in text
    assert "| odd\\|one | 1 |" in text
