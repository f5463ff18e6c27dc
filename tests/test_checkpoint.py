"""Checkpoints: killed, cut, flipped and out of space at every point, and bit-equal afterwards."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
import signal
import struct
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import checkpoint
from engine.checkpoint import (
    CRASH_POINT_REPLACE,
    CRASH_POINTS,
    CheckpointError,
    choose,
    clean,
    compare_facts,
    find,
    open_checkpoint,
    prune,
    save,
)
from engine.optim import build_optimizer, optimizer_tensors, optimizers, restore_optimizer
from utils import UserError, log, stream

FACTS = {"data_fingerprint": "d0", "world_size": 1, "versions": {"torch": "2"}}


@pytest.fixture
def logged():
    """Lines logged during the test (whatever other tests did to the logger's handlers)."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process():
    checkpoint._verified.clear()


def model_and_optimizer(name: str = "AdamW", **options) -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
    """A 3x2 matrix with fixed weights (Muon takes matrices only)."""
    model = torch.nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.05, 0.7, -0.4]]))
    return model, build_optimizer(name, model.parameters(), lr=0.01, options=options)


def train(model: torch.nn.Linear, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.from_numpy(stream(0, "test data", step).normal(size=(4, 3)).astype(np.float32))
        optimizer.zero_grad()
        (model(x) ** 3).sum().backward()
        optimizer.step()


def save_all(run_dir: Path, examples: int, optimizer: torch.optim.Optimizer, named: dict, **options) -> Path:
    tensors, meta = optimizer_tensors(optimizer, named.items())
    state = {"step": examples // 8, "examples": examples, "optimizer": meta}
    arguments = {"write_model": lambda folder: None, "optimizer": tensors, "state": state, "facts": FACTS}
    return save(run_dir, examples, **{**arguments, **options})


def restore(run_dir: Path, optimizer: torch.optim.Optimizer, named: dict) -> None:
    found = find(run_dir)[0]
    restore_optimizer(optimizer, named.items(), found.optimizer(), found.state["optimizer"])


def save_at(run_dir: Path, examples: int, *, payload: bytes = b"weights", **options) -> Path:
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    options.setdefault(
        "write_model", lambda folder: (folder / "model.safetensors").write_bytes(payload) and None
    )
    return save_all(run_dir, examples, optimizer, dict(model.named_parameters()), **options)


def in_child(body: Callable[[], None]) -> int:
    """Run ``body`` in a forked copy of this process; its exit code, negative for a signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # python 3.12 warns about forking beside threads; ours are idle
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            body()
            code = 0
        except BaseException:  # noqa: BLE001 - a forked child must never return into pytest
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def counts(run_dir: Path) -> list[int]:
    return [c.examples for c in find(run_dir)]


# ------------------------------------------------------------------------------------------------- layout


def test_a_checkpoint_holds_what_was_saved_and_latest_points_at_it(tmp_path):
    path = save_at(tmp_path, 8, payload=b"abc")
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == [
        "manifest.json",
        "model.safetensors",
        "training/optimizer.safetensors",
        "training/state.json",
    ]
    found = find(tmp_path)[0]
    assert (found.step, found.examples, found.facts) == (1, 8, FACTS)
    assert (tmp_path / "LATEST" / "model.safetensors").read_bytes() == b"abc"
    assert open_checkpoint(tmp_path / "LATEST").path == path.resolve()
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["bytes"] == 3
    assert manifest["format"] == 1


def test_floats_come_back_bit_equal(tmp_path):
    bits = stream(0, "float bits").integers(0, 2**63, size=2000, dtype=np.int64)
    floats = [f for f in struct.unpack("2000d", bits.tobytes()) if f == f] + [0.1, 5e-324, -0.0, float("inf")]
    save_at(tmp_path, 8, state={"step": 1, "examples": 8, "alpha": floats})
    back = find(tmp_path)[0].state["alpha"]
    assert [struct.pack("d", f) for f in back] == [struct.pack("d", f) for f in floats]


def test_state_that_json_would_change_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"state.groups\[1\]: key 3 is not a string"):
        save_at(tmp_path, 8, state={"step": 1, "examples": 8, "groups": [{}, {3: 1.0}]})
    with pytest.raises(ValueError, match="state says 9 examples"):
        save_at(tmp_path, 8, state={"step": 1, "examples": 9})


# -------------------------------------------------------------------------------------------------- kills


@pytest.mark.fault
@pytest.mark.parametrize("point", CRASH_POINTS)
def test_a_kill_at_any_point_leaves_this_or_the_last_checkpoint(tmp_path, point, monkeypatch):
    save_at(tmp_path, 8)
    save_at(tmp_path, 16)
    monkeypatch.setenv("CRASH_AT", point)
    assert in_child(lambda: save_at(tmp_path, 24, payload=b"new")) == -signal.SIGKILL
    monkeypatch.delenv("CRASH_AT")
    committed = CRASH_POINTS.index(point) >= CRASH_POINTS.index("save.renamed")
    assert counts(tmp_path)[0] == (24 if committed else 16)
    clean(tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))
    assert counts(tmp_path)[0] == (24 if committed else 16)
    save_at(tmp_path, 24, payload=b"again")
    assert counts(tmp_path) == [24, 16]
    assert (tmp_path / "LATEST" / "model.safetensors").read_bytes() == b"again"


@pytest.mark.fault
@pytest.mark.parametrize("point", [*CRASH_POINTS, CRASH_POINT_REPLACE])
def test_saving_the_same_count_again_never_leaves_a_window_with_none(tmp_path, point, monkeypatch):
    save_at(tmp_path, 8, payload=b"old")
    monkeypatch.setenv("CRASH_AT", point)
    assert in_child(lambda: save_at(tmp_path, 8, payload=b"new")) == -signal.SIGKILL
    monkeypatch.delenv("CRASH_AT")
    assert counts(tmp_path) == [8]
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-8"]
    committed = point in CRASH_POINTS[CRASH_POINTS.index("save.renamed") :]
    assert (tmp_path / "step-8" / "model.safetensors").read_bytes() == (b"new" if committed else b"old")
    save_at(tmp_path, 8, payload=b"third")
    assert (find(tmp_path)[0].path / "model.safetensors").read_bytes() == b"third"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-8"]


@pytest.mark.fault
def test_the_second_hit_of_a_crash_point_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CRASH_AT", "save.state:2")
    assert in_child(lambda: (save_at(tmp_path, 8), save_at(tmp_path, 16))) == -signal.SIGKILL
    assert counts(tmp_path) == [8]


@pytest.mark.fault
def test_a_set_aside_checkpoint_survives_damage_to_its_replacement(tmp_path, monkeypatch):
    save_at(tmp_path, 8, payload=b"old")
    monkeypatch.setenv("CRASH_AT", "save.renamed")
    assert in_child(lambda: save_at(tmp_path, 8, payload=b"new")) == -signal.SIGKILL
    monkeypatch.delenv("CRASH_AT")
    (tmp_path / "step-8" / "model.safetensors").write_bytes(b"bad")
    clean(tmp_path)
    assert (find(tmp_path)[0].path / "model.safetensors").read_bytes() == b"old"
    save_at(tmp_path, 8, payload=b"third")
    assert (tmp_path / "step-8" / "model.safetensors").read_bytes() == b"third"
    assert not (tmp_path / "step-8.old").exists()


# ------------------------------------------------------------------------------------------------- damage


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flip": flip_bit,
    "truncate": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "delete": Path.unlink,
}


@pytest.mark.fault
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["manifest.json", "model.safetensors", "training/optimizer.safetensors", "training/state.json"]
)
def test_a_damaged_file_is_named_and_the_next_older_checkpoint_is_used(tmp_path, name, damage, logged):
    save_at(tmp_path, 8)
    newest = save_at(tmp_path, 16)
    checkpoint._verified.clear()
    DAMAGE[damage](newest / name)
    assert choose(tmp_path).examples == 8
    assert any(str(newest / name) in line and "damaged" in line for line in logged)
    with pytest.raises(UserError, match=r"resume_from=.*intact"):
        choose(tmp_path / "elsewhere", resume_from=newest)


def test_no_flipped_bit_of_the_manifest_changes_what_is_read(tmp_path):
    path = save_at(tmp_path, 8) / "manifest.json"
    good = path.read_bytes()
    was = open_checkpoint(path.parent)
    detected = 0
    for bit in stream(0, "bits").choice(len(good) * 8, size=400, replace=False):
        data = bytearray(good)
        data[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(data)
        try:
            now = open_checkpoint(path.parent)
        except CheckpointError:
            detected += 1
        else:  # only a flip that JSON reads as the same text may pass
            assert (now.step, now.examples, now.facts) == (was.step, was.examples, was.facts)
    assert detected >= 398


def test_a_renamed_checkpoint_is_not_taken_for_another_count(tmp_path, logged):
    save_at(tmp_path, 8).rename(tmp_path / "step-99")
    assert find(tmp_path) == []
    assert any("says 8 examples" in line for line in logged)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    path = save_at(tmp_path, 8)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(CheckpointError, match="format 2, this program reads 1"):
        open_checkpoint(path)


# ----------------------------------------------------------------------------------------------- failures


def assert_failed_safely(run_dir: Path, error: BaseException) -> None:
    assert str(run_dir / "step-16") in str(error)
    assert f"{shutil.disk_usage(run_dir).free // 10**9}" in str(error)  # some bytes may have moved meanwhile
    assert "bytes free" in str(error)
    assert counts(run_dir) == [8]
    assert not list(run_dir.glob(".tmp-*"))


@pytest.mark.fault
@pytest.mark.parametrize("limit", [100, 4000])
def test_a_full_disk_raises_and_keeps_the_last_checkpoint(tmp_path, limit):
    """100 bytes: the optimizer does not fit; 4000: the model does not."""
    save_at(tmp_path, 8)

    def body() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError) as caught:
            save_at(tmp_path, 16, payload=b"x" * (50 if limit == 100 else 8000))
        assert_failed_safely(tmp_path, caught.value)

    assert in_child(body) == 0


@pytest.mark.fault
def test_a_failing_fsync_raises_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save_at(tmp_path, 8)

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        save_at(tmp_path, 16)
    assert_failed_safely(tmp_path, caught.value)


@pytest.mark.fault
def test_permission_denied_raises_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save_at(tmp_path, 8)

    def denied(self: Path, *args, **kwargs) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        save_at(tmp_path, 16)
    assert_failed_safely(tmp_path, caught.value)


def test_a_model_that_cannot_be_written_raises_and_keeps_the_last_checkpoint(tmp_path):
    save_at(tmp_path, 8)

    def broken(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("tied weights")

    with pytest.raises(CheckpointError, match="RuntimeError: tied weights") as caught:
        save_at(tmp_path, 16, write_model=broken)
    assert_failed_safely(tmp_path, caught.value)


def test_a_rehearsal_leaves_nothing_and_needs_what_a_save_needs(tmp_path, monkeypatch):
    save_at(tmp_path, 8)
    before = sorted(tmp_path.rglob("*"))
    checkpoint.rehearse(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "mkdir"), (checkpoint, "_verify_file")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, raising)
            with pytest.raises(CheckpointError, match="no such thing here"):
                checkpoint.rehearse(tmp_path)
        assert sorted(tmp_path.rglob("*")) == before


def raising(*args, **kwargs) -> None:
    raise OSError(errno.ENOSYS, "no such thing here")


def test_short_space_is_warned_about(tmp_path, logged, monkeypatch):
    parameters = [torch.nn.Parameter(torch.zeros(10)), torch.zeros(10)]
    assert checkpoint.estimate_bytes(parameters, slots=2) == 40 * 3 + 40
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 249)
    assert checkpoint.warn_if_space_short(tmp_path, 100)
    assert "free" in logged[0]
    assert not checkpoint.warn_if_space_short(tmp_path, 99)


# ------------------------------------------------------------------------------------------------ keeping


def test_pruning_keeps_the_newest_the_best_and_those_asked_for(tmp_path):
    for examples in (8, 16, 24, 32, 40):
        save_at(tmp_path, examples, keep=None)
    prune(tmp_path, keep=1, best=16, also_keep=[8])
    assert counts(tmp_path) == [40, 32, 16, 8]
    save_at(tmp_path, 48, best=16)
    assert counts(tmp_path) == [48, 40, 16]


@pytest.mark.fault
def test_pruning_counts_only_valid_checkpoints(tmp_path, logged):
    save_at(tmp_path, 8)
    flip_bit(save_at(tmp_path, 16) / "model.safetensors")
    os.utime(tmp_path / "step-16" / "model.safetensors", ns=(1, 1))
    save_at(tmp_path, 24)
    assert counts(tmp_path) == [24, 8]
    assert (tmp_path / "step-16").exists()  # evidence, and perhaps rescued by hand
    assert any("step-16" in line for line in logged)


# ------------------------------------------------------------------------------------------------ choosing


def test_the_run_directory_comes_before_resume_from(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    assert choose(here) is None
    save_at(there, 80)
    assert choose(here, resume_from=there / "step-80").examples == 80
    assert choose(here, resume_from=there).examples == 80
    save_at(here, 8)
    assert choose(here, resume_from=there).examples == 8


def test_must_and_never_are_kept(tmp_path):
    with pytest.raises(UserError, match=r"resume=must: .*no valid checkpoint"):
        choose(tmp_path, resume="must")
    assert choose(tmp_path, resume="never") is None
    path = save_at(tmp_path, 8)
    with pytest.raises(UserError, match=r"resume=never: .*fresh=true"):
        choose(tmp_path, resume="never")
    with pytest.raises(UserError, match="must be auto, must or never"):
        choose(tmp_path, resume="maybe")
    (path / "manifest.json").write_bytes(b"")
    with pytest.raises(UserError, match="resume=must"):
        choose(tmp_path, resume="must")
    assert choose(tmp_path, resume="auto") is None


def test_facts_say_which_promise_applies():
    assert compare_facts(FACTS, {**FACTS, "config_hash": "x"}) == []
    now = {**FACTS, "world_size": 2, "versions": {"torch": "3"}}
    assert compare_facts(FACTS, now) == ["versions.torch: 2 -> 3", "world_size: 1 -> 2"]
    changed = {**FACTS, "data_fingerprint": "d1"}
    with pytest.raises(UserError, match=r"the data changed .*d0 -> d1.*resume_allow=\[data\]"):
        compare_facts(FACTS, changed)
    assert compare_facts(FACTS, changed, allow=["data"]) == ["data_fingerprint: d0 -> d1"]


# -------------------------------------------------------------------------------------------- optimizer state


@pytest.mark.parametrize("name", sorted(optimizers()))
def test_every_optimizer_continues_bit_equal(tmp_path, name):
    options = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5, "centered": True}}.get(name, {})
    model, optimizer = model_and_optimizer(name, **options)
    train(model, optimizer, range(3))
    weights = model.weight.detach().clone()
    save_all(tmp_path, 24, optimizer, {"w": model.weight})
    train(model, optimizer, range(3, 6))

    def continued(restored: bool) -> torch.Tensor:
        again, fresh = model_and_optimizer(name, **options)
        with torch.no_grad():
            again.weight.copy_(weights)
        if restored:
            restore(tmp_path, fresh, {"w": again.weight})
        train(again, fresh, range(3, 6))
        return again.weight

    assert torch.equal(continued(restored=True), model.weight)
    assert not torch.equal(continued(restored=False), model.weight)  # the state matters, so it was restored


def test_restoring_casts_nothing_and_keeps_the_configured_rates(tmp_path):
    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(1))
    optimizer.state[model.weight]["exp_avg"] = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    save_all(tmp_path, 8, optimizer, {"w": model.weight})
    again = torch.nn.Linear(3, 2, bias=False)
    fresh = build_optimizer("AdamW", again.parameters(), lr=0.5, weight_decay=0.25)
    restore(tmp_path, fresh, {"w": again.weight})
    moment = fresh.state[again.weight]["exp_avg"]
    assert moment.dtype == torch.float64
    assert torch.equal(moment, torch.full((2, 3), 1 / 3, dtype=torch.float64))
    assert (fresh.param_groups[0]["lr"], fresh.param_groups[0]["weight_decay"]) == (0.5, 0.25)


def test_state_of_another_optimizer_or_model_is_refused(tmp_path):
    save_at(tmp_path, 8)
    model, optimizer = model_and_optimizer("RMSprop")
    with pytest.raises(ValueError, match="optimizer=RMSprop: the checkpoint holds AdamW"):
        restore(tmp_path, optimizer, {"weight": model.weight})
    model, optimizer = model_and_optimizer()
    with pytest.raises(ValueError, match=r"parameters differ.*other"):
        restore(tmp_path, optimizer, {"other": model.weight})
    with pytest.raises(ValueError, match="without a name"):
        restore(tmp_path, optimizer, {})


# ------------------------------------------------------------------------------------------------- two ranks


def _sharded_rank(rank: int, port: int, run_dir: str) -> None:
    """Train, save, restore and train on under FSDP2."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from engine.parallel import full_tensor

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def fresh():
        model, _ = model_and_optimizer()
        fully_shard(model, mesh=mesh)
        return model, build_optimizer("AdamW", model.parameters(), lr=0.01)

    model, optimizer = fresh()
    train(model, optimizer, range(3))
    weights = full_tensor(model.weight).clone()
    tensors, meta = optimizer_tensors(optimizer, model.named_parameters(), gather=full_tensor)
    if rank == 0:
        state = {"step": 3, "examples": 24, "optimizer": meta}
        save(Path(run_dir), 24, write_model=lambda folder: None, optimizer=tensors, state=state, facts=FACTS)
    dist.barrier()
    train(model, optimizer, range(3, 6))
    again, restored = fresh()
    with torch.no_grad():
        again.weight.copy_(checkpoint.place(weights, again.weight))
    restore(Path(run_dir), restored, dict(again.named_parameters()))
    train(again, restored, range(3, 6))
    assert torch.equal(full_tensor(again.weight), full_tensor(model.weight))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.fault
def test_two_sharded_ranks_continue_bit_equal(tmp_path):
    from tests.faults.tools import free_port

    torch.multiprocessing.spawn(_sharded_rank, args=(free_port(), str(tmp_path)), nprocs=2)
    # one process reads what two wrote
    model, optimizer = model_and_optimizer()
    restore(tmp_path, optimizer, {"weight": model.weight})
    assert optimizer.state[model.weight]["exp_avg"].shape == (2, 3)
