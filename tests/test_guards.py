"""Non-finite steps, spikes and signals."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import pytest

from engine.guards import NonFiniteError, NonFiniteGuard, SignalFlag, SpikeGuard
from tests.test_checkpoint import in_child
from utils import UserError, stream


def test_a_finite_step_is_taken(tmp_path):
    guard = NonFiniteGuard(tmp_path)
    assert guard.check(True, 1, ["a"])
    assert list(tmp_path.iterdir()) == []


def test_raise_mode_names_the_examples(tmp_path):
    guard = NonFiniteGuard(tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 7: .*bad_batch-step-7.json"):
        guard.check(False, 7, ["hh/train:1", "hh/train:9"], {"loss": math.nan, "grad_norm": 2.0})
    told = json.loads((tmp_path / "bad_batch-step-7.json").read_text())
    assert told == {"step": 7, "uids": ["hh/train:1", "hh/train:9"], "loss": "nan", "grad_norm": 2.0}


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(NonFiniteError):
        NonFiniteGuard(tmp_path).check(False, 7, ["a"])
    assert list(tmp_path.iterdir()) == []


def test_skip_mode_counts_and_gives_up_after_too_many_in_a_row(tmp_path):
    guard = NonFiniteGuard(tmp_path, "skip", max_consecutive=2)
    taken = [
        guard.check(finite, step, ["a"]) for step, finite in enumerate([False, False, True, False, False])
    ]
    assert taken == [False, False, True, False, False]
    assert guard.skipped == 4
    again = NonFiniteGuard(tmp_path, "skip", max_consecutive=2)
    again.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    with pytest.raises(NonFiniteError, match="3 steps in a row, more than max_consecutive_nonfinite=2"):
        again.check(False, 5, ["a"])


def test_guard_settings_are_checked(tmp_path):
    with pytest.raises(UserError, match="nonfinite=ignore"):
        NonFiniteGuard(tmp_path, "ignore")
    with pytest.raises(UserError, match="max_consecutive_nonfinite=0"):
        NonFiniteGuard(tmp_path, "skip", 0)
    with pytest.raises(UserError, match=r"spike_factor=1\.0"):
        SpikeGuard(1.0)
    with pytest.raises(UserError, match="spike_window=0"):
        SpikeGuard(10.0, 0)


# -------------------------------------------------------------------------------------------------- spikes


def quiet(steps: int) -> list[tuple[float, float]]:
    noise = stream(0, "noise").normal(size=(steps, 2))
    return [(0.69 + 0.05 * a, 3.0 + 0.5 * abs(b)) for a, b in noise]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_one_scaled_batch_is_the_only_spike(tmp_path, name, sign):
    guard = SpikeGuard(10.0, window=20, run_dir=tmp_path)
    found = {}
    for step, (loss, norm) in enumerate(quiet(200)):
        if step == 60:
            loss, norm = (loss * 1e4, norm) if name == "loss" else (loss, norm * 1e4)
        if spiked := guard.update(step, sign * loss, norm, [f"row:{step}"]):
            found[step] = spiked
    assert found == {60: [name]}
    assert guard.count == 1
    row = json.loads((tmp_path / "spikes.jsonl").read_text())
    assert (row["step"], row["spiked"], row["uids"]) == (60, [name], ["row:60"])


def test_one_outlier_does_not_blind_the_guard_to_the_next():
    guard = SpikeGuard(10.0, window=20)
    losses = {50: 1e6, 55: 30.0}
    assert [s for s in range(100) if guard.update(s, losses.get(s, 1.0), 1.0, [])] == [50, 55]


def test_a_lasting_change_of_level_is_learnt():
    guard = SpikeGuard(10.0, window=20)
    spikes = [bool(guard.update(s, 1.0 if s < 50 else 30.0, 1.0, [])) for s in range(200)]
    assert spikes[50]
    assert not any(spikes[80:])
    assert guard.means["loss"] == pytest.approx(30.0, rel=0.01)


def test_the_first_steps_are_not_judged_and_weigh_alike():
    guard = SpikeGuard(10.0, window=5)
    for step, loss in enumerate([1000.0, 1.0, 1.0]):
        assert guard.update(step, loss, 1.0, []) == []
    assert guard.means["loss"] == pytest.approx(334.0, rel=1e-3)


def test_spike_state_continues_and_off_is_off():
    whole, first, second = SpikeGuard(3.0, 10), SpikeGuard(3.0, 10), SpikeGuard(3.0, 10)
    series = [(loss * (50 if s % 17 == 0 else 1), norm) for s, (loss, norm) in enumerate(quiet(60))]
    expected = [whole.update(s, loss, norm, []) for s, (loss, norm) in enumerate(series)]
    for s in range(25):
        first.update(s, *series[s], [])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.update(s, *series[s], []) for s in range(25, 60)] == expected[25:]
    assert second.state_dict() == whole.state_dict()
    assert whole.count == 3
    assert SpikeGuard(None).update(1, 1e9, 1e9, []) == []
    assert whole.update(99, math.nan, math.inf, []) == []


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_sets_the_flag_and_the_old_handlers_come_back(number, code):
    before = [signal.getsignal(s) for s in SignalFlag.SIGNALS]
    with SignalFlag() as flag:
        assert (flag.is_set, flag.exit_code) == (False, 0)
        os.kill(os.getpid(), number)
        assert flag.is_set
        os.kill(os.getpid(), number)  # a launcher's echo
        assert (flag.number, flag.exit_code) == (number, code)
    assert [signal.getsignal(s) for s in SignalFlag.SIGNALS] == before


@pytest.mark.fault
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_exits_at_once(monkeypatch, number, code):
    monkeypatch.setattr(SignalFlag, "ECHO_S", 0.01)

    def body() -> None:
        with SignalFlag():
            os.kill(os.getpid(), number)
            time.sleep(0.05)
            os.kill(os.getpid(), number)
            time.sleep(5.0)

    assert in_child(body) == code
