"""commands.score on tiny checkpoints: what it reports agrees with the runs' own records, and win rates with their definition."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import assembly
from commands import score
from commands.cli import split
from commands.judge import JudgeSettings
from commands.score import Settings
from commands.wins import Contest, by_scorer
from config.build import build
from config.compose import compose
from data.schema import Example
from engine import stats
from utils import UserError

DATA = [
    "model=tiny-llama", "data.opinions.num_train=30", "data.opinions.num_validation=10", "data.opinions.num_test=40",
    "max_length=72", "max_prompt_length=64",
]  # fmt: skip
TRAIN = [
    "batch_size=10",
    "n_examples=20",
    "eval_every=20",
    "lr=1e-2",
    "warmup_steps=0",
    "wandb.enabled=false",
]


def longer(prompt: str, responses: list[str], row: object) -> list[float]:
    """A preference function for the tests: the more characters, the better."""
    return [float(len(text)) for text in responses]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """sft, ipo, gr_ipo and reward: 20 examples each."""
    root = tmp_path_factory.mktemp("runs")

    def train(name: str, *words: str) -> None:
        run = compose(
            [*DATA, *TRAIN, f"run_root={root}", f"cache_dir={root}/cache", f"exp_name={name}", *words]
        )
        assembly.run_training(run)

    train("sft", "loss=sft")
    for name, loss in (
        ("ipo", ["loss=ipo", "loss.beta=0.5"]),
        ("dpo", ["loss=dpo", "loss.beta=0.1"]),
        ("reward", ["loss=reward"]),
    ):
        train(name, *loss, f"model.archive={root}/sft/LATEST")
    return root


def call(runs: Path, out: Path, *words: str, **settings):
    """The command in this process: (scores.csv, scores.json, samples, wins)."""
    if not any(w.startswith("model.archive=") for w in words):
        words = (*words, f"model.archive={runs}/ipo/LATEST")
    options = {"num_prompts": 8, **settings}
    score.run(compose([*DATA, *words]), Settings(out=str(out), **options))

    def rows(name: str) -> list[dict]:
        path = out / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    with (out / "scores.csv").open(newline="") as handle:
        table = list(csv.DictReader(handle))
    return table, json.loads((out / "scores.json").read_text()), rows("samples.jsonl"), rows("wins.jsonl")


def cell(table: list[dict], metric: str, group: str = "all", model: str = "policy") -> dict:
    (row,) = [r for r in table if (r["model"], r["metric"], r["group"]) == (model, metric, group)]
    return row


# ------------------------------------------------------------------------------------------------ labelled pairs


def test_scores_are_those_of_the_run_itself(runs, tmp_path, capsys):
    table, document, samples, _ = call(runs, tmp_path, num_prompts=0)
    recorded = json.loads((runs / "ipo" / "results.json").read_text())["splits"]["test"]
    for metric, row in (
        ("rewards/accuracies", "all"),
        ("logps/chosen", "all"),
        ("loss", "north"),
        ("rewards/margins", "plain"),
    ):
        name = f"test/{metric}" + ("" if row == "all" else f"/group_{row}")
        assert float(cell(table, metric, row)["value"]) == pytest.approx(recorded["metrics"][name], abs=1e-9)
    worst = cell(table, "rewards/accuracies", "worst_group")
    assert float(worst["ci_low"]) == recorded["metrics"]["test/rewards/accuracies/worst_group/ci_low"]
    assert {(r["step"], r["examples"], r["split"]) for r in table} == {("2", "20", "test")}
    assert document["archives"]["reference"] == f"{runs}/sft/LATEST"  # what the run started from
    assert "commit" in document["provenance"]["git"] and document["loss"].startswith("IPO")
    assert samples == [] and "rewards/accuracies" in capsys.readouterr().out


def test_every_number_but_aggregates_has_an_interval(runs, tmp_path):
    table, *_ = call(runs, tmp_path, num_prompts=0)
    records = [
        json.loads(line)
        for line in (tmp_path / "policy" / "records" / "test-20.jsonl").read_text().splitlines()
    ]
    mine = [r for r in records if r["group"] == "south"]
    expected = stats.cluster_mean([r["rewards/margins"] for r in mine], [r["prompt_key"] for r in mine])
    row = cell(table, "rewards/margins", "south")
    assert [float(row[c]) for c in ("value", "ci_low", "ci_high")] == [
        expected.estimate,
        expected.low,
        expected.high,
    ]
    assert all(r["ci_low"] for r in table if r["group"] not in ("mean_group", "worst_group"))


def test_another_reference_changes_the_rewards(runs, tmp_path):
    table, *_ = call(runs, tmp_path, num_prompts=0, reference=f"{runs}/ipo/LATEST")
    assert (
        float(cell(table, "rewards/margins")["value"]) == 0
        and float(cell(table, "rewards/accuracies")["value"]) == 0.5
    )


def test_a_reward_model_has_accuracies_and_no_responses(runs, tmp_path):
    table, _, samples, _ = call(runs, tmp_path, f"model.archive={runs}/reward/LATEST")
    recorded = json.loads((runs / "reward" / "results.json").read_text())["splits"]["test"]["metrics"]
    assert float(cell(table, "rewards/accuracies")["value"]) == recorded["test/rewards/accuracies"]
    assert samples == []


def test_an_adapter_is_scored_against_what_it_was_trained_on(runs, tmp_path):
    lora = ["model.use_lora=true", "model.lora_rank=2"]
    words = [*DATA, *TRAIN, *lora, f"run_root={runs}", f"cache_dir={runs}/cache", "exp_name=lora"]
    run = compose([*words, "loss=ipo", "loss.beta=0.5", f"model.archive={runs}/sft/LATEST"])
    assembly.run_training(run)
    table, *_ = call(runs, tmp_path, *lora, f"model.archive={runs}/lora/LATEST", num_prompts=2)
    recorded = json.loads((runs / "lora" / "results.json").read_text())["splits"]["test"]["metrics"]
    for metric in ("rewards/margins", "loss"):
        assert float(cell(table, metric)["value"]) == pytest.approx(recorded[f"test/{metric}"], abs=1e-9)
    assert abs(recorded["test/rewards/margins"]) > 1e-6


def test_settings_are_read_from_the_command_line():
    words = [
        "score.out=x",
        "score.judge.url=http://h/v1",
        "score.judge.model=m",
        "score.versus=[chosen]",
        "model=tiny",
    ]
    own, rest = split(words, "score")
    settings = build(Settings, own, "score.")
    assert (settings.judge.model, settings.versus, rest) == ("m", ("chosen",), ["model=tiny"])


def test_an_sft_run_is_scored_with_dpo_against_itself_untrained(runs, tmp_path):
    table, document, *_ = call(runs, tmp_path, f"model.archive={runs}/sft/LATEST", num_prompts=0, beta=0.5)
    assert document["loss"].startswith("DPO") and document["archives"]["reference"] is None
    assert cell(table, "policy_accuracies")["n"] == "40"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": ("train",), "num_prompts": 0, "function": "a:b"}, "score.num_prompts=0"),
        ({"num_samples": 0}, "score.num_samples=0"),
        ({"max_new_tokens": 0}, "score.max_new_tokens=0"),
        ({"temperature": -1.0}, "score.temperature=-1.0"),
        ({"top_p": 0.0}, "score.top_p=0.0"),
        ({"splits": ()}, "score.splits"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Settings(out="x", **settings)


def test_a_language_model_is_no_reward_model(runs, tmp_path):
    with pytest.raises(UserError, match=r"score\.reward_model=.*has no reward head"):
        call(runs, tmp_path, reward_model=f"{runs}/sft/LATEST")


# ------------------------------------------------------------------------------------------------ responses, win rates


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory):
    """Two checkpoints, the reference and the data, by a function and by a reward model."""
    out = tmp_path_factory.mktemp("compared")
    return (*call(
        runs, out, num_samples=2, versus=("reference", "chosen"), against=f"{runs}/dpo/LATEST",
        function="tests.test_score:longer", reward_model=f"{runs}/reward/LATEST",
    ), out)  # fmt: skip


def test_responses_stand_side_by_side(compared):
    _, _, samples, *_ = compared
    assert len(samples) == 16 and Counter(s["sample"] for s in samples) == {0: 8, 1: 8}
    assert len({s["prompt_key"] for s in samples}) == 8
    for s in samples:
        assert {"uid", "group", "prompt", "chosen", "policy", "against", "reference"} <= set(s)
    # drawn independently: a model's two responses differ, and so do two models' responses with one number
    assert sum(s["policy"] == s["reference"] for s in samples) < 4
    pairs = list(zip(samples[::2], samples[1::2], strict=True))
    assert sum(a["policy"] == b["policy"] for a, b in pairs) < 4


def test_win_rates_are_means_over_prompts_of_who_is_better(compared):
    table, _, samples, wins, _ = compared
    for model, other in (
        ("policy", "reference"),
        ("policy", "chosen"),
        ("against", "reference"),
        ("policy", "against"),
    ):
        mine = [w for w in wins if (w["by"], w["first"], w["second"]) == ("function", model, other)]
        sign = [np.sign(len(s[model]) - len(s[other])) for s in samples]
        assert [w["win"] for w in mine] == [(x + 1) / 2 for x in sign]
        row = cell(table, f"function/vs_{other}/win_rate", model=model)
        expected = stats.share_interval([w["win"] for w in mine], [s["prompt_key"] for s in samples])
        assert [float(row[c]) for c in ("value", "ci_low", "ci_high")] == [
            expected.estimate,
            expected.low,
            expected.high,
        ]
        assert row["n"] == "8"  # prompts, not responses
    assert any(w["by"] == "reward_model" and 0 < w["p"] < 1 and w["win"] in (0, 1) for w in wins)
    ratios = {(s["uid"], s["sample"]): s["policy_log_ratio"] for s in samples}
    assert all(w["log_ratio"] == ratios[w["uid"], w["sample"]] for w in wins if w["first"] == "policy")


def test_responses_are_drawn_once_for_every_prompt(runs, tmp_path):
    session = score.Session(
        compose([*DATA, f"model.archive={runs}/ipo/LATEST"]), Settings(out=str(tmp_path), num_prompts=100)
    )
    rows = session.data.rows["test"]
    found = [row for row, _ in session.prompts("test")]
    first = {row.prompt_key: row.uid for row in reversed(rows)}
    assert (
        len(first) < len(rows)
        and {row.prompt_key: row.uid for row in found} == first
        and len(found) == len(first)
    )
    assert all(row.uid == example.uid for row, example in session.prompts("test"))


def test_equal_responses_tie_unless_one_was_cut():
    def scorer(rows):
        return [np.array([1.0])] * len(rows)

    example = Example("u", "p", (("chosen", "a"), ("rejected", "b")), "g")
    contests = [Contest(example, "x", "x", done) for done in ((True, True), (False, False), (True, False))]
    assert [win.win for win in by_scorer(scorer, "function")(contests)] == [0.5, 0.5, 1.0]


def test_two_checkpoints_are_compared_on_the_same_examples(compared):
    _, document, _, wins, out = compared
    with (out / "differences.csv").open(newline="") as handle:
        rows = {(r["metric"], r["group"]): r for r in csv.DictReader(handle)}
    records = [
        {
            r["uid"]: r
            for r in map(json.loads, (out / name / "records" / "test-20.jsonl").read_text().splitlines())
        }
        for name in ("policy", "against")
    ]
    keys = list(records[0])
    expected = stats.paired_difference(
        *([part[k]["logps/chosen"] for k in keys] for part in records),
        [records[0][k]["prompt_key"] for k in keys],
    )
    found = rows["logps/chosen", "all"]
    assert [float(found[c]) for c in ("difference", "ci_low", "ci_high")] == [
        expected.estimate,
        expected.low,
        expected.high,
    ]
    won = {
        m: [w["win"] for w in wins if (w["by"], w["first"], w["second"]) == ("function", m, "reference")]
        for m in ("policy", "against")
    }
    found = rows["function/vs_reference/win_rate", "all"]
    assert float(found["difference"]) == pytest.approx(np.mean(won["policy"]) - np.mean(won["against"]))
    assert len(document["differences"]) == len(rows)
    assert ("rewards/accuracies", "north") in rows and ("reference_accuracies", "all") not in rows


def test_example_weights_count_in_differences_of_losses(runs, tmp_path):
    for name in ("train", "test"):
        rows = [
            {"prompt": f"{name} {i}", "chosen": "A", "rejected": "B", "weight": 4.0 if i % 3 else 0.5}
            for i in range(6)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (f"data.local.path={tmp_path}/train.jsonl", f"data.local.test_path={tmp_path}/test.jsonl")
    settings = Settings(out=str(tmp_path / "out"), against=f"{runs}/dpo/LATEST", num_prompts=0)
    score.run(compose([DATA[0], "datasets=[local]", *words, f"model.archive={runs}/ipo/LATEST"]), settings)
    document = json.loads((tmp_path / "out" / "scores.json").read_text())
    policy, against = (cell(document["scores"], "loss", model=m)["value"] for m in ("policy", "against"))
    (found,) = [d for d in document["differences"] if (d["metric"], d["group"]) == ("loss", "all")]
    assert found["difference"] == pytest.approx(policy - against) and found["difference"] != 0


def test_a_checkpoint_does_not_differ_from_itself(runs, tmp_path):
    table, document, *_ = call(runs, tmp_path, against=f"{runs}/ipo/LATEST", reference=f"{runs}/ipo/LATEST")
    scored = [d for d in document["differences"] if "/vs_" not in d["metric"]]
    assert scored and all(d["difference"] == d["ci_low"] == d["ci_high"] == 0 for d in scored if d["n"] > 1)
    assert float(cell(table, "samples/kl_to_reference")["value"]) == 0.0


def test_the_divergence_is_the_mean_log_ratio_of_own_responses(compared):
    table, _, samples, *_ = compared
    row = cell(table, "samples/kl_to_reference", model="against")
    ratios = [s["against_log_ratio"] for s in samples]
    assert float(row["value"]) == pytest.approx(np.mean(ratios)) and any(ratios)


# ------------------------------------------------------------------------------------------------ a judge


class Answers(BaseHTTPRequestHandler):
    """A judge: the longer response wins, "always A" if biased; the first request of all fails, one answer is unreadable."""

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked += 1
            first = server.asked == 1
        if first:
            self.send_error(503)
            return
        text = body["messages"][1]["content"]
        a, b = (text.split(f"Response {x}:\n")[1].split("\n\n")[0] for x in "AB")
        verdict = "A" if server.biased or len(a) > len(b) else "B" if len(a) < len(b) else "tie"
        content = json.dumps({"choices": [{"message": {"content": f"Well. [[{verdict}]]"}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    made.lock, made.asked, made.biased = threading.Lock(), 0, False
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def judge(server) -> JudgeSettings:
    return JudgeSettings(url=f"http://127.0.0.1:{server.server_port}/v1", model="judge", workers=2, retries=2)


def test_a_judge_is_asked_in_both_orders_and_only_once(runs, tmp_path, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    table, _, samples, wins = call(runs, tmp_path / "a", judge=judge(server), versus=("chosen",))
    differ = [s for s in samples if s["policy"] != s["chosen"]]
    assert server.asked == 2 * len(differ) + 1  # and the one that failed
    assert all(w["win"] in (0, 0.5, 1) for w in wins) and len(wins) == 8
    assert float(cell(table, "judge/vs_chosen/win_rate")["value"]) == np.mean([w["win"] for w in wins])
    assert float(cell(table, "judge/vs_chosen/orders_agree")["value"]) == 1.0
    call(runs, tmp_path / "a", judge=judge(server), versus=("chosen",))
    assert server.asked == 2 * len(differ) + 1


def test_a_judge_that_prefers_the_first_place_decides_nothing(runs, tmp_path, server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.biased = True
    table, *_ = call(runs, tmp_path, judge=judge(server))
    assert float(cell(table, "judge/vs_reference/win_rate")["value"]) == 0.5
    assert float(cell(table, "judge/vs_reference/orders_agree")["value"]) == 0.0


# ------------------------------------------------------------------------------------------------ lm-evaluation-harness


def lm_eval(tmp_path: Path, *words: str) -> subprocess.CompletedProcess:
    """scripts/run_lm_eval.sh with what ``tmp_path`` holds in front of the installed packages."""
    env = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        ["sh", "scripts/run_lm_eval.sh", *words],
        cwd=assembly.ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_harness_is_asked_about_the_runs_model_with_its_own_bos_rule(runs, tmp_path):
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text("import sys; print(' '.join(sys.argv[1:]))")
    done = lm_eval(tmp_path, f"{runs}/ipo", "--tasks", "piqa", "--limit", "2")
    assert done.returncode == 0, done.stderr
    tokenizer = AutoTokenizer.from_pretrained(runs / "ipo" / "LATEST")
    bos = tokenizer("x").input_ids[0] == tokenizer.bos_token_id
    assert f"pretrained={runs}/ipo/LATEST,add_bos_token={bos}" in done.stdout
    assert "--tasks piqa --limit 2" in done.stdout and "hellaswag" not in done.stdout
    assert "reward model" in lm_eval(tmp_path, f"{runs}/reward").stderr


def test_without_the_harness_the_script_says_how_to_get_it(runs, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError")
    done = lm_eval(tmp_path, f"{runs}/ipo")
    assert done.returncode == 2 and "lm_eval[hf]" in done.stderr and "Traceback" not in done.stderr
    for missing in (f"{tmp_path}/nothing", str(tmp_path)):
        assert lm_eval(tmp_path, missing).returncode == 2
