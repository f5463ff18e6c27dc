"""torch.compile of blocks changes rounding at most, compiles once for all lengths, and leaves names and sampling alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import assembly
import run_models
from config.compose import compose
from engine import archives
from engine.compilation import compile_blocks
from engine.models import load_tokenizer
from engine.parallel import full_tensor, shard
from engine.sampling import generate
from engine.scoring import Scorer
from tests.scoring_tools import gradients, largest_gap, make_batch, make_model, ragged_batch
from tests.test_program import SMALL

ROLES = ("chosen", "rejected", "aux_1")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # an error inside of the compiler would be its failure
    pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler"),
]


def graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_compiled_blocks_score_the_same_at_any_length_with_one_compilation(kind):
    torch.compiler.reset()
    plain, compiled = (make_model(kind, num_hidden_layers=3) for _ in range(2))
    scorers = Scorer(plain), Scorer(compiled)
    compile_blocks(compiled)
    assert dict(plain.named_parameters()).keys() == dict(compiled.named_parameters()).keys()
    batches = [ragged_batch()]
    for size in (3, 9, 14, 20):
        ids = list(range(2, 2 + size))
        batches.append(
            make_batch([ids, [7]], [(0, "chosen", ids), (0, "rejected", [2]), (1, "chosen", ids[:2])])
        )
    seen = []
    for batch in batches:
        found = []
        for model, scorer in zip((plain, compiled), scorers, strict=True):
            scored = scorer(batch, ROLES)
            found.append(
                (
                    scored.logps,
                    gradients(model, scored.logps @ torch.linspace(-1, 2, len(scored.logps)).double()),
                )
            )
        (expected, theirs), (logps, ours) = found
        torch.testing.assert_close(logps, expected, rtol=0, atol=1e-9)
        assert largest_gap(ours, theirs) < 1e-8
        seen.append(graphs())
    assert seen[0] > 0 and seen[1:] == seen[:1] * 4


def test_generation_runs_the_blocks_as_they_were_written():
    run = compose(["model=tiny-llama"])
    model = run_models.models.build_reference(run.model, device="cpu")
    tokenizer = load_tokenizer(run.model)
    words = {"max_new_tokens": 5, "seed": 0, "keys": [("a",), ("b",)], "batch_size": 2}
    prompts = [np.array([5, 6, 7]), np.array([9])]
    expected = generate(model, tokenizer, prompts, **words)
    compile_blocks(model)
    before = graphs()
    drawn = generate(model, tokenizer, prompts, **words)
    assert [s.ids.tolist() for s in drawn] == [s.ids.tolist() for s in expected]
    assert graphs() == before


def test_a_compiled_run_trains_like_a_plain_one(tmp_path):
    ends = []
    for flag in ("false", "true"):
        words = [
            f"compile={flag}",
            f"run_root={tmp_path}/{flag}",
            f"cache_dir={tmp_path}/cache",
            "loss=dpo",
            "loss.beta=0.1",
        ]
        run = compose(
            [
                *SMALL,
                *words,
                "assert_sft_step=false",
                "exp_name=x",
                "sample_during_eval=true",
                "n_eval_model_samples=2",
            ]
        )
        before = graphs()
        assembly.run_training(run)
        assert (graphs() > before) == (flag == "true")
        end = archives.read(str(Path(run.config.run_dir) / "LATEST"))
        ends.append(end)
    assert ends[0].base.keys() == ends[1].base.keys()
    for name, value in ends[0].base.items():
        torch.testing.assert_close(ends[1].base[name], value, rtol=0, atol=2e-5)


def test_sharded_blocks_compile_too():
    """One process that believes in ranks: slices are gathered and gradients reduced around the compiled code."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for how in ("plain", "compiled and sharded"):
            model = make_model("llama", num_hidden_layers=3)
            scorer = Scorer(model)
            if how != "plain":
                compile_blocks(model)
                shard(scorer, block_name=None, param_dtype=None)
                before = graphs()
            logps = scorer(ragged_batch(), ROLES).logps
            logps.sum().backward()
            found.append((logps.detach(), {n: full_tensor(p.grad) for n, p in model.named_parameters()}))
        assert graphs() > before
    finally:
        torch.distributed.destroy_process_group()
    (expected, theirs), (ours, grads) = found
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert largest_gap(grads, theirs) < 1e-8
