"""docs/bandits.md as it is written from results, and bandit records in the plotting loader."""

from __future__ import annotations

import numpy as np
import pytest

from bandits import document, run
from bandits.report import Claim, Report
from plot_scripts.load import load_directories
from utils import UserError


def experiment(root, bound: float = 0.1) -> Report:
    """A finished experiment "toy" with two cells, two steps and three seeds."""
    report = Report(root / "toy")
    for cell, gain in (("a / N@R4", 0.2), ("b@R4", 0.0)):
        values = np.array([[0.0, 0.0, 0.0], [0.5, 0.6, 0.7]]) + gain
        report.curve(cell, [0, 10], [0, 100], {"reward": values}, [3, 4, 5], ["reward"])
    report.finish([Claim("a beats b", "a / N@R4", "reward", "b@R4", at_least=bound)])
    return report


def test_a_finished_experiment_fills_its_block_and_no_other(tmp_path):
    experiment(tmp_path)
    old = "# x\n<!-- summary -->\n<!-- end -->\n<!-- results toy -->\nold\n<!-- end -->\ntext\n<!-- results other -->\nkept\n<!-- end -->\n"
    (tmp_path / "doc.md").write_text(old)
    assert document.main([str(tmp_path), str(tmp_path / "doc.md")]) == 0
    new = (tmp_path / "doc.md").read_text()
    assert "| a beats b | reward, difference | 0.2 [0.2, 0.2] | >= 0.1 | 3 | agrees |" in new
    assert "old" not in new and "\ntext\n" in new and "kept" in new
    assert "| [`toy`](#toy) | " in new and "| all | | 1 | 0 | 0 |" in new


def test_an_unfinished_experiment_and_a_missing_block_are_refused(tmp_path, capsys):
    experiment(tmp_path)
    (tmp_path / "doc.md").write_text("nothing")
    assert document.main([str(tmp_path), str(tmp_path / "doc.md")]) == 2
    assert "no block for toy" in capsys.readouterr().err
    (tmp_path / "toy" / "metrics.jsonl").write_text('{"kind": "result"}\n')
    with pytest.raises(UserError, match="has not finished"):
        document.block(tmp_path / "toy")


def test_the_plotting_loader_reads_each_cell_and_seed_as_a_run(tmp_path):
    experiment(tmp_path)
    loaded = load_directories([tmp_path])
    assert loaded.methods == ["a / N@R4", "b@R4"] and len(loaded.runs) == 6
    assert [info.seed for info in loaded.of("b@R4")] == [3, 4, 5] and all(r.finished for r in loaded.runs)
    examples, reward = loaded.series[loaded.of("a / N@R4")[1].run, "eval", "reward", ""]
    assert examples.tolist() == [0, 100] and reward.tolist() == pytest.approx([0.2, 0.8])


def test_a_claim_without_a_bound_is_refused():
    with pytest.raises(UserError, match="at_least or at_most"):
        Claim("x", "a", "reward")


def test_the_document_has_one_block_for_every_experiment():
    names = [
        found["name"] for found in document.BLOCK.finditer(document.DOCUMENT.read_text(encoding="utf-8"))
    ]
    assert sorted(names) == run.experiments()
