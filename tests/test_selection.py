"""Data selection: what is chosen, that it is chosen before anything is counted, and that a continued run chooses the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import assembly
from config.compose import compose
from engine.selection import RHOLoss, UniformSelection
from losses.pairwise import DPO, IPO
from losses.sft import SFT
from losses.vrpo import VarianceReduced
from run_models import RunModels
from tests.trainer_tools import GROUPS, make_rows, make_trainer, parameters
from utils import UserError
from weighting import GroupRobust

INDICES = np.array([7, 3, 9, 0, 5, 2])


def never(*_):
    raise AssertionError("not to be asked")


def keep_all(size: int | None = None):
    """A selector that chooses everything, or the first rows."""
    return lambda indices, step, losses: indices[:size]


def test_uniform_keeps_distinct_rows_in_plan_order_by_seed_and_step():
    select = UniformSelection().build(4, 0, never)
    chosen = select(INDICES, 3, never)
    places = [INDICES.tolist().index(i) for i in chosen]
    assert len(chosen) == 4 and places == sorted(set(places))
    assert np.array_equal(chosen, UniformSelection().build(4, 0, never)(INDICES, 3, never))
    others = [select(INDICES, step, never).tolist() for step in range(20)]
    assert len({tuple(o) for o in others}) > 5
    assert select(INDICES[:3], 0, never).tolist() == INDICES[:3].tolist()  # a short last batch


def test_uniform_chooses_every_row_equally_often():
    select = UniformSelection().build(2, 1, never)
    chosen = np.concatenate([select(INDICES, step, never) for step in range(3000)])
    counts = np.bincount(chosen, minlength=10)[INDICES]
    assert counts == pytest.approx(1000, abs=5 * np.sqrt(3000 * (1 / 3) * (2 / 3)))


def test_rho_keeps_what_is_still_to_be_learned():
    irreducible = np.zeros(10)
    irreducible[[3, 5]] = 4.0, 0.5
    asked = []

    def holdout(tuned, start):
        asked.append((tuned, start))
        return irreducible

    select = RHOLoss("tuned", "start").build(3, 0, holdout)
    now = {7: 1.0, 3: 4.5, 9: 0.125, 0: 2.0, 5: 1.5, 2: 0.125}  # rho 1, 0.5, 0.125, 2, 1, 0.125
    losses = lambda indices: np.array([now[i] for i in indices.tolist()])  # noqa: E731
    assert select(INDICES, 0, losses).tolist() == [7, 0, 5]  # row 3 has the largest loss, and it is noise
    assert asked == [("tuned", "start")]
    now |= {7: 0.5, 3: 4.25, 9: 0.25, 0: 0.25, 5: 0.5}  # rho 0.5, 0.25, 0.25, 0.25, 0, 0.125
    assert select(INDICES, 0, losses).tolist() == [7, 3, 9]  # ties: the earlier rows
    now[2] = float("nan")
    assert 2 in select(INDICES, 0, losses)  # the guard has to see it
    assert select(INDICES[:2], 0, never).tolist() == INDICES[:2].tolist()


@pytest.mark.parametrize("loss", [SFT(), VarianceReduced(beta=0.1), DPO(beta=0.1, reference_free=True)])
def test_rho_refuses_losses_it_has_no_meaning_for(loss):
    with pytest.raises(UserError, match="rho_loss_dpo"):
        RHOLoss("a", "b").check(loss)


def test_a_selection_of_everything_changes_nothing(tmp_path):
    plain = make_trainer(tmp_path / "a", DPO(beta=0.5), weighting=GroupRobust(step_size=0.1))
    chosen = make_trainer(tmp_path / "b", DPO(beta=0.5), weighting=GroupRobust(step_size=0.1))
    chosen.parts.selector = keep_all()
    for _ in range(3):
        assert plain.step() == chosen.step()
    assert np.array_equal(parameters(plain), parameters(chosen))


def test_the_step_is_that_of_the_chosen_rows_but_the_counter_is_the_batchs(tmp_path):
    rows = make_rows()
    big = make_trainer(tmp_path / "a", IPO(beta=0.5), rows=rows, weighting=GroupRobust(step_size=0.1))
    big.parts.selector = keep_all(4)
    first = big.parts.plan.step_rows(0)
    metrics = big.step()
    assert big.examples == 6
    counts = np.bincount([rows[i].group for i in first[:4]], minlength=3)
    assert [metrics[f"train/group_counts/group_{g}"] for g in GROUPS] == counts.tolist()
    # the same step with a plan that gives these four rows alone
    small = make_trainer(tmp_path / "b", IPO(beta=0.5), rows=rows, weighting=GroupRobust(step_size=0.1))
    small.parts.plan.step_rows = lambda step: first[:4]
    expected = small.step()
    assert small.examples == 4
    assert metrics == expected and np.array_equal(parameters(big), parameters(small))


def test_current_losses_are_those_of_the_loss_without_weights(tmp_path):
    rows = make_rows()
    trainer = make_trainer(tmp_path, DPO(beta=0.5), rows=rows, gradient_accumulation_steps=3)
    indices = trainer.parts.plan.step_rows(0)
    seen = {}
    trainer.parts.selector = lambda indices, step, losses: seen.setdefault("rows", indices)
    found = trainer.losses(indices)
    metrics = trainer.step()
    weights = np.array([rows[i].weight for i in indices])
    assert metrics["train/loss"] == pytest.approx((weights * found).mean(), rel=1e-6)
    assert np.array_equal(seen["rows"], indices)
    assert all(p.grad is None for p in trainer.parameters)
    one_by_one = np.concatenate([trainer.losses(indices[k : k + 1]) for k in range(len(indices))])
    assert one_by_one == pytest.approx(trainer.losses(indices), rel=1e-9)


# --------------------------------------------------------------------------------------------- the program

SMALL = [
    "model=tiny-gpt2", "data.opinions.num_train=40", "data.opinions.num_validation=0", "data.opinions.num_test=10",
    "batch_size=16", "n_epochs=null", "n_examples=48", "eval_every=16", "wandb.enabled=false", "lr=1e-3", "do_first_eval=false",
    "loss.beta=0.5", "assert_sft_step=false",
]  # fmt: skip


def start(root: Path, *words: str) -> list[dict]:
    run = compose([*SMALL, f"run_root={root}", f"cache_dir={root}/cache", *words])
    assembly.run_training(run)
    lines = (Path(run.config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A run that starts from the run beside it, "sft", and records the losses of its training rows."""
    root = tmp_path_factory.mktemp("tuned")
    start(root, "loss=dpo", "exp_name=sft", "lr=1e-2", "seed=1")
    words = ["eval_train_data=true", "n_eval_examples=null", f"model.archive={root}/sft/LATEST"]
    start(root, "loss=dpo", "exp_name=tuned", "lr=1e-2", *words)
    return root / "tuned"


def rho(tuned: Path) -> list[str]:
    return [
        "loss=gr_dpo", "data_selection=rho_loss_dpo", "selected_batch_size=6", "gradient_accumulation_steps=2",
        f"data_selection.ft_state_dict_path={tuned}/LATEST", f"data_selection.sft_state_dict_path={tuned.parent}/sft/LATEST",
    ]  # fmt: skip


def test_a_missing_model_is_told_before_the_policy_is_loaded(tmp_path, tuned, monkeypatch):
    monkeypatch.setattr(assembly.models, "build_policy", lambda *args, **kwargs: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"data_selection\.ft_state_dict_path=/no/such: no such file"):
        start(tmp_path, *rho(tuned), "data_selection.ft_state_dict_path=/no/such")


def test_a_continued_run_chooses_the_same_rows(tmp_path, tuned):
    whole = start(tmp_path, *rho(tuned), "exp_name=whole")
    assert [row["examples"] for row in whole] == [16, 32, 40, 48]
    groups = ("north", "south", "coast", "hills", "plain")
    assert [sum(row.get(f"train/group_counts/group_{g}", 0) for g in groups) for row in whole] == [6] * 4
    cut = start(tmp_path, *rho(tuned), "exp_name=cut", f"resume_from={tmp_path}/whole/step-32")
    times = ("time", "examples_per_second")
    rest = [[{k: v for k, v in row.items() if k not in times} for row in rows[-2:]] for rows in (whole, cut)]
    assert len(cut) == 2 and rest[0] == rest[1]


def test_the_irreducible_losses_are_those_the_tuned_run_ended_with(tmp_path, tuned, monkeypatch):
    seen = {}
    original = RunModels.holdout_losses

    def spy(self, *archives):
        found = original(self, *archives)
        seen.update(zip((row.uid for row in self.data.rows["train"]), found.tolist(), strict=True))
        return found

    monkeypatch.setattr(RunModels, "holdout_losses", spy)
    start(tmp_path, *rho(tuned), "n_examples=16")
    records = map(json.loads, (tuned / "records" / "train_eval-48.jsonl").read_text().splitlines())
    expected = {record["uid"]: record["loss"] for record in records}
    assert np.std(list(expected.values())) > 0.01 and seen == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data_selection=uniform"], "selected_batch_size=None: give both"),
        (["selected_batch_size=4"], "data_selection=none selected_batch_size=4: give both"),
        (["data_selection=uniform", "selected_batch_size=17"], "at most batch_size=16"),
        (["data_selection=unifrom", "selected_batch_size=4"], "did you mean 'uniform'"),
        (["data_selection=rho_loss_dpo", "selected_batch_size=4"], "data_selection.ft_state_dict_path is required"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        compose([*SMALL, "loss=dpo", *words])
