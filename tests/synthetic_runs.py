"""Run directories with known numbers, for the tests of figures, summaries and reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from utils import content_hash, stream

GROUPS = ("north", "south")
STEP = 100  # examples between evaluations
EXAMPLES_PER_GROUP = 40


def loss_at(examples: float, seed: int, offset: float = 0.0) -> float:
    """The loss that every synthetic run logs: known, different for each seed, not linear in the seed."""
    return 2.0 - examples / 1000.0 + 0.1 * (seed - 1) ** 2 + offset


def share_at(examples: float, seed: int, group: int) -> float:
    """Accuracy of a group, a multiple of 1/40."""
    return (20 + int(examples) // 100 + 2 * seed - 4 * group) / EXAMPLES_PER_GROUP


def make_run(
    root: Path,
    loss: str,
    seed: int,
    *,
    last: int = 500,
    offset: float = 0.0,
    weighting: str = "uniform",
    commit: str = "a" * 40,
    dirty: bool = False,
    lr: float = 1e-4,
    groups: Sequence[str] = GROUPS,
    records: bool = False,
    name: str | None = None,
) -> Path:
    """A finished run of ``last`` examples, evaluated every 100: the loss falls linearly, groups gain one pair per evaluation."""
    folder = Path(root) / (name or f"{loss}_seed_{seed}")
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "exp_name": folder.name,
        "lr": lr,
        "loss": {"name": loss, "beta": 0.1},
        "weighting": {"name": weighting},
        "datasets": list(groups),
    }
    identity = {k: v for k, v in config.items() if k not in ("seed", "exp_name")}
    facts = {
        "git": {"commit": commit, "dirty": dirty},
        "versions": {"torch": "2.13.0"},
        "config_hash": content_hash({**identity, "seed": seed}),
        "config_hash_no_seed": content_hash(identity),
        "command": ["train.py", f"loss={loss}", f"seed={seed}"],
        "seed": seed,
        "started": "2026-01-01T00:00:00Z",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "provenance.json").write_text(json.dumps(facts))
    rows = [row for x in range(0, last + 1, STEP) for row in _rows(x, seed, offset, weighting, groups)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "results.json").write_text(json.dumps({k: v for k, v in rows[-1].items() if "/" in k}))
    if records:
        _write_records(folder, seed, last, offset, groups)
    return folder


def _rows(x: int, seed: int, offset: float, weighting: str, groups: Sequence[str]) -> list[dict]:
    place = {"step": x // 10, "examples": x, "epoch": 0, "time": x / 50.0}
    rows = []
    if x > 0:
        train = {
            "kind": "train",
            **place,
            "train/loss": loss_at(x, seed, offset) + 0.05,
            "grad_norm": 1.0,
            "lr": 1e-4,
        }
        train["examples_per_second"] = 50.0 + seed
        if weighting == "group_robust":
            first = 0.5 + x / 2000.0
            train |= {f"train/weights/{groups[0]}": first, f"train/weights/{groups[1]}": 1.0 - first}
        rows.append(train)
    for split in ("eval", "test"):
        row = {"kind": "eval", "split": split, **place, f"{split}/loss": loss_at(x, seed, offset)}
        shares = [share_at(x, seed, g) for g in range(len(groups))]
        for metric, values in (
            ("rewards/accuracies", shares),
            ("policy_accuracies", [s - 0.1 for s in shares]),
        ):
            row[f"{split}/{metric}"] = float(np.mean(values))
            row |= {f"{split}/{metric}/group_{g}": v for g, v in zip(groups, values, strict=True)}
        row |= {f"{split}/loss/group_{g}": loss_at(x, seed, offset) + 0.2 * i for i, g in enumerate(groups)}
        row |= {f"{split}/group_counts/group_{g}": EXAMPLES_PER_GROUP for g in groups}
        for metric, slope in (("chosen", 0.1), ("rejected", -0.4), ("margins", 0.5)):
            row[f"{split}/rewards/{metric}"] = slope * x / 1000.0
        rows.append(row)
    return rows


def _write_records(folder: Path, seed: int, last: int, offset: float, groups: Sequence[str]) -> None:
    """Per-example losses: what is hard is hard in every run; two rows per prompt."""
    (folder / "records").mkdir()
    hard = stream(0, "synthetic/hard").normal(size=EXAMPLES_PER_GROUP * len(groups))
    noise = 0.02 * stream(seed, "synthetic/noise", folder.name).normal(size=len(hard))
    lines = []
    for i, (h, e) in enumerate(zip(hard, noise, strict=True)):
        group = groups[i // EXAMPLES_PER_GROUP]
        row = {"uid": f"synthetic/test:{i}", "group": group, "prompt_key": f"prompt-{i // 2}", "weight": 1.0}
        row["num_tokens"] = 2 + i % 3
        row |= {"loss": 2.0 + h + e + offset, "rewards/accuracies": float(h + e + offset < 0)}
        lines.append(json.dumps(row) + "\n")
    (folder / "records" / f"test-{last}.jsonl").write_text("".join(lines))


class FakeApi:
    """What ``wandb.Api()`` would answer for runs that mirrored the metrics of these run directories."""

    def __init__(self, folders: Sequence[Path], translate: dict[str, str] | None = None) -> None:
        self.asked: list[tuple] = []
        self._runs = [FakeRun(folder, translate) for folder in folders]

    def runs(self, where: str, filters: dict, order: str) -> list[FakeRun]:
        self.asked.append((where, filters, order))
        return self._runs


class FakeRun:
    """``translate``: {our name: older name}; names that it lacks are not logged."""

    def __init__(self, folder: Path, translate: dict[str, str] | None = None) -> None:
        facts = json.loads((folder / "provenance.json").read_text())
        self.name, self.id, self.state = folder.name, content_hash(folder.name)[:8], "finished"
        self.config = yaml.safe_load((folder / "config.yaml").read_text())
        self.group, self.commit = facts["config_hash_no_seed"], facts["git"]["commit"]
        if translate is None:
            self.config["provenance"] = facts
        self._rows: dict[int, dict] = {}
        for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            kept = {k: v for k, v in row.items() if k not in ("kind", "split")}
            if translate is not None:
                kept = {translate[k]: v for k, v in kept.items() if k in translate}
            place = {"_step": row["examples"], "_timestamp": row["time"], "_runtime": row["time"]}
            self._rows.setdefault(row["examples"], place).update(kept)

    def scan_history(self) -> list[dict]:
        return list(self._rows.values())
