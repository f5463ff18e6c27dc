"""The benchmark's contestants do the same training; the arithmetic they are measured by counts what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.trainers import CONTESTANTS, Trainer
from benchmarks.workloads import WORKLOADS, build_model, model_config, padding, useful_flops
from data.schema import Row

CPU = torch.device("cpu")
TINY = {
    "model_type": "gemma",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "vocab_size": 97,
    "max_position_embeddings": 1024,
}


def train(contestant, name, micro):
    workload = WORKLOADS[name]
    trainer = Trainer(CONTESTANTS[contestant], workload, TINY, device=CPU, micro=micro, autocast=False)
    steps = [workload.step(i, 97)[:4] for i in range(3)]
    trainer.fill_cache(steps)
    return [trainer.step(rows) for rows in steps]


@pytest.mark.parametrize("name", ["hh", "opinion", "vrpo4"])
def test_contestants_see_equal_losses_whatever_their_micro_batches(name):
    expected = train("original", name, 4)
    assert len(set(expected)) == 3
    for contestant, micro in (("padded", 4), ("shared", 2), ("ours", 4), ("ours", 1)):
        np.testing.assert_allclose(train(contestant, name, micro), expected, atol=1e-4)


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
