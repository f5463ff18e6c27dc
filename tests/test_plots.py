"""Figures from synthetic runs with known curves: the numbers drawn, the warnings, the files."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from scipy import stats as scipy_stats

from engine.metric_names import older_names
from engine.stats import cluster_bootstrap, cluster_mean, wilson
from plot_scripts import canvas, load, plot_from_wandb_full_metrics, plot_from_wandb_paper_plots
from plot_scripts.aggregate import _binned, bar, curve, warnings_about
from plot_scripts.draw import FIGURES, Figure, compose, draw_figure, read_figure
from plot_scripts.make_figures import main as make_figures
from plot_scripts.panels import Panel, draw_curves
from plot_scripts.quickstart import quickstart_figure
from plot_scripts.sources import run as run_command
from tests.synthetic_runs import GROUPS, FakeApi, loss_at, make_run, share_at
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
LOSS = Figure([Panel(kind="curves", metric="loss", split="test", title="Loss")], columns=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Two methods with three seeds each."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (0, 1, 2):
        make_run(root, "ipo", seed)
        make_run(root, "gr_ipo", seed, offset=-0.3, weighting="group_robust")
    return root


def t_interval(values):
    half = scipy_stats.t.ppf(0.975, len(values) - 1) * scipy_stats.sem(values)
    return np.mean(values) - half, np.mean(values) + half


# ---------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("eval/loss", ("eval", "loss", "")),
        ("test/rewards/accuracies/worst_group/ci_low", ("test", "rewards/accuracies/ci_low", "worst_group")),
        ("eval/rewards/accuracies/group_a/b", ("eval", "rewards/accuracies", "group_a/b")),
        ("eval/rewards/accuracies/group_x/ci_high", ("eval", "rewards/accuracies/ci_high", "group_x")),
        ("eval/group_counts/group_x", ("eval", "group_counts", "group_x")),
        ("train_eval/loss/mean_group", ("train_eval", "loss", "mean_group")),
        ("train/weights/group_odd", ("train", "weights", "group_group_odd")),
        ("grad_norm", ("train", "grad_norm", "")),
    ],
)
def test_a_logged_name_is_taken_apart(name, parsed):
    assert load.parse_key(name) == parsed


def test_the_table_holds_every_number_of_the_run(runs):
    loaded = load.load_directories([runs / "ipo_seed_2"])
    x, y = loaded.series["ipo_seed_2", "test", "loss", ""]
    assert x.tolist() == [0, 100, 200, 300, 400, 500]
    assert y == pytest.approx([loss_at(v, 2) for v in x])
    assert list(loaded.table.columns) == load.COLUMNS
    info = loaded.runs[0]
    assert (info.method, info.seed, info.commits, info.finished) == ("ipo", 2, ("a" * 40,), True)


def test_worst_and_mean_over_groups_are_added_where_a_run_did_not_log_them(runs):
    loaded = load.load_directories([runs / "ipo_seed_1"])
    for metric, group, value in (
        ("loss", "worst_group", loss_at(300, 1) + 0.2),
        ("rewards/accuracies", "worst_group", share_at(300, 1, 1)),
        ("rewards/accuracies", "mean_group", (share_at(300, 1, 0) + share_at(300, 1, 1)) / 2),
    ):
        x, y = loaded.series["ipo_seed_1", "test", metric, group]
        assert y[x == 300] == pytest.approx([value])
    assert not loaded.has("test", "rewards/chosen", "worst_group")


def test_the_legends_n_is_the_most_runs_that_a_panel_shows(tmp_path):
    for seed in (0, 1, 2):
        folder = make_run(tmp_path, "dpo", seed)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace("rewards/accuracies", "rewards/other"))
    panels = [Panel(kind="curves", metric=m, split="test") for m in ("rewards/accuracies", "loss")]
    with canvas.styled():
        told = compose(Figure(panels), load.load_directories([tmp_path])).provenance
    assert told["n"] == {"dpo": 3}
    assert "dpo: 1 of 3 runs did not log test/rewards/accuracies" in told["warnings"]


def test_intervals_that_leave_the_axis_are_told(tmp_path):
    for seed in (0, 1):  # two seeds: intervals of 12.7 standard errors, far wider than the curves' range
        make_run(tmp_path / "two", "dpo", seed, offset=0.5 * seed)
    make_run(tmp_path / "one", "dpo", 0)
    for kind, folder, told in (
        ("curves", tmp_path / "two", True),
        ("bars", tmp_path / "two", True),
        ("curves", tmp_path / "one", False),
    ):
        panel = Panel(kind=kind, metric="loss", split="test", title="Loss")
        with canvas.styled():
            warnings = compose(Figure([panel]), load.load_directories([folder])).provenance["warnings"]
        assert ("Loss: some intervals go on beyond the axis" in warnings) == told


def test_a_step_that_lacks_a_group_has_no_worst_of_its_groups(tmp_path):
    folder = make_run(tmp_path, "dpo", 0)
    steps = [{"a": 1.0, "b": 3.0}, {"a": 9.0}, {"a": 2.0, "b": 1.0}]
    rows = [
        {"kind": "train", "step": i, "examples": 8 * i}
        | {f"train/loss/group_{g}": v for g, v in losses.items()}
        for i, losses in enumerate(steps, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = load.load_directories([folder]).series
    for group, values in (("worst_group", [3.0, 2.0]), ("mean_group", [2.0, 1.5])):
        x, y = series["dpo_seed_0", "train", "loss", group]
        assert (x.tolist(), y.tolist()) == ([8.0, 24.0], values)


def test_a_torn_last_line_is_left_out_and_a_bad_line_is_named(tmp_path):
    folder = make_run(tmp_path, "dpo", 0)
    path = folder / "metrics.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"kind": "eval", "exam')
    assert len(load.read_rows(path)) == whole.count("\n")
    path.write_text("not json\n" + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl:1: not a JSON object"):
        load.load_directories([folder])


def test_of_a_value_written_twice_the_last_counts_and_what_is_not_finite_is_noted(tmp_path):
    folder = make_run(tmp_path, "dpo", 0)
    again = {
        "kind": "eval",
        "split": "test",
        "step": 50,
        "examples": 500,
        "test/loss": 0.125,
        "test/rewards/margins": float("nan"),
    }
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps(again) + "\n")
    loaded = load.load_directories([folder])
    assert loaded.series["dpo_seed_0", "test", "loss", ""][1][-1] == 0.125
    assert any("1 values are not finite" in note for note in loaded.notes)


def test_the_restored_best_weights_are_the_last_point_and_the_figure_says_so(tmp_path):
    folder = make_run(tmp_path, "dpo", 0)
    again = {"kind": "eval", "split": "test", "step": 50, "examples": 500, "test/loss": 0.125}
    assert not [w for w in warnings_about(load.load_directories([folder]), ["dpo"]) if "restored" in w]
    with (folder / "metrics.jsonl").open("a") as handle:
        handle.write(json.dumps(again | {"restored_from": 300}) + "\n")
    loaded = load.load_directories([folder])
    assert loaded.series["dpo_seed_0", "test", "loss", ""][1][-1] == 0.125
    assert "restored_from" not in set(loaded.table["metric"])
    assert any(
        w.startswith("1 of 1 runs end with their best weights") for w in warnings_about(loaded, ["dpo"])
    )


def test_what_a_fresh_start_has_set_aside_is_no_second_run(tmp_path):
    folder = make_run(tmp_path, "dpo", 0)
    aside = make_run(folder, "dpo", 0, name="previous-1")
    assert load.find_runs([tmp_path]) == [folder] and load.find_runs([aside]) == [aside]


def test_runs_are_found_under_folders_and_by_pattern_and_mistakes_are_named(runs):
    assert len(load.find_runs([runs])) == 6
    assert [p.name for p in load.find_runs([str(runs / "gr_*")])] == [f"gr_ipo_seed_{s}" for s in (0, 1, 2)]
    with pytest.raises(UserError, match=r"nothing\.here: no metrics\.jsonl"):
        load.find_runs([runs / "nothing.here"])
    with pytest.raises(UserError, match=r"by=loss\.nam.*did you mean 'loss\.name'"):
        load.load_directories([runs], by=["loss.nam"])
    with pytest.raises(UserError, match="no method 'gr_ip'; did you mean 'gr_ipo'"):
        load.load_directories([runs], labels={"gr_ip": "GR"})


def test_methods_are_named_by_any_config_key(tmp_path):
    make_run(tmp_path, "dpo", 0, lr=1e-4, name="a")
    make_run(tmp_path, "dpo", 0, lr=3e-4, name="b", weighting="group_robust")
    assert load.load_directories([tmp_path], by=["loss.name", "lr"]).methods == [
        "dpo, lr=0.0001",
        "dpo, lr=0.0003",
    ]
    assert load.load_directories([tmp_path]).methods == ["dpo", "dpo+group_robust"]
    assert load.load_directories([tmp_path], labels={"dpo": "DPO"}).methods == ["DPO", "dpo+group_robust"]


def test_only_the_loader_imports_wandb():
    importing = [
        path.name
        for path in (ROOT / "plot_scripts").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "wandb" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wandb"))
    ]
    assert importing == ["load.py"]


# ---------------------------------------------------------------------------------------------- numbers


def test_the_curve_is_the_mean_and_t_interval_over_seeds(runs):
    got = curve(load.load_directories([runs]), "ipo", "test", "loss")
    for i, x in enumerate(range(0, 501, 100)):
        values = [loss_at(x, seed) for seed in (0, 1, 2)]
        assert (got.x[i], got.mean[i], got.n[i]) == pytest.approx((x, np.mean(values), 3))
        assert (got.low[i], got.high[i]) == pytest.approx(t_interval(values))
    assert got.interval == "seeds"


def test_the_drawn_line_and_the_csv_are_the_known_means(runs, tmp_path):
    loaded = load.load_directories([runs])
    with canvas.styled():
        _, (ax,) = canvas.new_figure(1, 1)
        looks = canvas.looks(loaded.methods)
        draw_curves(ax, LOSS.panels[0], loaded, looks, {}, False)
    means = {
        m: [np.mean([loss_at(x, s, o) for s in (0, 1, 2)]) for x in range(0, 501, 100)]
        for m, o in (("ipo", 0), ("gr_ipo", -0.3))
    }
    for line, method in zip(ax.lines, loaded.methods, strict=True):
        assert line.get_color() == looks[method].colour
        assert line.get_ydata() == pytest.approx(means[method])
    table = pd.read_csv(draw_figure(LOSS, "loss", tmp_path, loaded)[2])
    drawn = table[(table["kind"] == "mean") & (table["method"] == "ipo")]
    assert drawn["y"].to_numpy() == pytest.approx(means["ipo"])
    assert drawn["low"].iloc[0] == pytest.approx(t_interval([loss_at(0, s) for s in (0, 1, 2)])[0])
    one = table[(table["kind"] == "run") & (table["run"] == "ipo_seed_2")]
    assert one["y"].to_numpy() == pytest.approx([loss_at(x, 2) for x in range(0, 501, 100)])
    assert set(one["seed"]) == {2}


def test_seeds_measured_at_other_places_are_interpolated_inside_their_range_only(tmp_path):
    make_run(tmp_path, "dpo", 0)
    folder = make_run(tmp_path, "dpo", 1)
    rows = [r for r in load.read_rows(folder / "metrics.jsonl") if r["examples"] not in (0, 200)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = curve(load.load_directories([tmp_path]), "dpo", "test", "loss")
    assert got.n.tolist() == [1, 2, 2, 2, 2, 2]
    assert got.mean[0] == pytest.approx(loss_at(0, 0))
    assert got.mean[2] == pytest.approx(
        (loss_at(200, 0) + loss_at(200, 1)) / 2
    )  # the loss is linear in examples
    assert np.isnan(got.low[0])


def test_a_stopped_run_ends_or_is_carried_and_the_json_says_which(runs, tmp_path):
    make_run(tmp_path, "dpo", 0, last=300)
    make_run(tmp_path, "dpo", 1)
    loaded = load.load_directories([tmp_path])
    ended, carried = (curve(loaded, "dpo", "test", "loss", carry=c) for c in (False, True))
    assert ended.n.tolist() == [2, 2, 2, 2, 1, 1]
    assert ended.mean[-1] == pytest.approx(loss_at(500, 1))
    assert carried.n.tolist() == [2] * 6
    assert carried.mean[-1] == pytest.approx((loss_at(300, 0) + loss_at(500, 1)) / 2)
    for carry, says in (
        (False, "their lines end there (marked |)"),
        (True, "carried on at their last value (marked x)"),
    ):
        with canvas.styled():
            sheet = compose(Figure(LOSS.panels, columns=1, carry=carry), loaded)
        assert sheet.provenance["carry"] is carry
        assert sheet.provenance["panels"][0]["curves"][0]["ends_early"] == {"dpo_seed_0": 300.0}
        assert sheet.provenance["panels"][0]["curves"][0]["carried"] is carry
        assert any(
            "dpo_seed_0 at 300 of 500 examples" in w and says in w for w in sheet.provenance["warnings"]
        )
        marks = {line.get_marker() for line in sheet.figure.axes[0].lines}
        assert ("x" if carry else "|") in marks


def test_a_method_that_ends_before_the_others_is_told_in_curves_and_bars(runs, tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, "dpo", seed, last=300)
    loaded = load.load_directories([runs, tmp_path])
    panels = [Panel(kind=kind, metric="loss", split="test") for kind in ("curves", "bars")]
    with canvas.styled():
        sheet = compose(Figure(panels, columns=2), loaded)
        carried = compose(Figure(panels[:1], columns=1, carry=True), loaded)
    told = [w for w in sheet.provenance["warnings"] if "unequal" in w]
    assert told == [
        "dpo: unequal lengths: all 2 runs at 300 of 500 examples; their lines end there (marked |)",
        "dpo: unequal lengths: all 2 runs at 300 of 500 examples; the bars show their last evaluations",
    ]
    (dpo,) = (c for c in sheet.provenance["panels"][0]["curves"] if c["method"] == "dpo")
    assert dpo["ends_early"] == {"dpo_seed_0": 300.0, "dpo_seed_1": 300.0}
    drawn = [row for row in carried.rows if (row["kind"], row["method"]) == ("mean", "dpo")]
    assert (drawn[-1]["x"], drawn[-1]["y"]) == (
        500.0,
        pytest.approx(np.mean([loss_at(300, s) for s in (0, 1)])),
    )
    assert drawn[-1]["n"] == 2


def test_one_run_shows_the_interval_over_its_examples(runs):
    loaded = load.load_directories([runs / "ipo_seed_1"])
    got = curve(loaded, "ipo", "test", "rewards/accuracies", "group_south")
    exact = wilson(share_at(500, 1, 1) * 40, 40)
    assert got.interval == "run"
    assert (got.low[-1], got.high[-1]) == pytest.approx((exact.low, exact.high))
    last = bar(loaded, "ipo", "test", "rewards/accuracies", "group_south")
    assert (last.mean, last.low, last.high) == pytest.approx((exact.estimate, exact.low, exact.high))
    assert curve(loaded, "ipo", "test", "loss").interval == "none"


def test_one_run_prefers_the_bounds_that_it_recorded(tmp_path):
    folder = make_run(tmp_path, "dpo", 0)
    rows = load.read_rows(folder / "metrics.jsonl")
    rows[-1] |= {
        "test/rewards/accuracies/worst_group/ci_low": 0.21,
        "test/rewards/accuracies/worst_group/ci_high": 0.84,
    }
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = bar(load.load_directories([folder]), "dpo", "test", "rewards/accuracies", "worst_group")
    assert (got.low, got.high, got.interval) == (0.21, 0.84, "run")


def test_bars_take_the_first_last_or_mean_value_of_each_run(runs):
    loaded = load.load_directories([runs])
    for at, value in (("first", 0), ("last", 500), ("mean", 250)):
        got = bar(loaded, "gr_ipo", "test", "loss", at=at)
        values = [loss_at(value, seed, -0.3) for seed in (0, 1, 2)]
        assert got.mean == pytest.approx(np.mean(values))
        assert (got.low, got.high) == pytest.approx(t_interval(values))


def test_what_is_logged_every_step_is_averaged_over_equal_stretches(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"kind": "train", "step": i, "examples": 10 * i, "train/loss": float(i)} for i in range(1, 101)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    got = curve(load.load_directories([folder]), "run", "train", "loss", bins=10)
    assert got.x.tolist() == [100 * i for i in range(1, 11)]
    assert got.mean == pytest.approx([5.5 + 10 * i for i in range(10)])


def test_weights_that_never_move_are_left_out(runs):
    """An unweighted run logs its constant weights too; a panel of them would hide those that were learned."""
    loaded = load.load_directories([runs / "gr_ipo_seed_0", runs / "ipo_seed_0"])
    place = {
        **dict.fromkeys(load.COLUMNS),
        "run": "ipo_seed_0",
        "split": "train",
        "metric": "weights",
    }
    constant = [
        {**place, "group": f"group_{g}", "examples": x, "value": 0.5} for x in (100.0, 200.0) for g in GROUPS
    ]
    both = replace(loaded, table=pd.concat([loaded.table, pd.DataFrame(constant)], ignore_index=True))
    panel = Panel(kind="curves", metric="weights", split="train", group="*", moving=True)
    with canvas.styled():
        drawn = compose(Figure([panel], columns=1), both).provenance["panels"][0]["curves"]
    assert {(c["method"], c["group"]) for c in drawn} == {
        ("gr_ipo", "group_north"),
        ("gr_ipo", "group_south"),
    }


def test_a_run_binned_by_examples_ends_where_it_ends():
    for end in (201.0, 203.0, 226.0):  # end / (end / 200) is above 200 in floating point
        x, y = _binned(np.arange(1.0, end + 1), np.arange(end), end / 200)
        assert len(x) == 200 and x[-1] == pytest.approx(end) and y[-1] > end - 3


def test_calibration_is_binned_with_its_expected_error(tmp_path):
    table = pd.DataFrame(
        {"p": [0.12, 0.18, 0.15, 0.15, 0.9, 0.9], "y": [0, 1, 0, 0, 1, 0], "method": "scorer"}
    )
    table.to_csv(tmp_path / "c.csv", index=False)
    written = make_figures([f"data={tmp_path / 'c.csv'}", "figure=calibration", f"out={tmp_path}"])
    drawn = pd.read_csv(written[2])
    assert drawn["x"].tolist() == pytest.approx([0.15, 0.9])
    assert drawn["y"].tolist() == pytest.approx([0.25, 0.5])
    assert drawn["low"].iloc[0] == pytest.approx(wilson(1, 4).low)
    facts = json.loads(written[3].read_text())
    assert facts["panels"][0]["scorer"]["ece"] == pytest.approx((4 * 0.1 + 2 * 0.4) / 6)
    table.assign(prompt=["a", "b", "b", "c", "d", "e"]).to_csv(tmp_path / "c.csv", index=False)
    written = make_figures([f"data={tmp_path / 'c.csv'}", "figure=calibration", f"out={tmp_path}"])
    expected = cluster_bootstrap([0, 1, 0, 0], list("abbc"))
    assert pd.read_csv(written[2])["high"].tolist() == pytest.approx([expected.high, wilson(1, 2).high])


@pytest.fixture
def ratios(tmp_path) -> pd.DataFrame:
    """As bandits' ratios.csv: the plain loss's variance and regret are 1."""
    rows = [
        {"M": m, "lam": lam, "metric": metric, "ratio": r, "low": r - 0.1, "high": r + 0.2, "n": 50}
        for metric, scale in (("n_margin_variance", 1.0), ("regret", 2.0))
        for m, r in (("16", 0.3 * scale), ("inf", 0.25 * scale), ("2", 0.8 * scale))
        for lam in ("auto", "1.0")
    ]
    return pd.DataFrame(rows)


def test_ratios_against_m_are_drawn_in_order_with_their_intervals(ratios, tmp_path):
    ratios.to_csv(tmp_path / "r.csv", index=False)
    written = make_figures([f"data={tmp_path / 'r.csv'}", "figure=vrpo_variance", f"out={tmp_path}"])
    drawn = pd.read_csv(written[2])
    one = drawn[(drawn["panel"] == "Variance of the margins") & (drawn["method"] == "auto")]
    assert one[["x", "y", "low", "high"]].to_numpy() == pytest.approx(
        np.array([[2, 0.8, 0.7, 1.0], [16, 0.3, 0.2, 0.5], [np.inf, 0.25, 0.15, 0.45]])
    )
    with canvas.styled():
        figure = compose(read_figure("vrpo_variance")[1], None, pd.read_csv(tmp_path / "r.csv")).figure
    for ax, scale in zip(figure.axes, (1.0, 2.0), strict=True):
        assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "16", "\N{INFINITY}"]
        assert ax.get_ylim()[0] == 0.0
        points = [line for line in ax.lines if line.get_marker() not in ("None", "_", "|")]
        assert points[0].get_ydata() == pytest.approx([0.8 * scale, 0.3 * scale, 0.25 * scale])
    texts = [[t.get_text() for t in legend.get_texts()] for legend in figure.legends]
    assert texts == [["auto (n = 50)", "1.0 (n = 50)"], ["plain loss"]]
    assert "lam" in {t.get_text() for t in figure.texts}


def test_columns_and_values_that_a_file_lacks_are_named(ratios, tmp_path):
    def message(table: pd.DataFrame) -> str:
        table.to_csv(tmp_path / "r.csv", index=False)
        with pytest.raises(UserError) as caught:
            make_figures([f"data={tmp_path / 'r.csv'}", "figure=vrpo_variance", f"out={tmp_path}"])
        return str(caught.value)

    assert "no column 'ratio'; did you mean 'ratios'" in message(ratios.rename(columns={"ratio": "ratios"}))
    assert "no row with metric=regret; there are n_margin_variance" in message(
        ratios[ratios["metric"] != "regret"]
    )


def test_samples_are_binned_by_their_log_ratio_with_prompts_as_clusters(tmp_path):
    """Two referees, two prompts of ten samples each; by the first the reward rises with the log-ratio."""
    rows = [
        {"first": first, "second": second, "by": by, "prompt_key": f"p{i // 10}", "log_ratio": i / 2.0, "p": slope * i / 20.0}
        for by, slope in (("function", 1.0), ("judge", 0.0))
        for first in ("policy", "against")
        for second in ("reference", "chosen")
        for i in range(20)
    ]  # fmt: skip
    rows.append({**rows[0], "p": None})  # a judge that could not be read
    (tmp_path / "wins.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    written = make_figures(
        [f"data={tmp_path / 'wins.jsonl'}", "figure=log_ratio_vs_reward", f"out={tmp_path}"]
    )
    drawn = pd.read_csv(written[2])
    rising = drawn[drawn["method"] == "function"]
    assert rising["n"].tolist() == [3, 3, 3, 3, 2, 2, 2, 2]
    assert rising["x"].tolist()[:2] == pytest.approx([0.5, 2.0])
    assert rising["y"].tolist()[:2] == pytest.approx([0.05, 0.2])
    # the fourth bin holds 9, 10 and 11, of two prompts
    expected = cluster_mean([0.45, 0.5, 0.55], ["p0", "p1", "p1"])
    assert (rising["low"].iloc[3], rising["high"].iloc[3]) == pytest.approx((expected.low, expected.high))
    assert (drawn[drawn["method"] == "judge"]["y"] == 0.0).all()


def test_several_methods_by_group_get_a_panel_per_group_on_one_scale(runs):
    panel = Panel(
        kind="curves",
        metric="loss",
        split="test",
        group="*",
        title="Loss by group",
        lines={"best": {"south": 0.1}},
    )
    loaded = load.load_directories([runs])
    with canvas.styled():
        both = compose(Figure([panel], columns=2), loaded)
        one = compose(Figure([replace(panel, methods=["ipo"])], columns=2), loaded)
    assert [ax.get_title(loc="left") for ax in both.figure.axes] == ["Loss: north", "Loss: south"]
    assert both.figure.axes[0].get_ylim() == both.figure.axes[1].get_ylim()
    north = both.figure.axes[0].lines[0]
    assert north.get_ydata() == pytest.approx(
        [np.mean([loss_at(x, s, -0.3) for s in (0, 1, 2)]) for x in range(0, 501, 100)]
    )
    flat = [[line for line in ax.lines if len(set(line.get_ydata())) == 1] for ax in both.figure.axes]
    assert [len(lines) for lines in flat] == [0, 1]
    assert [ax.get_title(loc="left") for ax in one.figure.axes if ax.get_title(loc="left")] == [
        "Loss by group"
    ]
    assert [t.get_text() for t in one.figure.legends[1].get_texts()] == ["north", "south"]


def test_a_panel_of_one_method_leaves_the_others_out(runs):
    panels = [
        Panel(kind=kind, metric="loss", split="test", methods=["ipo"], lines={"floor": 0.5})
        for kind in ("curves", "bars")
    ]
    with canvas.styled():
        sheet = compose(Figure(panels, columns=2), load.load_directories([runs]))
    assert sheet.provenance["n"] == {"ipo": 3}
    assert {row["method"] for row in sheet.rows} == {"ipo"}
    assert [t.get_text() for legend in sheet.figure.legends for t in legend.get_texts()] == [
        "ipo (n = 3)",
        "floor",
    ]


# ---------------------------------------------------------------------------------------------- warnings


def warnings_and_text(loaded):
    """The warnings of the JSON, and all text on the figure without its line breaks."""
    with canvas.styled():
        sheet = compose(LOSS, loaded)
    return sheet.provenance["warnings"], " ".join(" ".join(t.get_text().split()) for t in sheet.figure.texts)


def test_clean_runs_have_no_warning(runs):
    assert warnings_and_text(load.load_directories([runs])) == (
        [],
        "method held-out: test split; n: seeds; mean and 95 % t interval over seeds",
    )


def test_deleting_a_seed_puts_the_warning_on_the_figure(runs):
    kept = [p for p in load.find_runs([runs]) if p.name != "gr_ipo_seed_1"]
    warnings, text = warnings_and_text(load.load_directories(kept))
    assert warnings == ["gr_ipo: no run with seed 1, which other methods have"]
    assert "! gr_ipo: no run with seed 1, which other methods have" in text


def test_mixed_configs_commits_seeds_and_unfinished_runs_are_told(tmp_path):
    make_run(tmp_path, "dpo", 0)
    make_run(tmp_path, "dpo", 1, lr=3e-4, commit="b" * 40)
    make_run(tmp_path, "dpo", 1, name="again", dirty=True)
    (tmp_path / "again" / "results.json").unlink()
    warnings, text = warnings_and_text(load.load_directories([tmp_path]))
    assert warnings == [
        "dpo: more than one run with seed 1",
        "dpo: configs differ in lr",
        "runs come from 2 commits: aaaaaaa, bbbbbbb",
        "not finished: again",
        "1 of 3 runs had uncommitted changes",
    ]
    assert all(w in text for w in warnings)


def test_what_else_differs_between_methods_is_in_the_caption_unless_their_names_say_so(tmp_path):
    make_run(tmp_path, "dpo", 0, lr=1e-4)
    make_run(tmp_path, "ipo", 0, lr=3e-4, weighting="group_robust")
    _, text = warnings_and_text(load.load_directories([tmp_path]))
    assert text.endswith("the methods also differ in lr")
    with canvas.styled():
        named = compose(LOSS, load.load_directories([tmp_path], by=["loss.name", "lr"]))
    assert named.provenance["methods_also_differ_in"] == []


def test_runs_that_lack_the_metric_are_counted(runs, tmp_path):
    empty = make_run(tmp_path, "ipo", 3)
    (empty / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "examples": 10, "train/loss": 1.0}\n')
    warnings, _ = warnings_and_text(load.load_directories([runs, empty]))
    assert "ipo: 1 of 4 runs did not log test/loss" in warnings


def test_truncated_bars_say_where_their_axis_starts(runs):
    panel = Panel(kind="bars", metric="rewards/accuracies", split="test", group="*", ylim=[0.4, None])
    with canvas.styled():
        cut, whole = (
            compose(Figure([p], columns=1), load.load_directories([runs])).figure.axes[0]
            for p in (panel, Panel(kind="bars", metric="rewards/accuracies", split="test", group="*"))
        )
    assert [t.get_text() for t in cut.texts] == ["axis starts at 0.4"]
    assert whole.get_ylim()[0] == 0.0
    assert [t.get_text() for t in whole.get_xticklabels()] == list(GROUPS)


# ---------------------------------------------------------------------------------------------- files


def test_every_figure_that_is_drawn_from_runs_can_be(runs):
    from_files = {"vrpo_variance", "calibration", "log_ratio_vs_reward", "scaling"}
    names = sorted({p.stem for p in FIGURES.glob("*.yaml")} - from_files - {"vrpo_training"})
    assert len(names) == 9
    loaded = load.load_directories([runs])
    with canvas.styled():
        for name in names:
            _, figure = read_figure(name)
            sheet = compose(figure, loaded)
            by_group = [p for p in figure.panels if (p.kind, p.group, p.moving) == ("curves", "*", False)]
            assert len(sheet.provenance["panels"]) == len(figure.panels) + len(by_group), name
            assert sheet.provenance["n"] == {"gr_ipo": 3, "ipo": 3}


def texts_of(figure) -> Iterator[Text]:
    """All text that is drawn; matplotlib keeps labels of ticks outside the axes, too."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for ax in figure.axes:
        if not ax.axison:
            continue
        yield from (*ax.texts, ax._left_title, ax.xaxis.label, ax.yaxis.label)
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            yield from (t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high)


def misplaced(figure) -> list[str]:
    """Text of the figure that leaves it, or that lies over other text."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    texts = [t for t in texts_of(figure) if t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
    width, height = figure.bbox.width, figure.bbox.height
    found = [text for text, b in boxes if b.x0 < -1 or b.y0 < -1 or b.x1 > width + 1 or b.y1 > height + 1]
    for i, (text, a) in enumerate(boxes):
        found += [
            f"{text} | {other}"
            for other, b in boxes[i + 1 :]
            if texts[i].get_rotation() != 30  # the box around slanted text is not what it covers
            and min(a.x1, b.x1) - max(a.x0, b.x0) > 1
            and min(a.y1, b.y1) - max(a.y0, b.y0) > 1
        ]
    return found


def test_no_text_is_cut_off_or_lies_over_other_text(runs, ratios, tmp_path):
    """Every figure, of two methods and of one run; with warnings, and with long names of methods."""
    (tmp_path / "many").mkdir()
    for loss in ("ipo", "a_method_with_a_rather_long_name", "another_method_with_a_long_name", "dpo", "kto"):
        make_run(tmp_path / "many", loss, 0, commit="b" * 40, last=400 if loss == "dpo" else 500, weighting="group_robust",
                 groups=("north", "a group with a long name", "south", "goqa_China", "goqa_India (Current national sample)"))  # fmt: skip
    wins = pd.DataFrame({"first": "policy", "second": "reference", "by": ["function", "judge"] * 10, "prompt_key": list("ab") * 10,
                         "log_ratio": np.arange(20.0), "p": np.linspace(0, 1, 20)})  # fmt: skip
    calibration = pd.DataFrame(
        {"p": np.linspace(0, 1, 20), "y": [0, 1] * 10, "method": ["raw", "calibrated"] * 10}
    )
    growth = pd.DataFrame(
        {
            "curve": curve,
            "side": side,
            "positions": 500 * x,
            "grows": 100 * x,
            "seconds": 0.1 * x,
            "peak_mib": 10.0 * x,
        }
        for curve in ("tokens", "vocabulary", "prompt", "responses")
        for side in ("padded", "ours")
        for x in (1, 2, 4)
    )
    tables = {
        "vrpo_variance": ratios,
        "log_ratio_vs_reward": wins,
        "calibration": calibration,
        "scaling": growth,
    }
    sources = [load.load_directories([p]) for p in (runs, runs / "ipo_seed_0", tmp_path / "many")]
    problems = {}
    with canvas.styled():
        for name in sorted({p.stem for p in FIGURES.glob("*.yaml")} - {"vrpo_training"}):
            _, figure = read_figure(name)
            drawn = (
                [compose(figure, None, tables[name])]
                if name in tables
                else [compose(figure, x) for x in sources]
            )
            problems |= {
                (name, i): found for i, sheet in enumerate(drawn) if (found := misplaced(sheet.figure))
            }
    assert problems == {}, "\n".join(map(str, problems.items()))


def test_the_training_of_vrpo_is_drawn_from_its_diagnostics(tmp_path):
    for seed in (0, 1):
        folder = make_run(tmp_path, "vrpo", seed)
        rows = [
            {"kind": "train", "step": x // 10, "examples": x, "train/vrpo/variance_removed": (x + seed) / 1000, "train/vrpo/brier": 0.2}
            for x in (100, 200, 300)
        ]  # fmt: skip
        with (folder / "metrics.jsonl").open("a") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows))
    written = make_figures(["figure=vrpo_training", f"runs={tmp_path}", f"out={tmp_path}"])
    drawn = pd.read_csv(written[2])
    means = drawn[(drawn["panel"] == "Variance removed") & (drawn["kind"] == "mean")]
    assert means["y"].tolist() == pytest.approx([0.1005, 0.2005, 0.3005])


def test_a_redraw_in_another_process_gives_the_same_bytes(runs, tmp_path):
    _, figure = read_figure("worst_group")
    draw_figure(figure, "worst_group", tmp_path / "one", load.load_directories([runs]))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "0"}
    words = ["figure=worst_group", f"runs={runs}", f"out={tmp_path / 'two'}"]
    command = [sys.executable, "plot_scripts/make_figures.py", *words]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    for ending in ("pdf", "png", "csv", "json"):
        one, two = (tmp_path / folder / f"worst_group.{ending}" for folder in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), ending


def test_fonts_are_embedded_and_files_carry_no_dates(runs, tmp_path):
    pdf, png, _, facts = draw_figure(LOSS, "loss", tmp_path, load.load_directories([runs]))
    assert b"CIDFontType2" in pdf.read_bytes() or b"/TrueType" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
    assert b"CreationDate" not in pdf.read_bytes()
    assert b"Software" not in png.read_bytes()
    provenance = json.loads(facts.read_text())
    assert {r["run"] for r in provenance["runs"]} == {p.name for p in load.find_runs([runs])}
    assert provenance["n"] == {"gr_ipo": 3, "ipo": 3}
    assert all(len(r["config_hash"]) == 64 for r in provenance["runs"])


def test_no_two_methods_of_a_figure_look_alike():
    looks = canvas.looks([str(i) for i in range(35)])
    assert len({(v.colour, str(v.dash)) for v in looks.values()}) == 35
    assert len({(v.colour, v.hatch) for v in list(looks.values())[:28]}) == 28
    assert len({v.colour for v in list(looks.values())[:7]}) == 7


def test_both_sources_give_the_same_figure(runs, tmp_path):
    """The same runs from their directories and as W&B returns them: equal bytes of PDF, PNG and CSV."""
    folders = load.find_runs([runs])
    _, figure = read_figure("worst_group")
    here = draw_figure(figure, "f", tmp_path / "directories", load.load_directories(folders))
    api = FakeApi(folders)
    remote = load.load_wandb("team", "project", {"state": "finished"}, api=api)
    there = draw_figure(figure, "f", tmp_path / "wandb", remote)
    assert api.asked == [("team/project", {"state": "finished"}, "+created_at")]
    for a, b in zip(here[:3], there[:3], strict=True):
        assert a.read_bytes() == b.read_bytes(), a.suffix
    assert [r["source"][:19] for r in json.loads(there[3].read_text())["runs"]] == ["wandb:team/project/"] * 6


def test_a_cached_answer_redraws_without_network(runs, tmp_path):
    folders = load.find_runs([runs])
    first = load.load_wandb("team", "project", cache=tmp_path, api=FakeApi(folders))

    class Unreachable:
        def runs(self, *_, **__):
            raise AssertionError("the network was used")

    again = load.load_wandb("team", "project", cache=tmp_path, api=Unreachable())
    assert again.runs == first.runs
    pd.testing.assert_frame_equal(again.table, first.table)
    assert list(tmp_path.rglob("*.csv"))
    with pytest.raises(AssertionError, match="network"):
        load.load_wandb("team", "other", cache=tmp_path, api=Unreachable())
    with pytest.raises(AssertionError, match="network"):
        load.load_wandb("team", "project", cache=tmp_path, refresh=True, api=Unreachable())


def test_an_unknown_project_is_one_message():
    class Refuses:
        def runs(self, where, **_):
            raise ValueError(f"Could not find project {where}\nmore")

    with pytest.raises(
        UserError, match=r"^W&B team/projct: Could not find project team/projct; log in with"
    ) as caught:
        load.load_wandb("team", "projct", api=Refuses())
    assert "more" not in str(caught.value)
    with pytest.raises(UserError, match="no runs"):
        load.load_wandb("team", "empty", api=FakeApi([]))


def test_runs_of_older_programs_are_read_under_our_names(runs):
    folders = load.find_runs([runs])[:2]
    ours = load.load_directories(folders)
    older = load.load_wandb("team", "project", api=FakeApi(folders, older_names(GROUPS, validation=True)))
    assert {i.config_hash_no_seed for i in older.runs} == {i.config_hash_no_seed for i in ours.runs}
    for key in (
        ("test", "loss", ""),
        ("test", "loss", "group_south"),
        ("eval", "rewards/accuracies", "group_north"),
        ("eval", "rewards/accuracies", "worst_group"),
        ("test", "policy_accuracies", "group_south"),
        ("train", "weights", "group_north"),
    ):
        for info in ours.runs:
            assert (info.run, *key) in older.series
            for a, b in zip(ours.series[info.run, *key], older.series[info.run, *key], strict=True):
                assert a == pytest.approx(b)


def test_older_names_beside_ours_change_nothing(runs):
    """A run that mirrors both: the older names must not be read as another split."""
    folders = load.find_runs([runs])[:1]
    names = older_names(GROUPS, validation=False)
    both = FakeApi(folders)
    for row in both._runs[0].scan_history():
        row.update({names[k]: -1.0 for k in list(row) if k in names and k not in ("step", "examples")})
    table = load.load_wandb("team", "project", api=both).table
    known = load.load_directories(folders).table
    assert len(table[table["split"] == "test"]) == len(known[known["split"] == "test"])
    assert not (table[table["metric"] == "loss"]["value"] == -1.0).any()


# ---------------------------------------------------------------------------------------------- commands


def test_mistakes_are_one_message_and_exit_code_2(runs, capsys):
    for words, message in (
        (["figure=worst_grup", f"runs={runs}"], "did you mean 'worst_group'"),
        (["figure=worst_group"], "drawn from runs: give runs="),
        (["figur=worst_group", f"runs={runs}"], "did you mean 'figure'"),
        (["worst_group"], "must be key=value"),
        (["figure=calibration"], "give data=FILE"),
        (["figure=worst_group", f"runs={runs}", "project=p"], "give one"),
        (["figure=worst_group", f"runs={runs}", "split=tset"], "no run logged loss of tset"),
        (["figure=worst_group", f"runs={runs}", "labels={ipo"], "labels={ipo: cannot be read"),
    ):
        assert run_command(make_figures, words) == 2
        assert message in capsys.readouterr().err


def test_a_figure_of_ones_own_with_overrides(runs, tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "panels:\n  - {kind: curves, metric: loss, split: eval, lines: {goal: 1.0}}\n"
    )
    words = [
        f"figure={tmp_path / 'mine.yaml'}",
        f"runs={runs}",
        f"out={tmp_path}",
        "split=test",
        "labels={ipo: IPO}",
        "title=Mine",
    ]
    facts = json.loads(make_figures(words)[3].read_text())
    assert (facts["figure"], facts["title"], facts["panels"][0]["split"]) == ("mine", "Mine", "test")
    assert set(facts["n"]) == {"gr_ipo", "IPO"}
    (tmp_path / "mine.yaml").write_text("panels:\n  - {kind: curve, metric: loss}\n")
    with pytest.raises(UserError, match="did you mean 'curves'"):
        make_figures(words)


def test_full_metrics_draws_curves_and_final_bars_of_what_was_logged(runs, tmp_path):
    (tmp_path / "request.yaml").write_text(f"runs: ['{runs}']\nout: {tmp_path}\nlabels: {{ipo: IPO}}\n")
    words = [
        "--config",
        str(tmp_path / "request.yaml"),
        "--metrics",
        "rewards/accuracies",
        "--splits",
        "test",
    ]
    written = plot_from_wandb_full_metrics.main(words)
    assert {p.stem for p in written} == {"test.rewards.accuracies.curves", "test.rewards.accuracies.final"}
    drawn = pd.read_csv(tmp_path / "test.rewards.accuracies.final.csv")
    bars = drawn[drawn["kind"] == "bar"]
    assert set(bars["group"].fillna("")) == {"", "mean_group", "worst_group", "group_north", "group_south"}
    assert set(bars["method"]) == {"IPO", "gr_ipo"}
    pairs = plot_from_wandb_full_metrics.tracked(load.load_directories([runs]))
    assert ("train", "weights") in pairs
    assert ("test", "loss") in pairs
    assert not any(m == "group_counts" for _, m in pairs)
    with pytest.raises(UserError, match="did you mean 'loss'"):
        plot_from_wandb_full_metrics.main(["--runs", str(runs), "--metrics", "los"])


def test_paper_plots_draw_the_three_figures(runs, tmp_path):
    written = plot_from_wandb_paper_plots.main(["--runs", str(runs), "--out", str(tmp_path), "--carry"])
    assert {p.stem for p in written} == {"group_robust_end", "group_robust_training", "group_robust_curves"}
    drawn = pd.read_csv(tmp_path / "group_robust_training.csv")
    start = drawn[
        (drawn["panel"] == "Log-prob accuracy at the start")
        & (drawn["kind"] == "bar")
        & (drawn["method"] == "ipo")
    ]
    expected = [np.mean([share_at(0, s, g) - 0.1 for s in (0, 1, 2)]) for g in (0, 1)]
    assert start["y"].tolist() == pytest.approx(expected)


def test_quickstart_figure_has_a_loss_per_method_and_the_reference_rate(runs, tmp_path):
    lines = {"Bayes rate": {"north": 0.9, "south": 0.8}}
    written = quickstart_figure([runs / "gr_ipo_seed_0", runs / "ipo_seed_0"], tmp_path, lines)
    facts = json.loads(written[3].read_text())
    assert [p["title"] for p in facts["panels"]] == [
        "gr_ipo: held-out loss",
        "ipo: held-out loss",
        "Held-out accuracy: north",
        "Held-out accuracy: south",
        "Accuracy at the end",
        "Group weights",
    ]
    drawn = pd.read_csv(written[2])
    loss = drawn[(drawn["panel"] == "ipo: held-out loss") & (drawn["kind"] == "run")]
    assert loss["y"].tolist() == pytest.approx([loss_at(x, 0) for x in range(0, 501, 100)])
    last = drawn[
        (drawn["panel"] == "Accuracy at the end") & (drawn["method"] == "ipo") & (drawn["kind"] == "bar")
    ]
    assert last["low"].tolist() == pytest.approx([wilson(share_at(500, 0, g) * 40, 40).low for g in (0, 1)])
    one = quickstart_figure([runs / "ipo_seed_0"], tmp_path, {"Bayes rate": 0.9}, name="plain")
    assert len(json.loads(one[3].read_text())["panels"]) == 3  # no weights without a weighting
