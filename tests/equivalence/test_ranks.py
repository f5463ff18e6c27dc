"""One trajectory, whatever the ranks, the accumulation, the recomputation and the reference: no loss knows how it is run.

Float64, a GPT-2 of a few thousand parameters, plain SGD, so that a difference is not blown up by a division; children are
forked, because imports cost seconds. `pytest -s` prints the deviations.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.plan import Plan
from engine import parallel
from engine.models import enable_activation_checkpointing
from engine.parallel import World, full_tensor
from engine.reference import CachedReference, LiveReference, kernel_id, weights_hash
from engine.scoring import Scorer
from losses.pairwise import DPO, IPO
from losses.vrpo import VarianceReduced
from tests.faults.tools import Child, rank_environments
from tests.trainer_tools import make_model, make_rows, make_trainer
from utils import stream
from weighting import GroupRobust, Uniform

pytestmark = pytest.mark.fault  # forks
LOSSES = {
    "dpo": (DPO(beta=0.3), Uniform()),
    "gr_ipo": (IPO(beta=0.2), GroupRobust(step_size=0.05)),
    "vrpo": (VarianceReduced(beta=0.3), Uniform()),
}
WORLDS, CUTS, RECOMPUTE, REFERENCES = ("one", "fsdp", "ddp"), (1, 2, 4), (False, True), ("live", "cached")
# every pair of (world, cut), (world, recompute), (world, reference), (cut, recompute), (cut, reference) ... is in here
PAIRWISE = [
    ("one", 2, True, "cached"),
    ("one", 4, False, "live"),
    ("one", 1, True, "live"),
    ("fsdp", 1, True, "cached"),
    ("fsdp", 2, False, "live"),
    ("fsdp", 4, True, "live"),
    ("ddp", 1, False, "cached"),
    ("ddp", 2, True, "live"),
    ("ddp", 4, True, "cached"),
    ("one", 4, False, "cached"),
]
LIMIT = 1e-12  # parameters of order 1 after ten steps
NUM_ROWS, BATCH = 37, 8  # the last step of an epoch has five rows


def rows_for(loss) -> list:
    rows = make_rows(NUM_ROWS)
    if not isinstance(loss, VarianceReduced):
        return rows
    found = []
    for i, row in enumerate(rows):
        rng = stream(3, "aux", i)
        pairs = int(rng.integers(0, 3))
        extra = tuple(
            rng.integers(3, 32, size=int(n)).astype(np.int32) for n in rng.integers(1, 6, size=2 * pairs)
        )
        preference = [float(x) for x in rng.uniform(0.1, 0.9, size=pairs)]
        found.append(
            dataclasses.replace(
                row,
                responses=(*row.responses, *extra),
                roles=(*row.roles, *("aux_1", "aux_2") * pairs),
                scalars={**row.scalars, "chosen_preference": float(rng.uniform(0.2, 0.9))},
                response_scalars={
                    "aux_preference": tuple(
                        [float("nan")] * 2 + [p for q in preference for p in (q, float("nan"))]
                    )
                },
            )
        )
    return found


def trajectory(folder: Path, loss, weighting, world: World, cut: int, recompute: bool, kind: str) -> dict:
    """Train as one rank of ``world``; full parameters and group weights at the end, losses of the steps."""
    model = make_model()
    if recompute:
        enable_activation_checkpointing(model)
    trainer = make_trainer(
        folder / f"rank{world.rank}", loss, weighting=weighting, world=world, model=model, rows=rows_for(loss),
        optimizer="SGD", lr=0.05, batch_size=BATCH, gradient_accumulation_steps=cut, do_first_eval=False, eval_every=10_000,
    )  # fmt: skip
    frozen = Scorer(make_model(seed=1))
    identity = {"weights": weights_hash(frozen.model), "kernel": kernel_id(frozen)}
    if world.mode == "fsdp":
        for scorer in (trainer.policy, frozen):
            parallel.shard(scorer, block_name=None, param_dtype=None)
        trainer.parameters = [p for p in trainer.policy.parameters() if p.requires_grad]
        trainer.parts.optimizer = torch.optim.SGD(trainer.parameters, lr=0.05)
    live = LiveReference(frozen)
    trainer.reference = live
    if kind == "cached":
        trainer.reference = CachedReference(
            folder / "cache", **identity, dtype=torch.float64, device="cpu", scorer_factory=lambda: live
        )
        trainer.reference.fill(trainer.parts.rows, loss.needs.reference, world=world)
    trainer.parts.evaluator.splits = {}
    losses = []
    while trainer.step_count < trainer.parts.plan.num_steps:
        losses.append(trainer.step()["train/loss"])
    return {
        "parameters": torch.cat([full_tensor(p).reshape(-1) for p in trainer.policy.parameters()]),
        "losses": torch.tensor(losses, dtype=torch.float64),
        "weights": torch.tensor(list(trainer.weighting.metrics().values()), dtype=torch.float64),
        "batches": [list(map(int, trainer.parts.plan.step_rows(s))) for s in range(trainer.step_count)],
    }


def run(
    folder: Path,
    name: str,
    where: str,
    cut: int,
    recompute: bool,
    kind: str,
    patch: Callable[[], None] | None = None,
) -> SimpleNamespace:
    """The trajectory of rank 0, from forked children."""
    folder.mkdir(parents=True)
    loss, weighting = LOSSES[name]
    ranks = 1 if where == "one" else 2

    def body(rank: int) -> Callable[[], None]:
        def main() -> None:
            if patch is not None:
                patch()
            mode = "none" if where == "one" else where
            world = parallel.start(mode, "cpu", 60.0)
            found = trajectory(folder, loss, weighting, world, cut, recompute, kind)
            if rank == 0:
                torch.save(found, folder / "found.pt")
            world.leave(None, None, None)

        return main

    environments = rank_environments(ranks)
    children = [Child(body(r), folder / f"{r}.log", env) for r, env in enumerate(environments)]
    assert [c.wait() for c in children] == [0] * ranks, children[0].text[-2000:] + children[-1].text[-2000:]
    return SimpleNamespace(**torch.load(folder / "found.pt", weights_only=True))


@pytest.fixture(scope="session")
def plain(tmp_path_factory) -> dict[str, SimpleNamespace]:
    """One process, one micro-batch, nothing recomputed, a live reference."""
    folder = tmp_path_factory.mktemp("plain")
    return {name: run(folder / name, name, "one", 1, False, "live") for name in LOSSES}


def deviation(one: SimpleNamespace, other: SimpleNamespace) -> tuple[float, float]:
    """(largest absolute, mean signed) difference of the final parameters."""
    gap = one.parameters - other.parameters
    return gap.abs().max().item(), gap.mean().item()


def setups() -> list:
    fast = {(name, *c) for i, name in enumerate(LOSSES) for c in PAIRWISE[i::3]}
    every = itertools.product(LOSSES, WORLDS, CUTS, RECOMPUTE, REFERENCES)
    return [pytest.param(*setup, marks=() if setup in fast else pytest.mark.slow) for setup in every]


@pytest.mark.parametrize(("name", "where", "cut", "recompute", "kind"), setups())
def test_there_is_one_trajectory(tmp_path, plain, name, where, cut, recompute, kind, record_property):
    found, expected = run(tmp_path / "run", name, where, cut, recompute, kind), plain[name]
    start = torch.cat([p.detach().reshape(-1) for p in Scorer(make_model()).parameters()])
    assert (expected.parameters - start).abs().max() > 1e-2  # it went somewhere
    assert found.batches == expected.batches
    assert sorted(map(len, found.batches))[:2] == [5, 5]
    largest, mean = deviation(found, expected)
    record_property("max_deviation", largest)
    print(f"{name} {where} cut={cut} recompute={recompute} {kind}: max {largest:.1e} mean {mean:+.1e}")  # noqa: T201
    assert largest < LIMIT
    assert abs(mean) < LIMIT / 10
    torch.testing.assert_close(found.losses, expected.losses, rtol=0, atol=LIMIT)
    torch.testing.assert_close(found.weights, expected.weights, rtol=0, atol=LIMIT)


# ---------------------------------------------------------------------------------------------- planted mutations


def mean_of_means() -> None:
    """Each micro-batch divides by its own size, and the mean of those is taken."""
    import trainers

    honest = trainers.Trainer.step

    def step(self):
        parts = self.micro_batches(self.parts.plan.step_rows(self.step_count))
        collate = trainers.Batch.collate

        def weighted(rows):
            batch = collate(rows)
            share = sum(map(len, parts)) / (len(parts) * len(rows))
            return dataclasses.replace(batch, weight=batch.weight * share)

        trainers.Batch = SimpleNamespace(collate=weighted)
        try:
            return honest(self)
        finally:
            trainers.Batch = SimpleNamespace(collate=collate)

    trainers.Trainer.step = step


def dropped_remainder() -> None:
    """What does not divide by the ranks is left out."""
    World.share = lambda self, parts: [
        (parts[self.rank + k * self.size], True) for k in range(len(parts) // self.size)
    ]


def leaked_draw() -> None:
    """The order of the data comes from a generator that every rank draws from on its own."""
    rows = Plan.step_rows

    def step_rows(self, step):
        found = rows(self, step)
        np.random.seed(int(torch.distributed.get_rank()) + step)  # noqa: NPY002
        return found[np.random.permutation(len(found))]  # noqa: NPY002

    Plan.step_rows = step_rows


def local_weights() -> None:
    """Group weights are updated from this rank's rows alone."""
    import trainers

    alone = World(0, 1, torch.device("cpu"), "none")
    reduce = trainers.StepSums.reduce

    def local(self, world, norm):
        self.tables = {k: v * world.size for k, v in self.tables.items()}
        return reduce(self, alone, norm)

    trainers.StepSums.reduce = local


@pytest.mark.parametrize(
    ("mutation", "name", "cut"),
    [
        (mean_of_means, "dpo", 2),
        (dropped_remainder, "dpo", 4),
        (leaked_draw, "dpo", 1),
        (local_weights, "gr_ipo", 1),
    ],
)
def test_a_planted_defect_is_caught(tmp_path, plain, mutation, name, cut):
    found = run(tmp_path / "run", name, "ddp", cut, False, "live", patch=mutation)
    assert deviation(found, plain[name])[0] > 1e-5
