"""How near a policy is to the exact optimum of an enumerable world: `python -m commands.world world.policy=RUN/LATEST datasets=[world_bt] ...`

The other words are those of the training run; ``model.archive`` (or the model's own weights) is then the reference, as it was
in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from commands.cli import entry
from config.compose import Run
from data import optima
from data.schema import Batch, Example
from data.worlds import Settings as WorldSettings
from data.worlds import World, exhaustive, make_world
from engine import archives, models, parallel, runtime
from engine.scoring import Scorer
from losses.pairwise import DPO, IPO, Hinge, PairwiseLoss, RDPONoise
from losses.vrpo import BASES, VarianceReduced
from preference_datasets import Counts, Tokenization, tokenize
from run_data import tokenization
from utils import UserError
from weighting import GroupRobust


@dataclass(frozen=True)
class Settings:
    """policy: the trained weights (a run, RUN/LATEST, RUN/step-N or a Hugging Face directory)."""

    policy: str


# ---------------------------------------------------------------------------------------------- policies


@torch.no_grad()
def enumerate_policy(
    scorer: torch.nn.Module, world: World, tokenizer: object, settings: Tokenization | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """((X, N) log-probs given that the answer is one of the world's responses, (X,) probability that it is); float64.

    Every response is scored, EOS included, with the ids that training uses. No pairwise loss on the world's responses sees
    the second number.
    """
    examples = [
        Example(f"world:{x}.{y}", prompt, (("target", response),), "world")
        for x, prompt in enumerate(world.prompts)
        for y, response in enumerate(world.responses)
    ]
    rows = tokenize(examples, tokenizer, settings or Tokenization(), groups=("world",), counts=Counts())
    logps = scorer(Batch.collate(rows), ("target",)).logps.double().cpu().numpy()
    logps = logps.reshape(len(world.prompts), len(world.responses))
    mass = np.exp(logps).sum(-1)
    return logps - np.log(mass)[:, None], mass


# ---------------------------------------------------------------------------------------------- run -> objective


def objective_of(loss: object) -> optima.Objective:
    """The population objective of a run's loss. Raises UserError for losses without an exact optimum here."""
    name = type(loss).__name__
    if not isinstance(loss, PairwiseLoss):
        raise UserError(f"loss {name}: only pairwise losses have an exact optimum here")
    if loss.length_norm != "none" or loss.f_divergence != "reverse_kl":
        raise UserError("loss.length_norm and loss.f_divergence: exact optima are for none and reverse_kl")
    if isinstance(loss, VarianceReduced):
        if loss.nll:
            raise UserError(
                f"loss.nll={loss.nll}: the optimum of vrpo is its base loss's for loss.nll=0 only"
            )
        return objective_of(BASES[loss.base](beta=loss.beta))
    if isinstance(loss, RDPONoise):
        return optima.Objective("dpo", loss.beta, flip_rate=loss.flip_rate)
    if isinstance(loss, DPO):
        return optima.Objective("dpo", loss.beta, label_smoothing=loss.label_smoothing)
    kind = {IPO: "ipo", Hinge: "hinge"}.get(type(loss), name)
    return optima.Objective(kind, loss.beta)


def optimum_of(run: Run, world: World, settings: WorldSettings) -> optima.Optimum:
    """The optimum of the run's loss under its weighting."""
    objective = objective_of(run.loss)
    groups = len(world.groups)
    probs = np.full(groups, 1 / groups) if run.config.weighted_batches else world.sizes
    total = settings.num_train
    if settings.mode == "exhaustive":
        total = sum(1 for _ in exhaustive(world, settings, settings.num_aux))
    counts = np.maximum(np.round(world.sizes * total), 1)
    if isinstance(run.weighting, GroupRobust):
        if run.weighting.chi != 1:
            raise UserError(f"weighting.chi={run.weighting.chi}: the exact saddle point is for chi=1")
        adj = np.broadcast_to(np.asarray(run.weighting.adj, dtype=np.float64), (groups,)) / np.sqrt(counts)
        return optima.minimax_optimum(world, replace(objective, adj=tuple(adj.tolist())))
    state = run.weighting.build(world.groups, counts.astype(int).tolist(), probs.tolist())
    weights = state.metrics()
    return optima.optimum(world, objective, np.array([weights[f"weights/{g}"] for g in world.groups]))


# ---------------------------------------------------------------------------------------------- the report


def report(run: Run, world: World, best: optima.Optimum, reference: np.ndarray, policy: np.ndarray) -> str:
    """Reference, policy and optimum in one table: losses, rewards, regret at the loss's beta, win rate against the reference."""
    objective = objective_of(run.loss)
    base = np.full_like(reference, -np.log(reference.shape[1])) if run.loss.reference_free else reference
    target = optima.policy(base, best.scores)
    header = f"{'group':>8} {'':>10} {'loss':>11} {'reward':>9} {'regret':>9} {'win rate':>9} {'weight':>8}"
    lines = [header]
    found = {
        name: (
            optima.group_losses(world, objective, logps - base),
            optima.expected_reward(world, logps),
            optima.regret(world, logps, objective.beta, base),
            optima.win_rate(world, logps, reference),
        )
        for name, logps in (("reference", reference), ("policy", policy), ("optimum", target))
    }
    for g, group in enumerate(world.groups):
        for name, (loss, reward, regret, wins) in found.items():
            weight = f"{best.weights[g]:8.4f}" if name == "optimum" else ""
            lines.append(
                f"{group:>8} {name:>10} {loss[g]:11.6f} {reward[g]:9.5f} {regret[g]:9.5f} {wins[g]:9.5f} {weight}".rstrip()
            )
    gap = np.abs(policy - target).max()
    lines.append(f"largest |log pi - log pi*| on the world's responses: {gap:.2e} nats")
    return "\n".join(lines)


def measure(run: Run, settings: Settings) -> None:
    """Print losses, rewards, regret and win rates of reference, policy and exact optimum, per group."""
    runtime.configure(run.config.num_threads, run.config.allocator)
    if len(run.datasets) != 1 or not isinstance(run.datasets[0].settings, WorldSettings):
        raise UserError(f"datasets={run.config.datasets}: name one world, e.g. datasets=[world_bt]")
    spec = run.datasets[0]
    world = make_world(spec.settings)
    best = optimum_of(run, world, spec.settings)
    tokenizer = models.load_tokenizer(run.model)
    archives.find(settings.policy, "world.policy")
    device = parallel.pick_device(run.config.device)
    logps = []
    for archive in (run.model.archive, settings.policy):
        model = models.build_policy(
            run.model, archive=archive, seed=run.config.seed, device=device, tokenizer=tokenizer
        )
        scorer = Scorer(model, layout=run.config.scoring.layout).eval()
        logps.append(enumerate_policy(scorer, world, tokenizer, tokenization(run, spec))[0])
    print(report(run, world, best, *logps))


if __name__ == "__main__":
    entry("world", Settings, measure, defaults=("assert_sft_step=false",))
