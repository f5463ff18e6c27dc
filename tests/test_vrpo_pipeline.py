"""The whole way, as a user goes it: SFT on both responses, samples, a reward model, preferences, VRPO in one and two stages."""

from __future__ import annotations

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import assembly
import run_data
from commands import annotate, sample
from data.schema import Batch
from engine import models, reference
from engine.parallel import World
from engine.scoring import Scorer
from losses.vrpo import VarianceReduced
from run_models import RunModels
from tests.vrpo_tools import local, run_of, trained
from utils import UserError

ROLES = ("chosen", "rejected", "aux_1", "aux_2")
VRPO = ("loss=vrpo", "loss.beta=0.1")


@pytest.fixture(scope="module")
def way(tmp_path_factory) -> Path:
    """24 rows with M = 2 auxiliary pairs, annotated by a reward model; the SFT model is the reference."""
    folder = tmp_path_factory.mktemp("way")
    sft = trained(folder, "sft", "loss=sft", "loss.sft_on=all", "lr=0.01", "n_epochs=2")
    archive = f"model.archive={sft}"
    sample.run(run_of(folder, archive), sample.Settings(out=str(folder / "s"), num_pairs=2, max_new_tokens=8))
    scorer = trained(folder, "rm", "loss=reward", archive, "lr=0.01", data=local(folder / "s"))
    how = annotate.Settings(data=str(folder / "s"), out=str(folder / "a"), model=scorer)
    annotate.run(run_of(folder), how)
    return folder


def archive_of(way: Path) -> str:
    return f"model.archive={way}/runs/sft/LATEST"


def metrics_of(way: Path, name: str, kind: str = "train") -> list[dict]:
    lines = (way / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def test_one_stage_starts_at_log_2_and_evaluates_as_dpo(way):
    trained(way, "vrpo", *VRPO, archive_of(way), "lr=0.01", data=local(way / "a"))
    steps, evaluations = metrics_of(way, "vrpo"), metrics_of(way, "vrpo", "eval")
    assert steps[0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[0]["train/vrpo/plain"] == 0 and "train/vrpo/variance_removed" not in steps[0]
    assert all(math.isfinite(s["train/vrpo/variance_removed"]) for s in steps[1:])
    found = next(e for e in evaluations if e["split"] == "test")
    assert found["test/vrpo/plain"] == 1 and "test/vrpo/g" not in found
    trained(
        way, "dpo", "loss=dpo", "loss.beta=0.1", archive_of(way), "eval_only_once=true", data=local(way / "a")
    )
    plain = next(e for e in metrics_of(way, "dpo", "eval") if e["split"] == "test")
    assert found["test/loss"] == plain["test/loss"]  # the same rows and the same model: comparable numbers


def test_lam_zero_is_dpo_step_by_step(way):
    words = (archive_of(way), "lr=0.01")
    trained(way, "lam0", *VRPO, "loss.lam=0", *words, data=local(way / "a"))
    trained(way, "plain", "loss=dpo", "loss.beta=0.1", *words, data=local(way / "a"))
    a, b = ([s["train/loss"] for s in metrics_of(way, name)] for name in ("lam0", "plain"))
    assert a == pytest.approx(b, rel=1e-9)


def test_two_stages_and_the_group_robust_weighting_run_to_the_end(way):
    two = trained(way, "vr_reward", "loss=vrpo_reward", archive_of(way), "lr=0.01", data=local(way / "a"))
    first, *_, last = metrics_of(way, "vr_reward")
    assert first["train/loss"] == pytest.approx(math.log(2), rel=0.1) and last["train/vrpo/plain"] == 0
    results = json.loads((Path(two).parent / "results.json").read_text())
    assert {row["group"] for row in results["splits"]["test"]["table"]} >= {"all", "north"}
    trained(way, "gr", *VRPO, "weighting=group_robust", archive_of(way), data=local(way / "a"))
    assert any("train/weights/north" in s for s in metrics_of(way, "gr"))


def scored_rows(way: Path):
    run = run_of(way, *VRPO, archive_of(way), data=local(way / "a"))
    tokenizer = models.load_tokenizer(run.model)
    data = run_data.load_data(run, tokenizer)
    model = models.build_reference(run.model, archive=run.model.archive, device="cpu", tokenizer=tokenizer)
    return run, data.rows["train"], model


def test_cached_and_live_reference_log_probs_agree_for_all_responses(way, tmp_path):
    _, rows, model = scored_rows(way)
    live = reference.LiveReference(Scorer(model))
    cache = reference.CachedReference(
        tmp_path,
        weights=models.weights_hash(model),
        kernel=reference.kernel_id(live.scorer),
        dtype=torch.float64,
        device="cpu",
        scorer_factory=lambda: live,
    )
    cache.fill(rows, ROLES, world=World(0, 1, torch.device("cpu"), "none"))
    batch = Batch.collate(rows[:7])
    now, kept = live(batch, ROLES), cache(batch, ROLES)
    assert now.roles == kept.roles and len(now.roles) == 7 * 6
    torch.testing.assert_close(kept.logps, now.logps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_cost_of_two_plus_2m_responses(way, layout):
    """Tokens that pass through the model's body: the prompt once, or once per response."""
    _, rows, model = scored_rows(way)
    scorer, seen = Scorer(model, layout=layout), []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    scorer(Batch.collate(rows[:1]), ROLES)
    handle.remove()
    prompt, responses = len(rows[0].prompt), sum(map(len, rows[0].responses))
    assert len(rows[0].responses) == 6 and prompt > 50
    if layout == "shared_prefix":
        assert sum(seen) <= prompt + responses
    else:
        assert sum(seen) >= 6 * prompt


def test_the_loss_is_the_same_in_both_layouts_and_with_both_references(way):
    run, rows, model = scored_rows(way)
    policy = models.build_policy(run.model, archive=f"{way}/runs/sft/LATEST", seed=0, device="cpu")
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.sin(torch.arange(p.numel(), dtype=p.dtype)).view_as(p))
    loss, batch, found = VarianceReduced(0.1), Batch.collate(rows[:5]), []
    for layout in ("shared_prefix", "padded"):
        scored = [Scorer(m, layout=layout)(batch, ROLES) for m in (policy, model)]
        found.append(loss(*scored, batch).losses)
    assert found[0].std() > 1e-3
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- fresh pairs

FRESH = (
    *VRPO,
    "fresh_pairs.num_pairs=2",
    "fresh_pairs.max_new_tokens=4",
    "n_epochs=2",
    "lr=0.01",
    "batch_size=8",
)


def fresh(way: Path, *words: str):
    """A trainer that draws auxiliary pairs, and its session."""
    run = run_of(way, *FRESH, archive_of(way), f"fresh_pairs.model={way}/runs/rm/LATEST", *words)
    world = World(0, 1, torch.device("cpu"), "none")
    session = assembly._Session(run, way / "runs" / "fresh", world, contextlib.ExitStack())
    return session.models.build_fresh_pairs(), session


def test_every_epoch_draws_other_pairs_and_scores_them_with_the_reward_model(way, monkeypatch):
    draw, session = fresh(way, "fresh_pairs.temperature=2.0")
    rows = session.data.rows["train"][:3]
    first, again, second = (draw(rows, epoch) for epoch in (0, 0, 1))
    alone = draw(rows[1:2], 0)[0]
    for row, a, b, c in zip(rows, first, again, second, strict=True):
        assert a.roles == ("chosen", "rejected", "aux_1", "aux_2", "aux_1", "aux_2")
        assert [r.tolist() for r in a.responses[:2]] == [r.tolist() for r in row.responses[:2]]
        assert (
            [r.tolist() for r in a.responses]
            == [r.tolist() for r in b.responses]
            != [r.tolist() for r in c.responses]
        )
        assert all(len(r) == 4 or r[-1] == session.tokenizer.eos_token_id for r in a.responses[2:])
    assert [r.tolist() for r in alone.responses] == [r.tolist() for r in first[1].responses]
    for again in draw([rows[1], rows[0], rows[1]], 0)[
        ::2
    ]:  # groups drawn uniformly have rows again before the epoch ends
        assert [r.tolist() for r in again.responses] == [r.tolist() for r in alone.responses]
    with draw.reference() as model:  # what a chat model's turns end with, which labelled responses need not
        monkeypatch.setattr(model.generation_config, "eos_token_id", list(range(200)))
        assert draw(rows, 0)[0].responses[2].tolist() == first[0].responses[2].tolist()
    scorer = draw.preference.scorer
    values = scorer(Batch.collate(first), ROLES).values.detach().view(3, 3, 2)
    expected = torch.sigmoid((values[..., 0] - values[..., 1]) / 2)
    found = torch.tensor(
        [[r.scalars["chosen_preference"], *r.response_scalars["aux_preference"][2::2]] for r in first]
    )
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_a_killed_run_with_fresh_pairs_continues_bit_for_bit(way):
    words = (
        *FRESH,
        archive_of(way),
        f"fresh_pairs.model={way}/runs/rm/LATEST",
        "save_every=8",
        "eval_every=1000",
    )
    trained(way, "f1", *words)
    run = run_of(way, *words, "exp_name=f2")
    with pytest.raises(KeyboardInterrupt):
        assembly.run_training(replace(run, loss=Interrupted(run.loss.beta)))
    assembly.run_training(run)
    one, two = ((way / "runs" / name / "LATEST" / "model.safetensors").read_bytes() for name in ("f1", "f2"))
    assert one == two and len(metrics_of(way, "f2")) == 6


class Interrupted(VarianceReduced):
    """Stops the run at its third step."""

    calls = 0

    def __call__(self, *args):
        if args[0].logps.requires_grad:
            type(self).calls += 1
        if type(self).calls == 3:
            raise KeyboardInterrupt
        return super().__call__(*args)


def test_a_function_may_score_fresh_pairs_and_stale_ones_in_the_data_are_not_used(way):
    run = run_of(
        way, *FRESH, archive_of(way), "fresh_pairs.scorer=function", "fresh_pairs.function=tests.test_vrpo_pipeline:lengths",
        data=local(way / "a"),
    )  # fmt: skip
    session = assembly._Session(run, way, World(0, 1, torch.device("cpu"), "none"), contextlib.ExitStack())
    rows = session.data.rows["train"][:2]
    assert len(rows[0].responses) == 6
    decode = session.tokenizer.decode
    for row in session.models.build_fresh_pairs()(rows, 3):
        texts = [decode(ids, skip_special_tokens=True) for ids in row.responses]
        preferences = [row.scalars["chosen_preference"], *row.response_scalars["aux_preference"][2::2]]
        gaps = [len(a) - len(b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
        assert preferences == pytest.approx([1 / (1 + math.exp(-g)) for g in gaps])


def lengths(prompt, responses, row):
    return [len(r) for r in responses]


def test_two_stages_may_draw_fresh_pairs_too(way):
    words = [w for w in FRESH if not w.startswith(("loss", "n_epochs"))]
    trained(way, "f3", "loss=vrpo_reward", *words, archive_of(way), f"fresh_pairs.model={way}/runs/rm/LATEST")
    assert metrics_of(way, "f3")[-1]["train/vrpo/plain"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss=dpo", "loss.beta=0.1", "fresh_pairs.model=m"], "loss=dpo has no auxiliary pairs"),
        ([*VRPO], "give fresh_pairs.model="),
        ([*VRPO, "fresh_pairs.model=m", "loss.lam=auto"], r"loss.lam=auto fresh_pairs.num_pairs=1: M/\(M\+1\) is for"),
        ([*VRPO, "fresh_pairs.scorer=function", "fresh_pairs.function=a:b", "fresh_pairs.model=m"], "no fresh_pairs.model="),
        ([*VRPO, "fresh_pairs.model=m", "microbatch_tokens=100"], "microbatch_tokens"),
        ([*VRPO, "fresh_pairs.model=m", "reference=cached"], "reference=cached"),
        ([*VRPO, "fresh_pairs.model=m", "trainer=FSDPTrainer"], "sharded"),
        ([*VRPO, "fresh_pairs.model=m", "fresh_pairs.temperature=0"], "temperature=0"),
    ],
)  # fmt: skip
def test_settings_of_fresh_pairs_that_cannot_work_are_user_errors(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run_of(tmp_path, "fresh_pairs.num_pairs=1", "assert_sft_step=false", *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fresh_pairs.model=/nope"], "fresh_pairs.model=/nope: no such file"),
        (["fresh_pairs.scorer=function", "fresh_pairs.function=nope:f"], "fresh_pairs.function=nope:f: cannot be imported"),
    ],
)  # fmt: skip
def test_a_scorer_that_is_not_there_is_refused_by_its_key_before_any_model(tmp_path, words, message):
    run = run_of(tmp_path, "fresh_pairs.num_pairs=1", "assert_sft_step=false", *VRPO, *words)
    with pytest.raises(UserError, match=message):
        RunModels(run, None, None, None).check_fresh_pairs()


def test_a_scorer_that_is_no_reward_model_is_refused(way):
    with pytest.raises(UserError, match="is no run trained with loss=reward"):
        fresh(way, f"fresh_pairs.model={way}/runs/sft/LATEST")
