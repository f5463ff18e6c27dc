"""The report page: complete, self-contained, safe with whatever a model wrote."""

from __future__ import annotations

import base64
import json
from html.parser import HTMLParser

import pytest

from commands.report import main, page
from engine.stats import wilson
from plot_scripts.sources import run as run_command
from tests.synthetic_runs import make_run, share_at

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags are balanced; collects text, tags, links and the cells of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = make_run(
        tmp_path_factory.mktemp("runs"), "gr_dpo", 1, weighting="group_robust", records=True, dirty=True
    )
    (path / "samples").mkdir()
    trained = (path / "records" / "test-500.jsonl").read_text().replace('"uid": "', '"uid": "trained ')
    (path / "records" / "train_eval-500.jsonl").write_text(trained)
    for examples, word in (
        (0, "before"),
        (200, "never shown"),
        (500, "after <script>alert(1)</script> & more"),
    ):
        rows = [
            {
                "model": model,
                "uid": f"u{i}",
                "group": "north",
                "prompt": f"Question {i}?\nSecond line",
                "sample": text,
                "finished": i == 0,
            }
            for model, text in (("policy", word), ("reference", "from the reference"))
            for i in (0, 1)
        ]
        (path / "samples" / f"{examples}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def parsed(folder):
    return Page(page(folder))


def test_the_page_needs_nothing_from_outside(parsed):
    assert parsed.links
    assert all(link.startswith("data:image/png;base64,") for link in parsed.links)
    assert not {"script", "link", "iframe"} & set(parsed.tags)
    for link in parsed.links:
        assert base64.b64decode(link.partition(",")[2]).startswith(b"\x89PNG")


def test_results_show_every_group_with_its_interval(parsed):
    head = parsed.rows[0]
    assert head == ["metric", "all", "mean", "worst", "north", "south"]
    row = next(r for r in parsed.rows if r[0] == "rewards/accuracies")
    exact = wilson(share_at(500, 1, 1) * 40, 40)
    assert row[5] == f"{exact.estimate:.4f} [{exact.low:.3f}, {exact.high:.3f}]"
    assert float(row[3].split()[0]) == pytest.approx(share_at(500, 1, 1))
    assert "Results: test, after 500 examples" in parsed.text


def test_warnings_and_facts_are_at_the_top(parsed):
    assert "1 of 1 runs had uncommitted changes" in parsed.text
    assert "seed: 1" in parsed.text
    assert "examples: 500" in parsed.text
    assert "gr_dpo_seed_1" in parsed.text


def test_samples_stand_side_by_side_first_reference_last(parsed):
    at = next(i for i, row in enumerate(parsed.rows) if row[:2] == ["group", "prompt"])
    assert parsed.rows[at][2:] == ["policy at 0 examples", "reference", "policy at 500 examples"]
    row = parsed.rows[at + 1]
    assert row == [
        "north",
        "Question 0?\nSecond line",
        "before",
        "from the reference",
        "after <script>alert(1)</script> & more",
    ]
    assert parsed.rows[at + 2][4].endswith("[…]")
    assert "never shown" not in parsed.text


def test_the_hardest_examples_and_the_settings_are_there(parsed):
    at = next(i for i, row in enumerate(parsed.rows) if row[0] == "example")
    losses = [float(row[2]) for row in parsed.rows[at + 1 : at + 11]]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 10
    assert "trained " not in parsed.text  # a training example may be the hardest of all, but is not held out
    assert "name: group_robust" in parsed.text
    assert '"command"' in parsed.text


def test_a_runs_name_is_text(tmp_path):
    assert "<title>a &lt;b&gt;</title>" in page(make_run(tmp_path, "dpo", 0, name="a <b>"))


def test_a_run_with_nothing_but_a_training_loss_still_has_a_page(tmp_path):
    path = tmp_path / "bare"
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "examples": 8, "train/loss": 2.0}\n')
    written = main([str(path), f"out={tmp_path / 'page.html'}"])
    found = Page(written[0].read_text())
    assert "not finished" in found.text
    assert "Samples" not in found.text


def test_each_run_gets_its_page_and_mistakes_one_message(folder, capsys):
    assert main([str(folder)]) == [folder / "figures" / "report.html"]
    assert run_command(main, [str(folder), "ouut=x.html"]) == 2
    assert "did you mean 'out'" in capsys.readouterr().err
    assert run_command(main, [str(folder), f"out={folder}"]) == 2
    assert "s a directory" in capsys.readouterr().err
