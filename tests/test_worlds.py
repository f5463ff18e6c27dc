"""Exact answers of enumerable worlds against independent arithmetic, and training runs against the exact answers."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import assembly
from commands.world import enumerate_policy, objective_of, optimum_of, report
from config.compose import Run, compose
from data import optima
from data.optima import Objective
from data.schema import Batch, Example
from data.worlds import Settings, World, exhaustive, load, make_world, sampled
from engine import models
from engine.scoring import Scorer
from losses.gpm import preference_score
from losses.pairwise import DPO, IPO, Hinge, Ramp, RDPONoise
from losses.vrpo import VarianceReduced
from preference_datasets import Counts, Tokenization, tokenize
from utils import UserError, stream

GROUPS = Settings(group_scales=[2.0, 1.2], group_sizes=[2, 1], conflict=0.6, length=1, data_seed=8)
RICH = Settings(
    group_scales=[2.0, 1.2, 1.0], group_sizes=[3, 2, 1], conflict=0.7, annotators=2, annotator_spread=1.0,
    noise=0.05, sampler_tilt=0.5, num_prompts=2, data_seed=3,
)  # fmt: skip


def some_scores(world: World, seed: int = 0) -> np.ndarray:
    return stream(seed, "test worlds").standard_normal(world.sampler.shape)


def slow_losses(world: World, link, label, scores: np.ndarray) -> list[float]:
    """Group losses by plain loops over what a row can be."""
    n, found = len(world.responses), []
    for g in range(len(world.groups)):
        total = 0.0
        for x in range(len(world.prompts)):
            mu = world.sampler[x]
            norm = sum(mu[i] * mu[j] for i in range(n) for j in range(n) if i != j)
            for i, j in itertools.permutations(range(n), 2):
                odds = [r[x, i] - r[x, j] for r in world.annotators[g]]
                clean = sum(1 / (1 + math.exp(-o)) for o in odds) / len(odds)
                q = label((1 - world.noise) * clean + world.noise * (1 - clean))
                h = scores[x, i] - scores[x, j]
                total += mu[i] * mu[j] / norm / len(world.prompts) * (q * link(h) + (1 - q) * link(-h))
        found.append(total)
    return found


# --------------------------------------------------------------------------------------------- the exact answers


@pytest.mark.parametrize(
    ("objective", "link", "label"),
    [
        (Objective("dpo", 0.5), lambda h: math.log1p(math.exp(-0.5 * h)), lambda p: p),
        (Objective("dpo", 0.5, label_smoothing=0.2), lambda h: math.log1p(math.exp(-0.5 * h)), lambda p: 0.8 * p + 0.2 * (1 - p)),
        (Objective("dpo", 0.5, flip_rate=0.05), lambda h: math.log1p(math.exp(-0.5 * h)), lambda p: (p - 0.05) / 0.9),
        (Objective("ipo", 0.1), lambda h: (h - 5.0) ** 2, lambda p: p),
        (Objective("hinge", 0.5), lambda h: max(0.0, 1 - 0.5 * h), lambda p: p),
    ],
    ids=["dpo", "cdpo", "rdpo_noise", "ipo", "hinge"],
)  # fmt: skip
def test_population_losses_and_their_minimum(objective, link, label):
    world = make_world(RICH)
    scores = some_scores(world)
    assert optima.group_losses(world, objective, scores) == pytest.approx(
        slow_losses(world, link, label, scores)
    )
    weights = np.array([0.5, 0.2, 0.3])
    best = optima.optimum(world, objective, weights)
    assert best.value == pytest.approx(weights @ slow_losses(world, link, label, best.scores))
    for seed in range(20):  # convex: no direction goes down
        other = best.scores + 10.0 ** -(seed % 4) * some_scores(world, seed)
        assert weights @ optima.group_losses(world, objective, other) > best.value


def test_dpo_recovers_the_reward_whatever_the_pair_law():
    world = make_world(Settings(sampler_tilt=1.0, num_prompts=2))
    best = optima.optimum(world, Objective("dpo", 0.3))
    assert best.scores == pytest.approx(world.rewards[0] / 0.3, abs=1e-7)
    noisy = replace(world, noise=0.1)
    clean = optima.optimum(noisy, Objective("dpo", 0.3, flip_rate=0.1))
    assert clean.scores == pytest.approx(best.scores, abs=1e-6)
    assert np.abs(optima.optimum(noisy, Objective("dpo", 0.3)).scores).max() < np.abs(best.scores).max() - 0.1


def test_ipo_is_the_win_probability_against_the_sampler():
    world = make_world(replace(RICH, group_scales=[1.5], group_sizes=[1]))
    wins = np.einsum("xij,xj->xi", world.preference[0], world.sampler)
    expected = (wins - 0.5) / 0.2
    best = optima.optimum(world, Objective("ipo", 0.2))
    assert best.scores == pytest.approx(expected - expected.mean(-1, keepdims=True), abs=1e-9)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge"])
def test_nothing_is_better_than_the_saddle_point(loss):
    world, objective = make_world(GROUPS), Objective(loss, 0.5)
    best = optima.minimax_optimum(world, objective)
    assert best.gap < 1e-9 and best.weights.sum() == pytest.approx(1)
    assert best.weights.min() > 0.1 and best.losses == pytest.approx(best.value, abs=1e-7)  # both groups bind
    for seed in range(20):  # no direction lowers the worst group
        other = best.scores + 10.0 ** -(seed % 4) * some_scores(world, seed)
        assert optima.group_losses(world, objective, other).max() > best.value
    # the weights are multipliers: for them the plain optimum is no better than the saddle point
    assert optima.optimum(world, objective, best.weights).value == pytest.approx(best.value, abs=1e-6)
    assert (
        optima.group_losses(world, objective, optima.optimum(world, objective).scores).max()
        > best.value + 0.001
    )


def test_weights_follow_groups_and_adjustments():
    world, objective = make_world(RICH), Objective("dpo", 0.5)
    best = optima.minimax_optimum(world, objective)
    turned = replace(world, annotators=world.annotators[::-1], sizes=world.sizes[::-1])
    assert optima.minimax_optimum(turned, objective).weights == pytest.approx(best.weights[::-1], abs=1e-5)
    raised = optima.minimax_optimum(world, replace(objective, adj=(0.0, 0.0, 0.05)))
    assert raised.weights[2] > best.weights[2] + 0.01


def test_an_easy_group_gets_no_weight():
    world = make_world(replace(GROUPS, data_seed=10))
    best = optima.minimax_optimum(world, Objective("dpo", 0.5))
    assert best.weights == pytest.approx([0, 1], abs=1e-8) and best.losses[0] < best.value - 0.05


def test_rewards_regret_and_win_rates():
    world = make_world(RICH)
    reference, beta = optima.policy(np.zeros_like(world.sampler), some_scores(world)), 0.5
    assert np.exp(reference).sum(-1) == pytest.approx(1)
    best = optima.kl_optimum(world, beta, reference)
    for g in range(3):
        assert optima.regret(world, best[g], beta, reference)[g] == pytest.approx(0, abs=1e-12)
    kl = np.array([(np.exp(reference) * (reference - b)).sum(-1).mean() for b in best])
    assert optima.regret(world, reference, beta, reference) == pytest.approx(beta * kl)
    assert optima.win_rate(world, reference, reference) == pytest.approx(0.5)
    sure = np.log(
        np.eye(len(world.responses))[[4, 7]] + 1e-300
    )  # response 4 to the first prompt, 7 to the second
    other = np.log(np.eye(len(world.responses))[[1, 2]] + 1e-300)
    expected = (world.preference[:, 0, 4, 1] + world.preference[:, 1, 7, 2]) / 2
    assert optima.win_rate(world, sure, other) == pytest.approx(expected)
    assert optima.expected_reward(world, sure) == pytest.approx(world.rewards[:, [0, 1], [4, 7]].mean(-1))


def test_what_has_no_exact_optimum_is_refused():
    with pytest.raises(UserError, match="Ramp"):
        objective_of(Ramp(beta=0.5))
    with pytest.raises(UserError, match="nll"):
        objective_of(VarianceReduced(beta=0.5, nll=0.1))
    with pytest.raises(UserError, match="length_norm"):
        objective_of(DPO(beta=0.5, length_norm="token"))
    with pytest.raises(UserError, match="no finite optimum"):
        optima.optimum(make_world(Settings(group_scales=[4.0])), Objective("dpo", 0.5, flip_rate=0.3))
    assert objective_of(VarianceReduced(beta=0.2, base="ipo")) == Objective("ipo", 0.2)
    assert objective_of(RDPONoise(beta=0.2, flip_rate=0.1)) == Objective("dpo", 0.2, flip_rate=0.1)


# --------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize("loss", [DPO(beta=0.5), IPO(beta=0.5), Hinge(beta=0.5)], ids=["dpo", "ipo", "hinge"])
def test_exhaustive_rows_are_the_law(loss):
    world = make_world(RICH)
    scores = some_scores(world)
    where = {word: k for k, word in enumerate(world.responses)}
    sums, counts, weights = {}, {}, {}
    for e in exhaustive(world, RICH, 0):
        x = world.prompts.index(e.prompt)
        h = scores[x, where[e.response("chosen")]] - scores[x, where[e.response("rejected")]]
        value = e.weight * float(loss.link(torch.tensor([h], dtype=torch.float64)))
        sums[e.group] = sums.get(e.group, 0.0) + value
        weights[e.group] = weights.get(e.group, 0.0) + e.weight
        counts[e.group] = counts.get(e.group, 0) + 1
    assert counts == {"red": 3 * 144, "green": 2 * 144, "blue": 144}
    exact = optima.group_losses(world, objective_of(loss), scores)
    assert [sums[g] / counts[g] for g in world.groups] == pytest.approx(exact)
    assert [weights[g] / counts[g] for g in world.groups] == pytest.approx([1.0] * 3)


def test_auxiliary_pairs_follow_the_pair_law_and_know_the_preference():
    settings = replace(RICH, length=1, num_aux=1, aux_sharpness=-1.0, group_scales=[2.0], group_sizes=[1])
    world = make_world(settings)
    law = np.zeros_like(world.pair_law)
    where = {word: k for k, word in enumerate(world.responses)}
    rows = load("w", settings, 0)["train"]
    for e in rows:
        x = world.prompts.index(e.prompt)
        i, j = (where[e.response(role)] for role in ("aux_1", "aux_2"))
        law[x, i, j] += e.weight / len(rows)
        assert e.response_scalars["aux_preference"][2] == pytest.approx(
            world.preference[0, x, j, i]
        )  # reversed
        c, r = (where[e.response(role)] for role in ("chosen", "rejected"))
        assert e.scalars["chosen_preference"] == pytest.approx(world.preference[0, x, r, c])
    assert law == pytest.approx(2 * np.triu(world.pair_law))


def test_sampled_rows_follow_the_law():
    settings = replace(RICH, length=1, mode="sampled", num_prompts=1)
    world = make_world(settings)
    where = {word: k for k, word in enumerate(world.responses)}
    drawn = np.zeros((3, 3, 3))
    num = 4000
    for e in sampled(world, settings, "train", num):
        drawn[world.groups.index(e.group), where[e.response("chosen")], where[e.response("rejected")]] += (
            1 / num
        )
    law = world.sizes[:, None, None] * 2 * world.pair_law[0] * world.preference[:, 0]
    assert law.sum() == pytest.approx(1)
    assert np.abs(drawn - law).max() < 5 * math.sqrt(law.max() / num)
    again = list(sampled(world, settings, "train", 5))
    assert again == list(sampled(world, settings, "train", 5)) and len({e.uid for e in again}) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 5}, "243 responses are too many"),
        ({"alphabet": "aa"}, "different letters"),
        ({"group_sizes": [1, 2]}, "1 whole numbers"),
        ({"noise": 0.5}, r"\[0, 0.5\)"),
        ({"num_aux": 2}, "0 or 1"),
        ({"length": 4, "num_aux": 1}, "too many"),
        ({"mode": "exact"}, "exhaustive, sampled"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Settings(**changes)


# --------------------------------------------------------------------------------------------- training

COMMON = [
    "model=tiny-gpt2", "assert_sft_step=false", "wandb.enabled=false", "batch_size=100000", "eval_every=1000000000",
    "do_first_eval=false", "optimizer=Adam", "lr=1e-2", "lr_schedule=linear", "warmup_steps=0", "n_epochs=120",
]  # fmt: skip
SMALL_GROUPS = [
    "datasets=[world_groups]", "data.world_groups.length=1", "data.world_groups.data_seed=8", "data.world_groups.conflict=0.6",
    "data.world_groups.group_scales=[2.0,1.2]", "data.world_groups.group_sizes=[2,1]",
]  # fmt: skip


def train(root: Path, *words: str) -> tuple[Run, World]:
    """A finished run, made by the code of train.py."""
    run = compose([*COMMON, f"run_root={root}", f"cache_dir={root}/cache", *words])
    assembly.run_training(run)
    return run, make_world(run.datasets[0].settings)


def head_values(run: Run, world: World) -> torch.Tensor:
    """(X, N) rewards or (X, N, D) embeddings that the trained head gives the world's responses."""
    tokenizer, needs = models.load_tokenizer(run.model), run.loss.needs
    model = models.build_policy(
        run.model, archive=f"{run.config.run_dir}/LATEST", output=needs.output, dim=needs.dim, seed=0, device="cpu", tokenizer=tokenizer
    )  # fmt: skip
    examples = [
        Example(f"{x}.{y}", prompt, (("target", response),), "world")
        for x, prompt in enumerate(world.prompts)
        for y, response in enumerate(world.responses)
    ]
    rows = tokenize(examples, tokenizer, Tokenization(), groups=("world",), counts=Counts())
    with torch.no_grad():
        values = Scorer(model, output=needs.output).eval()(Batch.collate(rows), ("target",)).values
    return values.double().unflatten(0, (len(world.prompts), len(world.responses)))


def trained(root: Path, *words: str) -> tuple[Run, World, optima.Optimum, np.ndarray, np.ndarray]:
    """Train through the same code as train.py; log-probs of the reference and of the trained policy on the responses."""
    run, world = train(root, "loss.beta=0.5", *words)
    settings, tokenizer = run.datasets[0].settings, models.load_tokenizer(run.model)
    logps = []
    for archive in (None, f"{run.config.run_dir}/LATEST"):
        model = models.build_policy(run.model, archive=archive, seed=0, device="cpu", tokenizer=tokenizer)
        found, mass = enumerate_policy(Scorer(model).eval(), world, tokenizer)
        assert ((mass > 0) & (mass < 1)).all()
        logps.append(found)
    return run, world, optimum_of(run, world, settings), *logps


def check(found, nats: float, loss: float) -> None:
    """The policy is within ``nats`` of the optimum on every response, and its objective within ``loss``."""
    run, world, best, reference, policy = found
    assert np.abs(reference - optima.policy(reference, best.scores)).max() > 0.2  # the start is elsewhere
    assert policy == pytest.approx(optima.policy(reference, best.scores), abs=nats), report(
        run, world, best, reference, policy
    )
    losses = optima.group_losses(world, objective_of(run.loss), policy - reference)
    assert losses == pytest.approx(best.losses, abs=loss)


BT = ["datasets=[world_bt]", "data.world_bt.length=1", "data.world_bt.noise=0.05"]


@pytest.mark.parametrize(
    "words",
    [
        ["loss=dpo"],
        ["loss=dpo", "loss.label_smoothing=0.2"],
        ["loss=rdpo_noise", "loss.flip_rate=0.05"],
        ["loss=ipo"],
    ],
    ids=["dpo", "cdpo", "rdpo_noise", "ipo"],
)
def test_training_ends_at_the_exact_optimum(tmp_path, words):
    check(trained(tmp_path, *BT, *words), nats=5e-3, loss=1e-5)


def test_sft_ends_at_the_law_of_the_labelled_responses(tmp_path):
    run, world = train(
        tmp_path, *BT, "loss=sft", "loss.sft_on=all", "data.world_bt.sampler_tilt=0.7", "n_epochs=200"
    )
    tokenizer = models.load_tokenizer(run.model)
    model = models.build_policy(
        run.model, archive=f"{run.config.run_dir}/LATEST", seed=0, device="cpu", tokenizer=tokenizer
    )
    logps, mass = enumerate_policy(Scorer(model).eval(), world, tokenizer)
    law = world.pair_law.sum(2)  # of either response of a pair; a pair's two differ, so it is not the sampler
    assert np.abs(law - world.sampler).max() > 0.02 and np.ptp(np.log(law)) > 0.5
    assert logps == pytest.approx(np.log(law), abs=1e-2) and mass == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("data", [BT, ["datasets=[world_bt]", "data.world_bt.sampler_tilt=0.7", "data.world_bt.length=1"]], ids=["noise", "tilt"])  # fmt: skip
def test_a_reward_model_ends_at_the_bradley_terry_rewards(tmp_path, data):
    run, world = train(tmp_path, *data, "loss=reward")
    found = head_values(run, world).numpy()
    found = found - found.mean(-1, keepdims=True)
    assert found == pytest.approx(optima.optimum(world, Objective("dpo", 1.0)).scores, abs=5e-3)
    if not world.noise:
        assert found == pytest.approx(world.rewards[0], abs=5e-3)


@pytest.mark.parametrize("sharpness", [1.0, -1.0], ids=["exact", "reversed"])
def test_a_variance_reduced_reward_model_ends_where_a_plain_one_does(tmp_path, sharpness):
    words = [
        "datasets=[world_aux]",
        f"data.world_aux.aux_sharpness={sharpness}",
        "data.world_aux.alphabet=abc",
    ]
    run, world = train(tmp_path, *words, "loss=vrpo_reward")
    found = head_values(run, world).numpy()
    best = optima.optimum(world, Objective("dpo", 1.0)).scores
    assert np.ptp(best) > 0.5 and found - found.mean(-1, keepdims=True) == pytest.approx(best, abs=1e-2)


def test_a_general_preference_model_ends_at_preferences_that_no_reward_explains(tmp_path):
    words = ["datasets=[world_mixture]", "data.world_mixture.length=1", "data.world_mixture.num_prompts=1"]
    run, world = train(tmp_path, *words, "loss=gpm", "n_epochs=200")
    v = head_values(run, world)[0]
    found = torch.sigmoid(preference_score(v[:, None], v[None, :]) / run.loss.tau).numpy()
    expected = np.tensordot(world.sizes, world.preference[:, 0], 1)
    odds = np.log(expected / (1 - expected))
    assert abs(odds[0, 1] + odds[1, 2] + odds[2, 0]) > 0.01  # 0 for every Bradley-Terry model
    assert found == pytest.approx(expected, abs=3e-3)


def test_importance_weights_end_at_the_optimum_of_equal_groups(tmp_path):
    found = trained(tmp_path, *SMALL_GROUPS, "loss=dpo", "weighting=importance")
    assert found[2].weights == pytest.approx([0.5, 0.5])
    plain = optima.optimum(found[1], Objective("dpo", 0.5)).scores
    assert np.abs(plain - found[2].scores).max() > 0.05  # the data's own shares have another optimum
    check(found, nats=5e-3, loss=1e-4)  # each group's own loss still slopes at the optimum of their sum


def test_hinge_training_ends_at_the_exact_minimum(tmp_path):
    # the minimum is at a kink, which steps of a finite length straddle
    check(trained(tmp_path, *BT, "loss=hinge"), nats=2e-2, loss=3e-3)


@pytest.mark.parametrize(
    ("sharpness", "base", "lam"),
    [(1.0, "dpo", "1.0"), (-1.0, "dpo", "1.0"), (-1.0, "ipo", "auto")],
    ids=["exact", "reversed", "ipo_auto"],
)
def test_vrpo_has_the_optimum_of_its_base_whatever_it_is_told(tmp_path, sharpness, base, lam):
    words = [
        "datasets=[world_aux]",
        f"data.world_aux.aux_sharpness={sharpness}",
        "data.world_aux.alphabet=abc",
    ]
    found = trained(tmp_path, *words, "loss=vrpo", f"loss.base={base}", f"loss.lam={lam}")
    plain = optima.optimum(found[1], Objective(base, 0.5))
    assert found[2].scores == pytest.approx(plain.scores)
    check(found, nats=1e-2, loss=1e-4)


@pytest.mark.parametrize(
    ("loss", "step_size"), [pytest.param("gr_dpo", 0.3, marks=pytest.mark.slow), ("gr_ipo", 0.1)]
)
def test_group_robust_training_ends_at_the_saddle_point(tmp_path, loss, step_size):
    words = [*SMALL_GROUPS, f"loss={loss}", f"weighting.step_size={step_size}", "n_epochs=200"]
    found = trained(tmp_path, *words)
    check(found, nats=0.03, loss=5e-3)
    lines = (Path(found[0].config.run_dir) / "metrics.jsonl").read_text().splitlines()
    last = [row for row in map(json.loads, lines) if row["kind"] == "train"][-1]
    weights = [last[f"train/weights/{g}"] for g in found[1].groups]
    assert weights == pytest.approx(found[2].weights, abs=0.03)


def test_the_report_names_the_gap(tmp_path):
    found = trained(tmp_path, *SMALL_GROUPS, "loss=ipo", "weighting=importance", "n_epochs=2")
    assert found[2].weights == pytest.approx([0.5, 0.5])
    text = report(*found)
    assert "green" in text and "largest |log pi - log pi*|" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "loss", "nats"),
    [
        (["datasets=[world_bt]"], ["loss=dpo"], 0.01),
        (["datasets=[world_mixture]"], ["loss=ipo", "loss.beta=0.1"], 0.01),
        (["datasets=[world_groups]"], ["loss=gr_ipo", "weighting.step_size=0.05"], 0.05),
    ],
    ids=["bt", "mixture", "groups"],
)
def test_the_shipped_worlds_are_learned(tmp_path, data, loss, nats):
    found = trained(tmp_path, *data, *loss, "n_epochs=600", "lr=3e-3", "sep_pairs=true")
    check(found, nats=nats, loss=nats)
