"""The plateau rule against torch's ReduceLROnPlateau where that is right, and against the truth where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engine.stopping import Decision, Never, NoStopping, Plateau
from utils import UserError, stream

ROOT = Path(__file__).resolve().parents[1]
LOSS, ACCURACY = "eval/loss/worst_group", "eval/rewards/accuracies/worst_group"


def rule(metric: str = LOSS, lr: float = 1.0, eval_every: int = 100, **settings):
    return Plateau(metric=metric, **settings).build(lr=lr, num_examples=10_000, eval_every=eval_every)


def feed(stopper, values, metric: str = LOSS) -> list[Decision]:
    return [stopper.update({metric: v}, step=i, examples=100 * i) for i, v in enumerate(values, 1)]


def torch_scales(values, mode: str, threshold: float, patience: int, cooldown: int) -> list[float]:
    """Learning rate (from 1) after each value, by torch."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode=mode, factor=0.1, patience=patience, threshold=threshold, cooldown=cooldown, eps=0.0
    )
    out = []
    for value in values:
        scheduler.step(value)
        out.append(optimizer.param_groups[0]["lr"])
    return out


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("kind", ["flat", "improving", "worsening", "noisy", "walk"])
@pytest.mark.parametrize(("threshold", "patience", "cooldown"), [(1e-3, 2, 0), (0.05, 0, 0), (0.0, 3, 2)])
def test_positive_metrics_are_cut_when_torch_cuts(mode, kind, threshold, patience, cooldown):
    noise = stream(0, "series", mode, kind).normal(size=40)
    sign = -1.0 if mode == "min" else 1.0
    values = {
        "flat": np.full(40, 3.0),
        "improving": 3.0 + sign * 0.02 * np.arange(40),
        "worsening": 3.0 - sign * 0.02 * np.arange(40),
        "noisy": 3.0 + 0.1 * noise,
        "walk": np.abs(5.0 + 0.1 * noise.cumsum()),
    }[kind]
    stopper = rule(
        LOSS if mode == "min" else ACCURACY, threshold=threshold, patience=patience, cooldown=cooldown
    )
    got = [d.lr_scale for d in feed(stopper, values, stopper.metric)]
    assert got == pytest.approx(torch_scales(values, mode, threshold, patience, cooldown), rel=1e-9)
    if kind in ("flat", "worsening"):
        assert got[-1] < 1.0


def test_a_flat_or_slowly_rising_loss_cuts_where_the_reference_rule_never_does():
    """The reference fed the negative loss to mode="max": 0.1 % worse per evaluation then counts as an improvement."""
    rising = np.linspace(2000.0, 2020.0, 40)  # by less than 0.1 % each time
    assert torch_scales(-rising, "max", 1e-3, 4, 0)[-1] == 1.0
    for series in (rising, np.full(40, 2500.0)):
        decisions = feed(rule(patience=4, lr=1.0, min_lr=1e-30), series)
        assert [i for i, d in enumerate(decisions, 1) if d.cut] == [6, 11, 16, 21, 26, 31, 36]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_negative_values_are_judged_by_their_size(sign):
    """A loss going from -1 to -1.0005 (or an accuracy-like score from -1 to -0.9995) improves by less than 0.1 %."""
    metric = LOSS if sign > 0 else ACCURACY
    stopper = rule(metric, patience=0, min_lr=1e-30)
    cuts = [d.cut for d in feed(stopper, [-1.0, -1.0 - sign * 0.0005, -1.0 - sign * 0.002], metric)]
    assert cuts == [False, True, False]


def test_the_paper_run_stops_after_four_cuts():
    """eval_every=960, patience_factor=2: the fifth evaluation without improvement cuts; lr 6e-5 ends at 6e-9 < 1e-8."""
    stopper = rule(lr=6e-5, eval_every=960, patience_factor=2.0, scheduler_metric="loss")
    assert stopper.patience == 4
    decisions = feed(stopper, [2500.0] * 30)
    assert [i for i, d in enumerate(decisions, 1) if d.cut] == [6, 11, 16, 21, 26]
    assert next(i for i, d in enumerate(decisions, 1) if d.stop) == 21
    assert decisions[20].lr_scale == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("eval_every", "factor"), [(960, 2.0), (700, 1.0), (192, 0.33), (20_000, 1.0), (500, 3.0)]
)
def test_the_reference_unit_of_patience_cuts_when_its_fraction_is_passed(eval_every, factor):
    fraction = (
        10 * (192 / eval_every) * factor
    )  # torch compares the count of bad evaluations with this number
    decisions = feed(rule(eval_every=eval_every, patience_factor=factor, min_lr=1e-30), [1.0] * 60)
    first_cut = next(i for i, d in enumerate(decisions) if d.cut)  # bad evaluations at the first cut
    assert first_cut - 1 <= fraction < first_cut


def test_min_lr_itself_counts_as_reached():
    decisions = feed(rule(lr=1e-6, min_lr=1e-8, patience=0), [1.0] * 4)
    assert [(d.cut, d.stop) for d in decisions] == [(False, False), (True, False), (True, True), (True, True)]


def test_the_best_is_strict_while_the_threshold_rules_only_the_cuts():
    stopper = rule(threshold=0.1, patience=10)
    decisions = feed(stopper, [1.0, 0.99, 0.98, 0.98, 1.5])
    assert [d.is_best for d in decisions] == [True, True, True, False, False]
    assert stopper.best == {"value": 0.98, "step": 3, "examples": 300}
    assert stopper.best_examples() == 300
    assert stopper.reference == 1.0
    assert stopper.bad == 4
    rising = rule(ACCURACY)
    feed(rising, [0.5, 0.7, 0.6], ACCURACY)
    assert rising.best_examples() == 200


def test_state_goes_through_json_and_continues_as_if_never_stopped():
    values = 3.0 + 0.05 * stream(1, "noise").normal(size=60)
    whole = rule(patience=2, cooldown=1, min_lr=1e-30)
    expected = feed(whole, values)
    for cut in (1, 7, 20, 43):
        first = rule(patience=2, cooldown=1, min_lr=1e-30)
        feed(first, values[:cut])
        second = rule(patience=2, cooldown=1, min_lr=1e-30)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.lr_scale == expected[cut - 1].lr_scale
        rest = [
            second.update({LOSS: v}, step=i, examples=100 * i) for i, v in enumerate(values[cut:], cut + 1)
        ]
        assert rest == expected[cut:]
        assert second.state_dict() == whole.state_dict()
        forgotten = [rule(patience=2, cooldown=1, min_lr=1e-30).update({LOSS: v}, 0, 0) for v in values[cut:]]
        assert forgotten != expected[cut:]  # so the state is needed


def test_another_metric_after_a_restart_starts_counting_anew():
    first = rule(patience=2)
    feed(first, [1.0, 1.0])
    second = rule(ACCURACY)
    second.load_state_dict(first.state_dict())
    assert second.reference is None


def test_a_run_with_one_group_uses_the_pooled_metric():
    assert rule().update({"eval/loss": 1.0}, 1, 100).is_best
    assert rule("eval/loss/mean_group").update({"eval/loss": 1.0}, 1, 100).is_best
    with pytest.raises(
        UserError, match=r"stopping\.metric=eval/loss/worst_group: the evaluation has no such metric"
    ):
        rule().update({"eval/loss": 1.0, "eval/loss/group_a": 1.0}, 1, 100)
    with pytest.raises(UserError, match="did you mean 'eval/loss/worst_group'"):
        rule("eval/loss/worst_grp", mode="min").update({LOSS: 1.0}, 1, 100)


def test_not_a_number_is_no_improvement_and_never_the_best():
    stopper = rule(patience=1)
    decisions = feed(stopper, [float("nan"), 1.0, float("nan"), float("inf"), float("nan")])
    assert [d.is_best for d in decisions] == [False, True, False, False, False]
    assert [d.cut for d in decisions] == [False, False, False, True, False]
    assert stopper.best["value"] == 1.0


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("eval/loss", "min"),
        ("eval/loss/group_accuracy", "min"),
        ("eval/policy_accuracies/mean_group", "max"),
        ("test/win_rate", "max"),
        ("eval/rewards/margins", None),
        ("eval/logps/chosen", None),
    ],
)
def test_the_direction_comes_from_the_name_or_is_asked_for(name, mode):
    if mode is None:
        with pytest.raises(UserError, match=r"stopping\.mode=null: .*give min or max"):
            Plateau(metric=name)
        assert Plateau(metric=name, mode="max").watched_mode() == "max"
    else:
        assert Plateau(metric=name).watched_mode() == mode
    assert Plateau(metric=name, mode="min").watched_mode() == "min"


def test_the_reference_size_rule_is_an_option():
    settings = Plateau(only_if_train_examples_over=2000)
    small = settings.build(lr=1e-4, num_examples=2000, eval_every=100)
    assert isinstance(small, Never)
    assert feed(small, [1.0] * 50)[-1] == Decision()
    assert not isinstance(settings.build(lr=1e-4, num_examples=2001, eval_every=100), Never)


def test_no_stopping_changes_nothing():
    stopper = NoStopping().build(lr=1.0, num_examples=10, eval_every=5)
    assert stopper.update({}, 1, 2) == Decision(lr_scale=1.0, cut=False, stop=False, is_best=False)
    assert (stopper.best_examples(), stopper.restores_best, stopper.state_dict()) == (None, False, {})
    stopper.load_state_dict({})
    with pytest.raises(UserError, match="stopping=none"):
        stopper.load_state_dict({"cuts": 1})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"threshold": -0.1}, "threshold"),
        ({"patience": -1}, "patience"),
        ({"patience_factor": 0.0}, "patience_factor"),
        ({"factor": 1.0}, "factor"),
        ({"factor": 0.0}, "factor"),
        ({"min_lr": 0.0}, "min_lr"),
        ({"cooldown": -1}, "cooldown"),
    ],
)
def test_impossible_settings_are_named(settings, key):
    with pytest.raises(UserError, match=f"stopping.{key}="):
        Plateau(**settings)


def test_a_learning_rate_below_the_stopping_point_is_named():
    with pytest.raises(UserError, match=r"stopping\.min_lr=1e-08: the run starts at lr=1e-09"):
        rule(lr=1e-9)


@pytest.mark.parametrize(("name", "cls"), [("none", NoStopping), ("plateau", Plateau)])
def test_the_yaml_files_state_the_defaults(name, cls):
    values = yaml.safe_load((ROOT / "config" / "stopping" / f"{name}.yaml").read_text())
    assert values.pop("name") == name
    assert values.pop("class") == f"engine.stopping.{cls.__name__}"
    assert cls(**values) == cls()
    assert set(values) == set(cls.__dataclass_fields__)
