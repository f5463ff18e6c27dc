"""Ranks: sharing work, agreeing, telling of a lost peer; models built in slices; the launcher's codes and signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import launch, models, parallel
from engine.launch import run_ranks
from engine.parallel import MainFailed, PeerLost, World, full_tensor
from engine.scoring import Scorer
from tests.faults.tools import TWO_RANKS, Child, finish, rank_environments, words
from utils import UserError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU, "none")


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_every_part_is_live_once_and_every_rank_has_as_many(size, count):
    parts = list(range(count))
    shares = [World(r, size, CPU, "fsdp").share(parts) for r in range(size)]
    assert len({len(s) for s in shares}) == 1
    assert sorted(part for share in shares for part, live in share if live) == parts


def test_alone_everything_is_local():
    assert ALONE.any(True)
    assert not ALONE.any(False)
    assert ALONE.gather([1, 2]) == [1, 2]
    assert ALONE.on_main(lambda: 7) == 7
    assert torch.equal(ALONE.to_main(torch.ones(2)), torch.ones(2))
    with pytest.raises(KeyError):
        ALONE.on_main(lambda: {}["missing"])


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("Timed out waiting 20000ms for recv operation to complete"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (UserError("timeout_s=-1: must be > 0"), False),
        (MainFailed("rank 0 failed: timed out"), False),
    ],
)
def test_only_a_failed_collective_means_a_lost_peer(error, lost):
    kind = PeerLost if lost else type(error)
    with pytest.raises(kind) as caught, World(1, 2, CPU, "ddp").watched(lambda: "step 5"):
        raise error
    assert (caught.value is error) == (not lost)
    if lost:
        assert str(caught.value).startswith("rank 1: peer lost at step 5: ")


def test_ranks_without_a_parallel_trainer_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="trainer=FSDPTrainer"):
        parallel.start("none", "cpu", 1.0)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(UserError, match="torchrun"):
        parallel.start("fsdp", "cpu", 1.0)


# ---------------------------------------------------------------------------------------------- two ranks


def ranks(folder: Path, body, count: int = 2) -> list[Child]:
    def main(rank: int):
        def run() -> None:
            world = parallel.start("ddp", "cpu", 30.0)
            with world.watched(lambda: "the test"):
                body(world)
            world.leave(None, None, None)

        return run

    made = [Child(main(r), folder / f"{r}.log", env) for r, env in enumerate(rank_environments(count))]
    for child in made:
        child.code = child.wait()
    return made


@pytest.mark.fault
def test_ranks_agree_and_leave_together(tmp_path):
    def body(world: World) -> None:
        assert world.any(world.rank == 1)
        assert not world.any(False)
        assert world.gather([world.rank, "x"]) == [0, "x", 1, "x"]
        assert world.broadcast({"rank": world.rank}) == {"rank": 0}
        assert world.on_main(lambda: world.rank + 10) == 10
        kept = world.to_main(torch.ones(3))
        assert kept.numel() == (3 if world.is_main else 0)
        used, unused = (torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.float64))
        if world.is_main:
            unused.grad = torch.ones_like(unused)
        used.grad = torch.full_like(used, world.rank + 1.0)
        world.sum_gradients([used, unused])
        assert used.grad.tolist() == [3.0, 3.0]
        assert unused.grad.tolist() == [1.0, 1.0]

    assert [c.code for c in ranks(tmp_path, body)] == [0, 0], (tmp_path / "0.log").read_text()


@pytest.mark.fault
def test_a_failure_of_rank_0_alone_ends_both(tmp_path):
    def body(world: World) -> None:
        world.on_main(lambda: Path("/nonexistent/file").read_text())

    first, second = ranks(tmp_path, body)
    assert (first.code, second.code) == (1, 1)
    assert "FileNotFoundError" in first.text
    assert "error: [rank 1] rank 0 failed: FileNotFoundError" in second.text


# ---------------------------------------------------------------------------------------------- models in slices


@pytest.fixture
def process_group():
    """One process that believes in ranks, so that parameters are sharded tensors."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A Hugging Face directory of a small Llama with tied embeddings, as several files."""
    spec = models.ModelSpec(
        name="small",
        lr=1e-3,
        config={"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 1, "intermediate_size": 32, "tie_word_embeddings": True},
        tokenizer_name_or_path="assets/tokenizer",
    )  # fmt: skip
    model = models.build_policy(spec, seed=0, device="cpu")
    model.save_pretrained(tmp_path / "hf", max_shard_size="8KB")
    models.load_tokenizer(spec).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize("output", ["logps", "reward"])
def test_a_model_filled_slice_by_slice_equals_one_built_whole(pretrained, process_group, output):
    spec = models.ModelSpec(name="small", lr=1e-3, name_or_path=str(pretrained))
    whole = models.build_policy(spec, output=output, seed=3, device="cpu")
    assert models.can_defer(spec, output)
    model = models.build_policy(spec, output=output, seed=3, device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers())
    scorer = Scorer(model, output=output)
    parallel.shard(scorer, block_name=None, param_dtype=None, device=CPU)
    parallel.materialize(scorer, CPU, CPU)
    models.fill(model, spec, archive=None, output=output, seed=3)
    expected = dict(whole.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(full_tensor(parameter), expected[name]), name
    if output == "logps":
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert models.weights_hash(model) == models.weights_hash(whole)


def test_what_cannot_be_deferred_is_built_whole(pretrained):
    seeded = models.ModelSpec(name="s", lr=1e-3, config={"model_type": "gpt2"}, tokenizer_name_or_path="x")
    lora = models.ModelSpec(name="l", lr=1e-3, name_or_path=str(pretrained), use_lora=True)
    assert not models.can_defer(seeded)
    assert not models.can_defer(lora)
    for path in pretrained.glob("*.safetensors*"):
        path.unlink()
    assert not models.can_defer(models.ModelSpec(name="s", lr=1e-3, name_or_path=str(pretrained)))


@pytest.mark.fault
@pytest.mark.parametrize("lora", [False, True])
def test_two_ranks_train_save_and_merge_what_one_process_does(tmp_path, pretrained, lora):
    more = ["model=tiny-llama", "model.config=null", f"model.name_or_path={pretrained}", "n_epochs=1"]
    more += [
        "model.tokenizer_name_or_path=null",
        "model.policy_dtype=float32",
        "model.reference_dtype=float32",
    ]
    more += ["model.use_lora=true", "model.lora_rank=2"] if lora else ["reference=cached"]
    own = [
        w
        for w in words(tmp_path / "x")
        if not w.startswith(("model", "run_dir", "reference_cache", "reference="))
    ]
    names = [*own, *more, "optimizer=SGD", f"cache_dir={tmp_path / 'cache'}"]
    finish([*names, f"run_dir={tmp_path / 'one'}"])
    finish([*names, f"run_dir={tmp_path / 'two'}", *TWO_RANKS, "activation_checkpointing=true"], ranks=2)
    file = "adapter_model.safetensors" if lora else "model.safetensors"
    pairs = [("LATEST", file)] + ([("merged", "model.safetensors")] if lora else [])
    for folder, name in pairs:
        one, two = (load_file(tmp_path / run / folder / name) for run in ("one", "two"))
        assert one.keys() == two.keys()
        assert all(torch.isfinite(v).all() for v in one.values())
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the launcher

PREAMBLE = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from engine.launch import record_failure
rank = int(os.environ["RANK"])
class PeerLost(RuntimeError): pass
"""


def script(text: str) -> list[str]:
    return [sys.executable, "-c", PREAMBLE + text]


def test_the_rank_that_failed_by_itself_is_the_cause(capfd):
    body = """
error = PeerLost("peer lost at step 3") if rank == 0 else ValueError("train:7: no good")
time.sleep(0.0 if rank == 0 else 0.5)
record_failure(error)
sys.exit(1 if rank == 0 else 2)
"""
    assert run_ranks(script(body), 2, 10.0) == 2
    assert "error: rank 1: ValueError: train:7: no good (exit code 2)" in capfd.readouterr().err


def test_success_and_death_by_signal_come_through(capfd):
    assert run_ranks(script("sys.exit(0)"), 3, 10.0) == 0
    assert capfd.readouterr().err == ""
    assert (
        run_ranks(script("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(0.2)"), 2, 10.0)
        == 137
    )
    assert "error: rank 1: killed by SIGKILL (exit code 137)" in capfd.readouterr().err


def test_a_rank_that_does_not_end_is_killed(capfd, tmp_path):
    body = f"""
open({str(tmp_path)!r} + "/" + str(rank), "w").write(str(os.getpid()))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1: time.sleep(600)
time.sleep(1.0)
record_failure(PeerLost("peer lost at step 3"))
sys.exit(1)
"""
    assert run_ranks(script(body), 2, 0.5) == 1
    assert "error: rank 0: PeerLost: peer lost at step 3" in capfd.readouterr().err
    assert not Path(f"/proc/{(tmp_path / '1').read_text()}").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_to_every_rank_and_their_code_comes_back(tmp_path, number, capfd):
    body = f"""
def stop(n, frame): open({str(tmp_path)!r} + f"/got{{rank}}", "w").write(""); os._exit(128 + n)
signal.signal({int(number)}, stop)
open({str(tmp_path)!r} + f"/up{{rank}}", "w").write("")
time.sleep(600)
"""

    def send() -> None:
        while not all((tmp_path / f"up{r}").exists() for r in (0, 1)):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    assert run_ranks(script(body), 2, 20.0) == 128 + number
    assert all((tmp_path / f"got{r}").exists() for r in (0, 1))
    assert "error" not in capfd.readouterr().err


def test_a_failure_is_recorded_where_torchrun_looks(tmp_path, monkeypatch):
    import json

    launch.record_failure(ValueError("nowhere to write: fine"))
    monkeypatch.setenv(launch.ERROR_FILE, str(tmp_path / "error.json"))
    launch.record_failure(ValueError("bad"))
    found = json.loads((tmp_path / "error.json").read_text())
    assert found["message"]["message"] == "ValueError: bad"
    assert found["message"]["extraInfo"]["timestamp"].isdigit()
