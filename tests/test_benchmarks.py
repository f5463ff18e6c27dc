"""The benchmark's contestants do the same training; the arithmetic they are measured by counts what it says."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import gpu, scaling
from benchmarks.throughput import check_losses
from benchmarks.trainers import CONTESTANTS, Trainer
from benchmarks.workloads import WORKLOADS, build_model, find_workload, model_config, padding, useful_flops
from data.schema import Row
from plot_scripts.draw import draw_figure, read_figure

CPU = torch.device("cpu")
TINY = model_config("tiny")


def train(contestant, name, micro, **more):
    workload = find_workload(name)
    trainer = Trainer(
        CONTESTANTS[contestant], workload, TINY, device=CPU, micro=micro, autocast=False, **more
    )
    steps = [workload.step(i, 97)[:4] for i in range(3)]
    trainer.fill_cache(steps)
    return [trainer.step(rows) for rows in steps]


@pytest.mark.parametrize("name", ["hh", "opinion", "vrpo4", "7x5x4"])
def test_contestants_see_equal_losses_whatever_their_micro_batches(name):
    expected = train("original", name, 4)
    assert len(set(expected)) == 3
    for contestant, micro in (("padded", 4), ("shared", 2), ("ours", 4), ("ours", 1)):
        np.testing.assert_allclose(train(contestant, name, micro), expected, atol=1e-4)


def test_contestants_with_adapters_see_equal_losses_and_train_the_adapters_only():
    expected = train("padded", "hh", 2, lora=True)
    assert len(set(expected)) == 3 and expected != train("padded", "hh", 2)
    np.testing.assert_allclose(train("ours", "hh", 4, lora=True), expected, atol=1e-4)


def make_row(prompt, responses):
    roles = ("chosen", "rejected")
    return Row(
        "t:0", np.array(prompt, np.int32), tuple(np.array(r, np.int32) for r in responses), roles, 0, "key"
    )


def test_useful_flops_count_each_prompt_and_response_once():
    model = build_model(TINY, 0, CPU)
    rows = [make_row([5, 6, 7], [[8, 9], [8, 9, 10, 11]])]
    attention_weights, mlp, vocabulary = 16 * 16 * 2 + 16 * 8 * 2, 3 * 16 * 24, 97 * 16
    tokens, heads = (
        3 + 1 + 3,
        1 + 1 + 3,
    )  # a last token is not fed; the prompt's end predicts both first tokens
    pairs = (1 + 2 + 3) + (3 + 1) + 3 * 3 + (1 + 2 + 3)
    expected = (
        6 * (tokens * (2 * attention_weights + mlp) + heads * (mlp + vocabulary))
        + 3.5 * 4 * 2 * 2 * 8 * pairs
    )
    assert useful_flops(rows, model) == expected
    assert useful_flops(rows * 3, model) == expected


def test_frozen_weights_cost_two_thirds():
    model = build_model(TINY, 0, CPU)
    rows = [make_row([5, 6, 7], [[8, 9], [8, 9, 10, 11]])]
    attention = 3.5 * 4 * 2 * 2 * 8 * 25
    trained = useful_flops(rows, model) - attention
    assert useful_flops(rows, model.requires_grad_(False)) - attention == pytest.approx(trained * 4 / 6)


def test_a_shape_is_a_workload_and_other_names_are_refused():
    rows = find_workload("5x3x4").step(0, 50)
    assert {(len(r.prompt), *map(len, r.responses)) for r in rows} == {(5, 3, 3, 3, 3)}
    assert find_workload("5x3x2").step(0, 50)[0].roles == ("chosen", "rejected")
    for name in ("hhh", "5x3", "0x3x2", "5x3x3", "5x3x0"):
        with pytest.raises(ValueError, match="must be one of hh"):
            find_workload(name)


def test_unequal_or_undefined_losses_stop_a_race():
    check_losses("here", {"a": 0.7, "b": 0.7001})
    for other in (0.71, float("nan")):
        with pytest.raises(SystemExit, match="here: losses"):
            check_losses("here", {"a": 0.7, "b": other})


@pytest.mark.slow
def test_the_gpu_script_runs_through_and_reports(tmp_path, capsys):
    assert gpu.main([str(tmp_path), "--dry-run", "--steps", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [(r["contestant"], r["lora"]) for r in lines] == [
        ("ours", False), ("padded", False), ("ours", True), ("padded", True)
    ]  # fmt: skip
    assert all(len(r["losses"]) == 5 and r["graphs_after_warm_up"] == 0 for r in lines)
    assert (tmp_path / "gpu.md").read_text().count("\n| hh |") == 4
    assert "problem" not in capsys.readouterr().out


def test_the_gpu_script_says_what_is_wrong_and_what_it_left_out(tmp_path, monkeypatch):
    def measured(case, model, device, steps, left):
        if case.contestant == "padded":
            raise RuntimeError("out of memory")
        return {"losses": [0.7], "rows_per_second": 1.0, "useful_fraction": 0.1, "graphs_after_warm_up": 2}

    monkeypatch.setattr(gpu, "measure", lambda case, *a: {**dataclasses.asdict(case), **measured(case, *a)})
    found = list(gpu.run(gpu.CASES, "tiny", "cpu", 1, limit=1e9))
    wrong = "\n".join(gpu.problems(found))
    assert "hh, padded: out of memory" in wrong and "hh: 2 graphs" in wrong and "below 0.4" in wrong
    pair = [
        {
            "workload": "hh",
            "lora": True,
            "contestant": c,
            "losses": [x],
            "rows_per_second": r,
            "graphs_after_warm_up": 0,
        }
        for c, x, r in (("ours", 0.7, 1.0), ("padded", 0.9, 2.0))
    ]
    wrong = "\n".join(gpu.problems(pair))
    assert "not the same training" in wrong and "slower than padded" in wrong
    assert all("skipped" in r for r in gpu.run(gpu.CASES[:2], "tiny", "cpu", 1, limit=-1.0))


def test_the_table_of_growth_keeps_the_other_curves(tmp_path):
    path = tmp_path / "curves.csv"
    point = {"side": "ours", "model": "m", "grows": 1, "positions": 10, "seconds": 1.0, "peak_mib": 2.0}
    scaling.update(path, iter([{"curve": c, **point} for c in scaling.CURVES]), list(scaling.CURVES))
    scaling.update(path, iter([{"curve": "prompt", **point, "seconds": 3.0}]), ["prompt"])
    table = pd.read_csv(path)
    assert sorted(table["curve"]) == sorted(scaling.CURVES)
    assert table.set_index("curve")["seconds"].to_dict() == dict.fromkeys(scaling.CURVES, 1.0) | {
        "prompt": 3.0
    }
    for made in draw_figure(*read_figure("scaling")[::-1], tmp_path, None, table):
        assert made.stat().st_size > 0


def test_a_straight_line_is_found():
    table = pd.DataFrame(
        {"curve": "tokens", "side": "ours", "positions": [1000, 2000, 3000], "seconds": [1.5, 2.5, 3.5]}
    )
    assert scaling.linear_fit(table) == "ours: 0.50 s + 1.00 s per 1,000 positions, R2 1.0000"


def test_padding_counts_positions_over_tokens():
    rows = [make_row([1, 2], [[3], [3, 4]]), make_row([1], [[5], [6]])]
    assert padding(rows, 2) == 4 * 4 / (3 + 4 + 2 + 2)
    assert padding(rows, 1) == (2 * 4 + 2 * 2) / (3 + 4 + 2 + 2)


def test_workloads_are_functions_of_the_step_with_the_shapes_they_claim():
    for name, workload in WORKLOADS.items():
        rows = workload.step(3, 1000)
        assert len(rows) == workload.rows and rows[0].uid == workload.step(3, 1000)[0].uid
        assert np.array_equal(rows[0].prompt, workload.step(3, 1000)[0].prompt)
        assert not np.array_equal(rows[0].prompt, workload.step(4, 1000)[0].prompt)
        assert {len(r.responses) for r in rows} == {{"vrpo4": 4, "vrpo10": 10}.get(name, 2)}
    opinion = WORKLOADS["opinion"].step(0, 1000)
    assert len({r.prompt_key for r in opinion}) == 16
    assert {len(x) for r in opinion for x in r.responses} == {1, 2, 3}
    mean = np.mean([len(r.prompt) for i in range(50) for r in WORKLOADS["hh"].step(i, 1000)])
    assert 120 < mean < 136


def test_model_shapes_are_known():
    assert model_config("bench")["vocab_size"] == 32000 and model_config("bench", 50)["vocab_size"] == 50
    assert {model_config(m)["model_type"] for m in ("small_vocab", "gemma_2b")} == {"llama", "gemma"}
