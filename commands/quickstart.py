"""The main job on the built-in data, start to finish: SFT, preference training from it, a table, a figure, a report.

    bash scripts/quickstart.sh [OVERRIDES...]        e.g. run_root=/elsewhere, seed=1

Run again, it continues where it was, or shows the finished results.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

from commands import report
from config.compose import compose
from data import opinions
from data.opinions import bayes_accuracy
from engine.results import accuracy_cell
from plot_scripts.quickstart import quickstart_figure
from utils import UserError, setup_logging

ROOT = Path(__file__).resolve().parents[1]
# Measured on this data: a gentle SFT leaves the model able to learn (at lr 1e-3 it settles on one answer for all and DPO needs
# three times as long); sep_pairs, because a prompt has a dozen pairs and a batch should hold many prompts.
COMMON = [
    "model=tiny",
    "datasets=[opinions]",
    "sep_pairs=true",
    "batch_size=64",
    "eval_every=2000",
    "n_eval_examples=null",
]
COMMON += ["eval_batch_size=256"]
SFT = [
    "loss=sft",
    "loss.sft_on=all",
    "lr=3e-4",
    "n_epochs=null",
    "n_examples=4000",
    "exp_name=quickstart/sft",
]
PREFERENCE = [
    "loss=dpo",
    "loss.beta=1",
    "lr=1e-3",
    "lr_schedule=cosine",
    "n_epochs=4",
    "sample_during_eval=true",  # for the report
    "sample_max_new_tokens=8",
    "exp_name=quickstart/dpo",
]


def train(words: list[str]) -> None:
    """`python train.py ...` as a user would type it; its exit code ends ours."""
    command = ["train.py", *words]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    code = subprocess.call([sys.executable, "-u", *command], cwd=ROOT)
    if code:
        raise SystemExit(code)


def main() -> None:
    """Two trainings and what came of them."""
    setup_logging()
    extra = sys.argv[1:]
    if {"-h", "--help"} & set(extra):
        print(__doc__)
        return
    run = compose([*COMMON, *SFT, *extra])
    root = Path(run.config.run_root)
    sft, preference = root / "quickstart" / "sft", root / "quickstart" / "dpo"
    train([*COMMON, *SFT, *extra])
    train([*COMMON, *PREFERENCE, f"model.archive={sft / 'LATEST'}", *extra])

    test = opinions.load("opinions", run.datasets[0].settings, run.config.seed)["test"]
    groups = list(dict.fromkeys(e.group for e in test))
    bayes = {g: bayes_accuracy([e for e in test if e.group == g]) for g in groups}
    figure = quickstart_figure([sft, preference], root / "quickstart" / "figures", {"Bayes rate": bayes})
    pages = report.main([str(preference)])
    print(
        "\n"
        + table(
            json.loads((preference / "results.json").read_text(encoding="utf-8")), bayes, bayes_accuracy(test)
        )
    )
    print("\n".join(f"  {path}" for path in [sft, preference, *figure]))
    print("\n".join(f"  {path}   (curves, tables and samples; opens in a browser)" for path in pages))


def table(results: dict, bayes: dict[str, float], overall: float) -> str:
    """Held-out results per group beside what is attainable."""
    lines = [
        "Held-out test pairs: reward accuracy, and the Bayes rate of the planted law (nobody can do better on average)"
    ]
    lines.append(
        f"  {'group':<8} {'loss':>8}  {'accuracy [95% interval]':<26} {'Bayes':>6}  {'gap closed':>10}  {'n':>5}"
    )
    for row in results["splits"]["test"]["table"]:
        best = overall if row["group"] == "all" else bayes[row["group"]]
        closed = (row["accuracy"] - 0.5) / (best - 0.5)
        lines.append(
            f"  {row['group']:<8} {row['loss']:>8.4f}  {accuracy_cell(row):<26} {best:>6.3f}  {closed:>9.0%}  {row['n']:>6}"
        )
    return "\n".join(lines) + "\n\nWritten:"


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
