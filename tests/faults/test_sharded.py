"""Checkpoints in slices: the same promises as whole ones, and no code from them."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import checkpoint, sharded
from engine.checkpoint import SHARD_INDEX, SHARDS, Checkpoint, CheckpointError, find, open_checkpoint
from tests.faults.test_resume import numbers
from tests.faults.tools import TWO_RANKS, at_step, difference, finish, kill, start, words

pytestmark = pytest.mark.fault
SHARDED = ("checkpoint.format=sharded",)
TWO = (*TWO_RANKS, *SHARDED)
ONE = ("trainer=FSDPTrainer", "trainer.nproc=1", *SHARDED)
ONE_ENV = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.fixture(scope="session")
def sliced(tmp_path_factory) -> Path:
    """A finished run of two ranks that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("sliced") / "run"
    finish(words(run_dir, *TWO), ranks=2)
    return run_dir


def contents(source: Checkpoint) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint's shards."""
    into = {n: torch.empty(h.size, dtype=h.properties.dtype) for n, h in sharded._tensors(source).items()}
    sharded._load(source, into)
    return into


def gap(one: Path, other: Path) -> list[str]:
    """Where two finished runs differ, their shards' tensors included."""
    a, b = contents(find(one)[0]), contents(find(other)[0])
    found = [f"{k}" for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])]
    return found + difference(one, other, files=())


# ---------------------------------------------------------------------------------------------------- the same


def test_shards_hold_what_a_whole_checkpoint_holds(sliced, undisturbed_ranks):
    found = contents(find(sliced)[0])
    whole = find(undisturbed_ranks)[0]
    expected = {f"model.{k}": v for k, v in load_file(whole.path / "model.safetensors").items()}
    assert expected.keys() <= found.keys()
    expected |= whole.optimizer()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert difference(sliced, undisturbed_ranks, files=()) == []
    newest = find(sliced)[0]
    assert {SHARD_INDEX, f"{SHARDS}/__0_0.distcp", f"{SHARDS}/__1_0.distcp"} <= newest.files
    assert not list(newest.path.glob("**/*.safetensors"))


def test_the_finished_run_is_an_ordinary_model_too(sliced, undisturbed_ranks):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made, whole = sliced / "model-step-20", find(undisturbed_ranks)[0].path
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (made, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert {p.name for p in made.iterdir()} == {p.name for p in whole.iterdir()} - {
        "training",
        "manifest.json",
    }
    assert (made / "config.json").read_text() == (whole / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(made)
    AutoTokenizer.from_pretrained(made)
    assert torch.equal(model.transformer.wte.weight, ours["transformer.wte.weight"])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_run_or_its_checkpoint_is_found_as_an_archive(sliced, tmp_path):
    from engine import archives
    from utils import UserError

    for archive in (sliced, sliced / "LATEST", sliced / "step-20"):
        assert archives.find(str(archive)) == sliced / "model-step-20"
    with pytest.raises(UserError, match=r"python -m commands.consolidate \S+step-18"):
        archives.find(str(sliced / "step-18"))


def test_the_command_makes_a_model_in_several_files(sliced, tmp_path, monkeypatch):
    shutil.copytree(sliced / "step-18", tmp_path / "step-18")
    monkeypatch.setattr(sharded, "FILE_BYTES", 20_000)
    from commands.consolidate import main

    (made,) = main([str(tmp_path / "step-18")])
    files = sorted(made.glob("model-0000*.safetensors"))
    assert made == tmp_path / "model-step-18" and len(files) > 2
    found = {k: v for path in files for k, v in load_file(path).items()}
    expected = contents(open_checkpoint(tmp_path / "step-18"))
    assert found.keys() == {k.removeprefix("model.") for k in expected if "//" not in k}
    assert all(torch.equal(found[k], expected[f"model.{k}"]) for k in found)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(made)
    assert torch.equal(model.transformer.wte.weight, found["transformer.wte.weight"])
    assert main([str(tmp_path / "step-18")]) == [made]  # again: nothing to do


# ---------------------------------------------------------------------------------------------------- continuing


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_the_same_ranks_continue_bit_equal(tmp_path, sliced, step):
    run_dir = tmp_path / "run"
    children = start(
        words(run_dir, *TWO), ranks=2, patch=lambda rank: at_step(step + 1, kill(signal.SIGKILL))()
    )
    assert {child.wait() for child in children} <= {-signal.SIGKILL, 1}
    assert find(run_dir)[0].is_sharded
    children = finish(words(run_dir, *TWO), ranks=2)
    assert "(bit-exact)" in children[0].text
    assert gap(run_dir, sliced) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param("two", "one", id="2 to 1"),
        pytest.param("one", "two", id="1 to 2"),
        pytest.param("two", "whole", id="2 shards to 1 process", marks=pytest.mark.slow),
    ],
)
def test_other_ranks_continue_to_rounding(tmp_path, sliced, before, after):
    ways = {"two": (TWO, 2, {}), "one": (ONE, 1, ONE_ENV), "whole": ((), 1, {})}
    run_dir = tmp_path / "run"
    more, ranks, env = ways[before]
    death = start(
        words(run_dir, *more), ranks=ranks, env=env, patch=lambda rank: at_step(4, kill(signal.SIGKILL))()
    )
    assert {child.wait() for child in death} <= {-signal.SIGKILL, 1}
    assert find(run_dir)[0].is_sharded
    more, ranks, env = ways[after]
    children = finish(words(run_dir, *more), ranks=ranks, env=env)
    assert "not bit-exact, equal to rounding: " in children[0].text
    for one, other in zip(numbers(run_dir), numbers(sliced), strict=True):
        assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.slow
def test_the_best_is_restored_from_shards(tmp_path):
    best = (
        "stopping=plateau",
        "stopping.patience=5",
        "stopping.mode=max",
    )  # the last evaluation is not the best
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    finish(words(whole, *TWO_RANKS, *best), ranks=2)
    finish(words(run_dir, *TWO, *best), ranks=2)
    assert '"restored_from": 18' in (run_dir / "metrics.jsonl").read_text()
    ours, theirs = (
        load_file(run_dir / "model-step-20/model.safetensors"),
        load_file(whole / "LATEST/model.safetensors"),
    )
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert difference(run_dir, whole, files=()) == []


# ---------------------------------------------------------------------------------------------------- kills


@pytest.mark.parametrize(
    ("point", "victim"),
    [
        pytest.param(
            p, v, marks=() if (p, v) in (("save.shards", 1), ("save.sealed", 0)) else pytest.mark.slow
        )
        for p in sharded.CRASH_POINTS
        for v in ((0, 1) if p == "save.shards" else (0,))
    ],
)
def test_a_kill_at_any_point_of_a_save_loses_at_most_that_save(tmp_path, sliced, point, victim):
    run_dir = tmp_path / "run"
    hit = {"save.shards": 2, "save.prune": 1}.get(
        point, 3
    )  # the rehearsal at the start passes the others once
    children = start(
        words(run_dir, *TWO),
        ranks=2,
        patch=lambda rank: os.environ.update({"CRASH_AT": f"{point}:{hit}"} if rank == victim else {}),
    )
    assert [children[victim].wait(), children[1 - victim].wait()] == [-signal.SIGKILL, 1]
    assert re.search(r"peer lost at step \d", children[1 - victim].text)
    saved = [c.examples for c in find(run_dir)]
    assert saved[0] == 10 if point == "save.prune" else saved[0] in (8, 4)
    finish(words(run_dir, *TWO), ranks=2)
    assert gap(run_dir, sliced) == []
    assert not list(run_dir.glob(".tmp-*"))


def inside_write(number: int, action) -> None:
    """Do ``action`` when half of this rank's slices of the ``number``-th save are written."""
    from torch.distributed.checkpoint import filesystem

    write_item, saves, items = filesystem._write_item, [0], [0]
    write = sharded.write

    def counted(*args):
        saves[0], items[0] = saves[0] + 1, 0
        return write(*args)

    def half(*args, **kwargs):
        items[0] += 1
        if saves[0] == number and items[0] == 10:
            action()
        return write_item(*args, **kwargs)

    sharded.write, filesystem._write_item = counted, half


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_kill_inside_a_shard_loses_that_save(tmp_path, sliced, victim):
    run_dir = tmp_path / "run"
    dies = lambda rank: inside_write(2, kill(signal.SIGKILL)) if rank == victim else None  # noqa: E731
    children = start(words(run_dir, *TWO), ranks=2, patch=dies)
    assert [children[victim].wait(), children[1 - victim].wait()] == [-signal.SIGKILL, 1]
    assert [c.examples for c in find(run_dir)] == [4]
    finish(words(run_dir, *TWO), ranks=2)
    assert gap(run_dir, sliced) == []


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_full_disk_on_one_rank_ends_all_and_costs_one_save(tmp_path, sliced, victim):
    run_dir = tmp_path / "run"

    def full() -> None:
        raise OSError(28, "No space left on device")

    fails = lambda rank: inside_write(2, full) if rank == victim else None  # noqa: E731
    children = start(words(run_dir, *TWO), ranks=2, patch=fails)
    assert [child.wait() for child in children] == [1, 1]
    for child in children:
        assert (
            f"step-8: could not save (rank {victim}: OSError: [Errno 28] No space left on device"
            in child.text
        )
    assert [c.examples for c in find(run_dir)] == [4]
    assert not list(run_dir.glob(".tmp-*"))
    finish(words(run_dir, *TWO), ranks=2)
    assert gap(run_dir, sliced) == []


# ---------------------------------------------------------------------------------------------------- damage, hostility


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_shard_or_index_is_named_and_the_older_checkpoint_is_used(sliced, tmp_path, name, how):
    shutil.copytree(sliced, tmp_path / "run", symlinks=True)
    path = tmp_path / "run" / "step-20" / SHARDS / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink() if how == "delete" else path.write_bytes(data if how == "flip" else data[:-1])
    assert [c.examples for c in find(tmp_path / "run")] == [18]
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_checkpoint(path.parents[2])


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def reseal(folder: Path) -> None:
    """Give a changed checkpoint a manifest that agrees with it, as whoever made it could."""
    import json

    from utils import content_hash

    body = json.loads((folder / "manifest.json").read_text())
    body.pop("manifest_sha256")
    body["files"] = {
        str(p.relative_to(folder)): checkpoint.describe(p)
        for p in folder.rglob("*")
        if p.is_file() and p.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({**body, "manifest_sha256": content_hash(body)}))


def plant(folder: Path, what: str, proof: Path) -> None:
    """Code that runs when plain pickle reads the folder."""
    index = folder / SHARD_INDEX
    if what == "index":
        index.write_bytes(pickle.dumps(Hostile(proof)))
        return
    with index.open("rb") as handle:
        found = pickle.load(handle)  # noqa: S301 - our own
    name = next(iter(found.state_dict_metadata))
    if what == "object":  # DCP reads objects with weights_only=False
        found.state_dict_metadata[name] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()
    torch.save(Hostile(proof), folder / SHARDS / "__0_0.distcp")
    size = (folder / SHARDS / "__0_0.distcp").stat().st_size
    for key, info in found.storage_data.items():
        found.storage_data[key] = type(info)("__0_0.distcp", 0, size)
    index.write_bytes(pickle.dumps(found))


@pytest.mark.parametrize("what", ["index", "object", "tensor"])
@pytest.mark.parametrize("sealed", [False, True], ids=["tampered", "made so"])
def test_a_hostile_checkpoint_runs_no_code(sliced, tmp_path, what, sealed):
    source, proof = tmp_path / "given" / "step-20", tmp_path / "code ran"
    shutil.copytree(sliced / "step-20", source)
    plant(source, what, proof)
    if sealed:
        reseal(source)
    children = start(words(tmp_path / "run", *TWO, f"resume_from={source}"), ranks=2)
    codes = [child.wait() for child in children]
    assert all(codes) and codes[0] == 2, children[0].text
    told = {"index": "refused \\(names \\w+.mkdir", "object": "refused \\(names .*BytesStorageMetadata"}
    said = told.get(what, "cannot be read .*Weights only load failed") if sealed else "manifest"
    assert re.search(said, children[0].text), children[0].text
    assert not proof.exists()
    if what == "index":  # the trap works
        with (source / SHARD_INDEX).open("rb") as handle:
            pickle.load(handle)  # noqa: S301
        assert proof.exists()


def test_an_index_cannot_lead_out_of_the_checkpoint(sliced, tmp_path):
    folder = tmp_path / "step-20"
    shutil.copytree(sliced / "step-20", folder)
    with (folder / SHARD_INDEX).open("rb") as handle:
        found = pickle.load(handle)  # noqa: S301 - our own
    for key, info in found.storage_data.items():
        found.storage_data[key] = type(info)("../../../elsewhere", info.offset, info.length)
    (folder / SHARD_INDEX).write_bytes(pickle.dumps(found))
    reseal(folder)
    with pytest.raises(CheckpointError, match="elsewhere, which is not in the manifest"):
        sharded._tensors(open_checkpoint(folder))


def test_another_model_is_refused_by_name(sliced):
    source = find(sliced)[0]
    parameters = {k: v for k, v in contents(source).items() if "//" not in k}
    name = next(iter(parameters))
    with pytest.raises(CheckpointError, match=f"first difference: {name} is"):
        sharded.read_model(source, {**parameters, name: parameters[name][1:]})
    with pytest.raises(CheckpointError, match="first difference: extra is absent there"):
        sharded.read_model(source, {**parameters, "extra": parameters[name]})


# ---------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("trainer=BasicTrainer trainer.nproc=null", "there are no shards"),
        ("trainer=DDPTrainer", "there are no shards"),
        ("model.use_lora=true", "an adapter is small"),
    ],
)
def test_where_it_makes_no_sense_it_is_refused(tmp_path, word, message):
    from config.compose import compose
    from utils import UserError

    with pytest.raises(UserError, match=message):
        compose(list(words(tmp_path / "run", *TWO, *word.split())))
