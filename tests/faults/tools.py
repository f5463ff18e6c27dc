"""Whole runs of a very small model in forked children: imports are paid once, by the process that runs the tests."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import itertools
import json
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

import train
from assembly import run_training
from config.compose import compose
from engine import faults
from engine.checkpoint import find
from engine.scoring import Scorer
from trainers import Trainer
from utils import setup_logging

WORDS = (
    "model=tiny-gpt2",
    "model.config.n_embd=16",
    "model.config.n_layer=1",
    "model.config.n_head=2",
    "datasets=[opinions]",
    "data.opinions.num_train=10",
    "data.opinions.num_validation=5",
    "data.opinions.num_test=5",
    "loss=gr_dpo",
    "loss.beta=0.3",
    "weighting.step_size=0.5",
    "assert_sft_step=false",
    "reference=live",
    "lr=0.01",
    "batch_size=4",
    "n_epochs=2",
    "eval_every=8",
    "save_every=2",
    "eval_splits=[validation]",
    "scoring.verify=false",
    "num_threads=1",
    "wandb.enabled=false",
)  # six steps (4, 4, 2 rows an epoch), a checkpoint after each, evaluations after steps 2, 5 (mid-epoch) and 6
TWO_RANKS = ("trainer=FSDPTrainer", "trainer.nproc=2", "trainer.timeout_s=60")
_ports = itertools.count()
STUCK_S = 50.0  # below every patience of `Child.wait`
TIMES = ("time", "examples_per_second")


@cache
def composed(words: tuple[str, ...]):
    return compose(list(words))


def words(run_dir: Path, *more: str) -> tuple[str, ...]:
    return (*WORDS, f"run_dir={run_dir}", f"cache_dir={run_dir.parent / 'cache'}", *more)


class Child:
    """A forked process; what it wrote is in ``text``."""

    def __init__(self, body: Callable[[], None], log: Path, env: Mapping[str, str]) -> None:
        self.log = log
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # python 3.12 warns about forking beside threads; ours are idle
            self.pid = os.fork()
        if self.pid == 0:
            self._become(body, env)

    def _become(self, body: Callable[[], None], env: Mapping[str, str]) -> None:
        code = 99
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            faulthandler.dump_traceback_later(STUCK_S, file=2)  # where a child that hangs hangs
            os.environ.update(env)
            warnings.resetwarnings()
            sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", buffering=1) for fd in (1, 2))
            setup_logging()
            faults._hits.clear()
            torch.set_num_threads(1)
            code = train.exit_code(body)
        finally:
            os._exit(code)

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def poll(self) -> int | None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return None if pid == 0 else os.waitstatus_to_exitcode(status)

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code, negative for a signal; kills it and fails when it takes longer."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            code = self.poll()
            if code is not None:
                return code
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {timeout} s:\n{self.text[-3000:]}")


def at_step(number: int, action: Callable[[], None], where: str = "forward") -> Callable[[], None]:
    """A patch that does ``action`` once, in the ``number``-th step of this start: at its policy's forward pass, its backward
    pass, or the save after it."""

    def patch() -> None:
        steps = [0]
        step, forward, backward, save = Trainer.step, Scorer.forward, torch.Tensor.backward, Trainer.save

        def counted(self):
            steps[0] += 1
            return step(self)

        def act(place: str, grad: bool = True) -> None:
            if steps[0] == number and place == where and grad:
                steps[0] = number + 1000
                action()

        def seen_forward(self, *args, **kwargs):
            act("forward", torch.is_grad_enabled())
            return forward(self, *args, **kwargs)

        def seen_backward(self, *args, **kwargs):
            act("backward")
            return backward(self, *args, **kwargs)

        def seen_save(self):
            act("save")
            return save(self)

        Trainer.step, Scorer.forward, Trainer.save = counted, seen_forward, seen_save
        torch.Tensor.backward = seen_backward

    return patch


def kill(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def free_port() -> int:
    """Below those that the kernel gives to connections, so that none takes it before rank 0 listens there: the other ranks
    would wait at a stranger's door."""
    while True:
        port = 20000 + (os.getpid() * 100 + next(_ports)) % 10000
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def rank_environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun would set for each rank; nothing for one."""
    if ranks == 1:
        return [{}]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def start(
    run_words: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    patch: Callable[[int], None] | None = None,
    ranks: int = 1,
) -> list[Child]:
    """One child per rank, on the way. ``patch(rank)`` runs in each before the training does."""
    run = composed(tuple(run_words))
    run_dir = Path(run.config.run_dir)
    run_dir.parent.mkdir(parents=True, exist_ok=True)

    def body(rank: int) -> Callable[[], None]:
        def main() -> None:
            if patch is not None:
                patch(rank)
            raise SystemExit(run_training(run).exit_code)

        return main

    children = []
    for rank, own in enumerate(rank_environments(ranks)):
        log = run_dir.parent / f"{run_dir.name}.{rank}.log"
        log.unlink(missing_ok=True)
        children.append(Child(body(rank), log, {**own, **(env or {})}))
    return children


def finish(run_words: Sequence[str], **options) -> list[Child]:
    """Run to the end; every rank must end well."""
    children = start(run_words, **options)
    codes = [child.wait() for child in children]
    assert codes == [0] * len(codes), children[0].text[-3000:] + children[-1].text[-3000:]
    return children


def metrics(run_dir: Path) -> list[dict]:
    """Rows of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


FILES = ("model.safetensors", "training/optimizer.safetensors")


def fingerprint(run_dir: Path, files: Sequence[str]) -> dict:
    """All that must be bit-equal at the end of two equal runs."""
    newest = find(run_dir)[0]
    state = json.loads((newest.path / "training" / "state.json").read_text())
    for name in (
        "offset",
        "wandb_id",
    ):  # the times have more or fewer digits; the name is drawn from the clock
        state["metrics"].pop(name)
    hashes = {name: hashlib.sha256((newest.path / name).read_bytes()).hexdigest() for name in files}
    return {"files": hashes, "state": state, "metrics": metrics(run_dir), "examples": newest.examples}


def difference(one: Path, other: Path, files: Sequence[str] = FILES) -> list[str]:
    """Where two finished runs differ; empty if they are bit-equal."""
    a, b = fingerprint(one, files), fingerprint(other, files)
    found = [f"{key}: {a[key]} != {b[key]}" for key in ("files", "examples") if a[key] != b[key]]
    found += [
        f"state.{k}: {v} != {b['state'].get(k)}" for k, v in a["state"].items() if v != b["state"].get(k)
    ]
    if len(a["metrics"]) != len(b["metrics"]):
        found.append(f"{len(a['metrics'])} and {len(b['metrics'])} rows of metrics")
    for i, (x, y) in enumerate(zip(a["metrics"], b["metrics"], strict=False)):
        found += [f"metrics row {i}, {k}: {x.get(k)} != {y.get(k)}" for k in {*x, *y} if x.get(k) != y.get(k)]
    return found
