"""What only a CUDA device can show: `python -m pytest -m gpu`. Elsewhere all of it is left out."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from config.compose import CONFIG_DIR
from engine import attention, head, runtime
from engine.checkpoint import find
from engine.compilation import compile_blocks
from engine.head import Workspace, target_logps
from engine.parallel import World
from engine.sampling import generate
from engine.scoring import Scorer
from losses.pairwise import DPO
from tests.scoring_tools import gradients, make_batch, make_model, plain_logps
from tests.test_program import SMALL, lines, start
from tests.trainer_tools import make_rows, make_trainer
from utils import stream
from weighting import GroupRobust

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
    pytest.mark.filterwarnings("default"),  # compilers warn about what they like
]
ROOT = CONFIG_DIR.parent
ROLES = ("chosen", "rejected", "aux_1")
CUDA = torch.device("cuda")
WIDE = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 1024, "num_hidden_layers": 3}


def wide_model(kind: str, dtype: torch.dtype = torch.float64):
    """Heads of at least 16 dimensions: FlexAttention's least."""
    more = {"intermediate_size": 96} | WIDE
    model = make_model(kind, dtype=dtype, exact_norms=True, **more)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(0.25)  # or bfloat16 loses everything in gemma's norms
    return model


def long_batch(seed: int = 0, least: int = 60):
    """About 900 tokens in several tiles of attention: two examples with one prompt, long and short responses."""
    rng = stream(seed, "gpu test")
    ids = [rng.integers(3, 61, int(n)).tolist() for n in rng.integers(least, 3 * least, 9)]
    rows = [(0, "chosen", ids[2]), (0, "rejected", ids[3]), (1, "chosen", ids[4]), (1, "rejected", ids[2])]
    rows += [(2, "chosen", ids[5][:1]), (2, "rejected", ids[6][:3]), (2, "aux_1", ids[7])]
    return make_batch([ids[0], ids[0], ids[1]], rows)


@pytest.fixture(scope="module", params=["llama", "gemma"])
def expected(request):
    """(kind, token log-probs, gradients) in float64 on the CPU, from plain rows."""
    model, batch = wide_model(request.param), long_batch()
    logps = torch.cat(plain_logps(model, batch, ROLES))
    return request.param, logps.detach(), gradients(model, logps @ upstream(len(logps)))


def upstream(count: int) -> torch.Tensor:
    return torch.linspace(-1.3, 1.7, count, dtype=torch.float64)


def relative_error(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    difference = sum(((ours[n].cpu().double() - theirs[n]) ** 2).sum() for n in theirs)
    return float((difference / sum((g**2).sum() for g in theirs.values())) ** 0.5)


@pytest.mark.parametrize("flex", [True, False], ids=["flex", "blocks"])
@pytest.mark.parametrize(
    ("precision", "gap", "error"), [("fp32", 2e-4, 1e-4), ("tf32", 2e-2, 2e-2), ("bf16", 0.2, 0.05)]
)
def test_log_probs_and_gradients_are_those_of_plain_rows(expected, precision, gap, error, flex, monkeypatch):
    kind, logps, grads = expected
    calls, by_flex = [], attention._by_flex
    monkeypatch.setattr(attention, "_by_flex", lambda *a: calls.append(a[0].dtype) or by_flex(*a))
    model = wide_model(kind, torch.float32).to(CUDA)
    runtime.set_products("tf32" if precision == "tf32" else "fp32", CUDA)
    try:
        scorer = Scorer(model)
        assert scorer.layout == "shared_prefix"
        calls.clear()  # of its own trial
        scorer._flex = flex
        half = precision == "bf16"
        with torch.autocast("cuda", torch.bfloat16) if half else contextlib.nullcontext():
            scored = scorer(long_batch(), ROLES, tokens=True)
        ours = gradients(model, scored.token_logps.double() @ upstream(len(logps)).to(CUDA))
    finally:
        runtime.set_products("fp32", CUDA)
    assert len(calls) >= 3 if flex else calls == []
    assert (scored.token_logps.cpu() - logps).abs().max() < gap
    assert relative_error(ours, grads) < error


def test_attention_is_compiled_once_for_all_lengths():
    from torch._dynamo.utils import counters

    scorer = Scorer(wide_model("llama", torch.float32).to(CUDA))
    seen = []
    for seed, least in enumerate((60, 75, 130, 50, 99, 210)):
        with torch.autocast("cuda", torch.bfloat16):
            scorer(long_batch(seed, least), ROLES).logps.sum().backward()
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[2:] == seen[2:3] * 4, seen


@pytest.mark.parametrize("keep_rows", [0, 300, 700])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_the_head_in_tiles(keep_rows, dtype, error, monkeypatch):
    rows, vocab, width = 700, 5003, 64
    monkeypatch.setattr(head, "CUDA_TILE_BYTES", 4 * vocab * 256)
    draw = torch.Generator().manual_seed(0)
    h, w, b = (
        0.3 * torch.randn(*s, generator=draw, dtype=torch.float64)
        for s in ((rows, width), (vocab, width), (vocab,))
    )
    h, w = (
        h.to(torch.bfloat16).double(),
        w.to(torch.bfloat16).double(),
    )  # what is rounded is what it makes of them
    row, target = torch.arange(rows), torch.randint(vocab, (rows,), generator=draw)
    row, target = torch.cat([row, row[:50]]), torch.cat([target, target[:50].flip(0)])
    up = torch.randn(len(row), generator=draw, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (h, w, b)]
    logps = (leaves[0] @ leaves[1].T + leaves[2]).log_softmax(1)[row, target]
    theirs = [logps, *torch.autograd.grad(logps, leaves, up)]
    mine = [x.float().to(CUDA).requires_grad_() for x in (h, w, b)]
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = target_logps(
            *mine, row.to(CUDA), target.to(CUDA), workspace=Workspace(keep_rows * vocab * dtype.itemsize)
        )
    ours = [found, *torch.autograd.grad(found, mine, up.float().to(CUDA))]
    assert (found.cpu() - theirs[0]).abs().max() < 1e-4  # sums are float32 in both
    for a, e in zip(ours, theirs, strict=True):
        assert float((a.cpu().double() - e).norm() / e.norm()) < error


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_a_step_waits_for_the_device_once(tmp_path, autocast):
    trainer = make_trainer(
        tmp_path, DPO(beta=0.1), rows=make_rows(), dtype=torch.float32, kind="llama", world=World(0, 1, CUDA, "none"),
        weighting=GroupRobust(step_size=0.1), gradient_accumulation_steps=3, precision="bf16" if autocast else "fp32",
    )  # fmt: skip
    trainer.step()
    trainer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) == 1, waits


def test_compiled_blocks_score_the_same():
    plain, compiled = (wide_model("llama", torch.float32).to(CUDA) for _ in range(2))
    scorers = Scorer(plain), Scorer(compiled)
    compile_blocks(compiled)
    (theirs, a), (ours, b) = (
        (s.logps, gradients(m, s.logps.sum()))
        for m, s in (
            (m, scorer(long_batch(), ROLES)) for m, scorer in zip((plain, compiled), scorers, strict=True)
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-3)
    assert relative_error(b, {n: g.cpu().double() for n, g in a.items()}) < 1e-4


def test_draws_do_not_depend_on_the_batch():
    model = wide_model("llama", torch.float32).to(CUDA).eval()

    class Words:
        eos_token_id = 2

    prompts = [np.array(stream(i, "p").integers(3, 61, 5 + 3 * i), np.int32) for i in range(6)]
    keys = [("draw", i) for i in range(6)]
    found = [
        generate(model, Words(), prompts, keys=keys, seed=0, max_new_tokens=12, batch_size=size)
        for size in (6, 1)
    ]
    assert [a.ids.tolist() for a in found[0]] == [a.ids.tolist() for a in found[1]]


# ---------------------------------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    run_dir, _ = start(tmp_path_factory.mktemp("sft"), "loss.sft_on=all", "exp_name=sft", "device=cpu")
    return run_dir / "LATEST"


WORDS = (
    "loss=gr_dpo",
    "loss.beta=0.5",
    "weighting.step_size=0.5",
    "n_examples=64",
    "eval_every=32",
    "scoring.tolerance=1e-3",
    "model.policy_dtype=float32",
    "model.reference_dtype=float32",
)


def losses(run_dir: Path) -> list[float]:
    return [row["train/loss"] for row in lines(run_dir, "train")]


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_run_follows_the_cpu(tmp_path, sft, precision):
    words = (*WORDS, f"model.archive={sft}")
    there, _ = start(tmp_path / "gpu", *words, "device=cuda", f"precision={precision}")
    here, _ = start(tmp_path / "cpu", *words, "device=cpu")
    a, b = losses(there), losses(here)
    # the reference was scored in other batches, for which a GPU may take other kernels
    first = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 1e-2}[precision]
    assert len(a) > 2 and abs(a[0] - np.log(2)) < first and max(a) - min(a) > 1e-3
    assert a == pytest.approx(b, abs=1e-4 if precision == "fp32" else 2e-2)


def program(run_dir: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *SMALL, *WORDS, f"run_dir={run_dir}"]
    command += [f"cache_dir={run_dir}-cache", "device=cuda", *words]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"WANDB_MODE": "disabled"},
    )


def finished(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=150)
    assert process.returncode == 0, text[-3000:]
    return text


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(find(run_dir)[0].path / "model.safetensors")


def test_a_killed_run_continues_as_if_it_had_not_been(tmp_path, sft):
    words = (f"model.archive={sft}", "save_every=16", "precision=bf16", "n_examples=160", "eval_every=80")
    whole, again, killed = (tmp_path / n for n in ("whole", "again", "killed"))
    running = [program(whole, *words), program(again, *words), program(killed, *words)]
    until = time.monotonic() + 120
    while time.monotonic() < until and running[2].poll() is None and not list(killed.glob("step-32*")):
        time.sleep(0.01)
    running[2].send_signal(signal.SIGKILL)
    running[2].communicate()
    for process in running[:2]:
        finished(process)
    assert "all state is restored" in finished(program(killed, *words))
    assert losses(killed) == pytest.approx(losses(whole), abs=2e-2)
    first, second, third = map(weights, (whole, again, killed))
    if all(torch.equal(first[n], second[n]) for n in first):  # the kernels add up in one order here
        assert all(torch.equal(first[n], third[n]) for n in first)


@pytest.mark.parametrize(
    "more",
    [
        ("trainer=FSDPTrainer",),
        ("trainer=FSDPTrainer", "trainer.cpu_offload=true"),
        ("trainer=FSDPTrainer", "model.fsdp_policy_mp=bfloat16", "scoring.tolerance=0.3"),
        ("trainer=FSDPTrainer", "activation_checkpointing=true", "model.use_lora=true"),
        ("trainer=DDPTrainer",),
    ],
    ids=lambda m: " ".join(m).replace("trainer=", ""),
)
def test_one_rank_with_nccl_follows_the_plain_trainer(tmp_path, sft, more):
    words = (f"model.archive={sft}", *(m for m in more if "lora" in m))
    process = program(tmp_path / "ranks", f"model.archive={sft}", *more)
    plain, _ = start(tmp_path / "plain", *WORDS, *words, "device=cuda")
    finished(process)
    gap = 2e-2 if any("bfloat16" in m for m in more) else 1e-4
    assert losses(tmp_path / "ranks") == pytest.approx(losses(plain), abs=gap)


def test_four_bit_weights_with_lora(tmp_path, sft):
    pytest.importorskip("bitsandbytes")
    merged = tmp_path / "hf"
    merged.mkdir()
    for path in sft.resolve().iterdir():
        if path.suffix in (".json", ".safetensors", ".jinja", ".model"):
            (merged / path.name).write_bytes(path.read_bytes())
    words = (
        "model=gemma-2b",
        f"model.name_or_path={merged}",
        "model.quantization=nf4",
        "lr=1e-3",
        "precision=bf16",
    )
    run_dir, _ = start(
        tmp_path, *WORDS, *words, "device=cuda", "scoring.tolerance=0.3", "assert_sft_step=false"
    )
    found = losses(run_dir)
    assert abs(found[0] - np.log(2)) < 1e-3 and np.isfinite(found).all() and found[-1] != found[0]


def test_a_profile_of_the_benchmark_names_kernels(tmp_path):
    from benchmarks.worker import Process

    spec = {
        "workload": "hh",
        "contestant": "ours",
        "model": "tiny",
        "vocab": None,
        "rows": 4,
        "micro": 2,
        "steps": 2,
    }
    worker = Process(spec | {"threads": 1, "allocator": "keep", "device": "cuda"}, 120)
    assert np.isfinite(worker.ask("step", index=0)["loss"])
    worker.ask("profile", folder=str(tmp_path))
    worker.close()
    assert "CUDA" in (tmp_path / "ours.txt").read_text()
