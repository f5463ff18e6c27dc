"""Score a checkpoint, and compare it with another: reward accuracy and log-probs per group, generations, win rates.

    python -m commands.score model=tiny model.archive=runs/DPO/LATEST datasets=[opinions] score.out=DIR
    ... score.function=commands.oracles:opinions            win rate by a function of the prompt and the responses
    ... score.reward_model=runs/RM/LATEST                   by a model trained with loss=reward or loss=gpm
    ... score.judge.url=https://api.openai.com/v1 score.judge.model=NAME    by a language model, in both orders
    ... score.against=runs/IPO/LATEST                       the same of another checkpoint, and the paired differences

Data, model and n_eval_examples are given as for train.py. DIR gets scores.csv (a row per step, split, group and metric),
scores.json, differences.csv, samples.jsonl (all models' responses side by side), wins.jsonl and records/ (every example).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import assembly
import run_data
from commands.cli import entry
from commands.judge import JudgeSettings, plain_text
from commands.sample import as_text
from commands.score_table import AGAINST, POLICY, table
from commands.wins import Contest, Referee, Win, referees
from config.compose import Run, recorded
from data.schema import Batch, Example, Row
from engine import archives, checkpoint, models, parallel, results, runtime, sampling, scoring, stats
from engine.evaluation import ACCURACIES, PREFIX, Evaluator
from engine.parallel import World
from engine.preferences import load_function
from engine.reference import LiveReference
from losses.pairwise import DPO, PAIR
from losses.types import Loss
from trainers import autocast
from utils import UserError, git_facts, log, make_folder, stream, versions, write_atomic

REFERENCE, CHOSEN = "reference", "chosen"
COLUMNS = ("model", *results.COLUMNS)
DIFFERENCE_COLUMNS = ("a", "b", "split", "group", "metric", "difference", "ci_low", "ci_high", "n")


@dataclass(frozen=True)
class Settings:
    """out: folder of the results. splits: which are scored; responses are drawn for the prompts of the first.
    reference: archive of the reference model; null: the one that the checkpoint's run started from, else the model's own
    weights. beta: scale of the rewards where the checkpoint's run records no pairwise loss; accuracies do not depend on it.
    num_prompts: prompts that responses are drawn for, 0 is none; num_samples: responses per prompt and model;
    temperature, top_p: 1 and 1 is the model itself. max_new_tokens: null is max_length - max_prompt_length.
    versus: what the responses are compared with: reference, chosen (the data's preferred response), or both.
    function (module:function, as for commands.annotate), reward_model (an archive), judge (judge.url=, judge.model=, and the
    other keys of commands/judge.py; its key only through the environment): who compares them. against: archive of another
    checkpoint of the same model=."""

    out: str
    splits: tuple[Literal["test", "validation", "train"], ...] = ("test",)
    reference: str | None = None
    beta: float = 0.1
    against: str | None = None
    num_prompts: int = 64
    num_samples: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    versus: tuple[Literal["reference", "chosen"], ...] = ("reference",)
    function: str | None = None
    reward_model: str | None = None
    judge: JudgeSettings | None = None

    def __post_init__(self) -> None:
        for key, least in (("num_prompts", 0), ("num_samples", 1)):
            if getattr(self, key) < least:
                raise UserError(f"score.{key}={getattr(self, key)}: must be at least {least}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"score.max_new_tokens={self.max_new_tokens}: must be at least 1, or null")
        if not self.temperature >= 0:
            raise UserError(
                f"score.temperature={self.temperature}: must be >= 0; 0 takes the likeliest token"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"score.top_p={self.top_p}: must be in (0, 1]; 1 keeps every token")
        if not self.splits:
            raise UserError("score.splits=[]: name at least one split")
        if self.num_prompts == 0 and (self.function or self.reward_model or self.judge):
            raise UserError("score.num_prompts=0: a win rate needs responses; give a number of prompts")


def run(run: Run, settings: Settings) -> None:
    """Reward accuracies, log-probs, responses and win rates of model.archive=."""
    runtime.configure(run.config.num_threads, run.config.allocator)
    for key in ("reference", "against", "reward_model"):
        if (archive := getattr(settings, key)) is not None:
            archives.find(archive, f"score.{key}")
    if settings.function is not None:
        load_function(settings.function, "score.function")
    session = Session(run, settings)
    with autocast(run.config.precision, session.device):
        session.evaluate()
        if settings.num_prompts and session.language_model:
            session.draw()
            session.compare(
                referees(run, settings.function, settings.reward_model, settings.judge, session.out / "judge")
            )
    session.write()


def scoring_loss(archive: str | None, beta: float) -> Loss:
    """The pairwise loss, or the reward model's, that the checkpoint's run recorded, if plain labelled pairs have all that it
    needs; else DPO's."""
    known = recorded(archive) if archive is not None else None
    if known is not None:
        found, needs = known[0], known[0].needs
        plain = needs.policy == PAIR and not needs.scalars and not needs.optional_roles and needs.trains
        if plain and (needs.output != "logps" or needs.reference == PAIR):
            return found
        if needs.output != "logps":
            raise UserError(
                f"model.archive={archive}: {type(found).__name__} needs columns that labelled pairs do not have"
            )
    return DPO(beta=beta)


class Session:
    """One call of the command. ``records[model][split]`` and ``rows`` (of scores.csv) are what it collects."""

    def __init__(self, run: Run, settings: Settings) -> None:
        self.run, self.settings, self.out = run, settings, Path(settings.out)
        make_folder(self.out)
        self.device = parallel.pick_device(run.config.device)
        self.archives = {POLICY: run.model.archive}
        if settings.against is not None:
            self.archives[AGAINST] = settings.against
        self.loss = scoring_loss(run.model.archive, settings.beta)
        self.tokenizer = models.load_tokenizer(run.model)
        self.data = run_data.load_data(run, self.tokenizer, self.loss)
        for split in settings.splits:
            if not self.data.rows.get(split):
                raise UserError(
                    f"score.splits={list(settings.splits)}: no rows in {split!r}; there are {list(self.data.rows)}"
                )
        if not self.language_model and (settings.function or settings.reward_model or settings.judge):
            raise UserError(
                f"model.archive={run.model.archive}: a reward model gives no responses to compare"
            )
        self.reference_archive = self._reference_archive()
        self.places = {name: place(archive) for name, archive in self.archives.items()}
        self.records: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(dict)
        self.rows: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.wins: list[dict[str, Any]] = []

    @property
    def language_model(self) -> bool:
        return self.loss.needs.output == "logps"

    def _reference_archive(self) -> str | None:
        """Which weights the rewards compare with."""
        if self.settings.reference is not None:
            return self.settings.reference
        policy = self.run.model.archive
        known = recorded(policy) if policy is not None else None
        found = known[1].archive if known is not None else None
        if self.loss.needs.reference:
            log.info("reference: %s", found or "the model's own weights, before any training")
        if self.loss.needs.reference and found is None and self.run.model.config is not None:
            log.warning("the reference is an untrained model; give score.reference=SFT_RUN/LATEST")
        return found

    # ------------------------------------------------------------------------------------------ models

    @contextmanager
    def model(self, name: str) -> Iterator[scoring.Scorer]:
        """A frozen model behind a Scorer, for as long as it is needed."""
        spec, needs = self.run.model, self.loss.needs
        common = {"device": self.device, "tokenizer": self.tokenizer}
        if name == REFERENCE:
            built = models.build_reference(spec, archive=self.reference_archive, **common)
        elif self.language_model:
            dtype = models.DTYPES[spec.policy_dtype]
            built = models.build_reference(spec, archive=self.archives[name], dtype=dtype, **common)
        else:
            archive = self.archives[name]
            built = models.build_policy(
                spec, archive=archive, output=needs.output, dim=needs.dim, seed=0, **common
            )
        built.requires_grad_(False).eval()
        s = self.run.config.scoring
        yield scoring.Scorer(built, layout=s.layout, output=needs.output, chunk_tokens=s.chunk_tokens)

    # ------------------------------------------------------------------------------------------ labelled pairs

    def evaluate(self) -> None:
        """Every labelled pair under every checkpoint: records/, and means with intervals."""
        reference = None
        if self.loss.needs.reference:
            with self.model(REFERENCE) as scorer:
                reference = LiveReference(scorer)
        for name in self.archives:
            folder = self.out / name
            folder.mkdir(exist_ok=True)
            evaluator = Evaluator(
                splits={s: self.data.rows[s] for s in self.settings.splits},
                groups=self.data.groups,
                loss=self.loss,
                reference=reference,
                world=World(0, 1, self.device, "none"),
                run_dir=folder,
                batch_size=self.run.config.eval_batch_size,
                per_group=self.run.config.n_eval_examples,
            )
            with self.model(name) as scorer:
                for split in self.settings.splits:
                    done = evaluator.run(split, scorer, self.places[name]["examples"] or 0)
                    self.records[name][split] = done.records
                    logged = {"kind": "eval", "split": split, **self.places[name], **done.metrics}
                    self._add(
                        name, [with_interval(row, done.records) for row in results.evaluation_rows([logged])]
                    )

    def _add(self, model: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.rows += [{"model": model, **row} for row in rows]

    # ------------------------------------------------------------------------------------------ responses

    def draw(self) -> None:
        """Responses of every model to the same prompts, drawn independently of each other: samples.jsonl."""
        prompts = self.prompts(self.settings.splits[0])
        rows = [row for row, _ in prompts for _ in range(self.settings.num_samples)]
        self.examples = [example for _, example in prompts for _ in range(self.settings.num_samples)]
        self.samples = [
            {
                "uid": row.uid,
                "sample": i % self.settings.num_samples,
                "prompt_key": row.prompt_key,
                "group": example.group,
                "prompt": self.tokenizer.decode(row.prompt, skip_special_tokens=True),
                CHOSEN: plain_text(example.response("chosen")),
                f"{CHOSEN}_finished": True,
            }
            for i, (row, example) in enumerate(zip(rows, self.examples, strict=True))
        ]
        with self.model(REFERENCE) as reference:
            self._draw(REFERENCE, reference, rows, None)
            for name in self.archives:
                with self.model(name) as scorer:
                    self._draw(name, scorer, rows, reference)

    def prompts(self, split: str) -> list[tuple[Row, Example]]:
        """A fixed random choice of prompts, whatever the model and the seed."""
        pairs = zip(self.data.rows[split], self.data.examples[split], strict=True)
        unique = list({row.prompt_key: (row, example) for row, example in reversed(list(pairs))}.values())
        order = stream(0, "scored prompts").permutation(len(unique))[: self.settings.num_prompts]
        return [unique[i] for i in sorted(order)]

    def _draw(
        self, name: str, scorer: scoring.Scorer, rows: Sequence[Row], reference: scoring.Scorer | None
    ) -> None:
        """One model's responses into ``samples``; with their log-ratio to ``reference``, whose mean is the divergence."""
        config, s = self.run.config, self.settings
        drawn = sampling.generate(
            scorer.model,
            self.tokenizer,
            [row.prompt for row in rows],
            max_new_tokens=s.max_new_tokens or config.max_length - config.max_prompt_length,
            temperature=s.temperature,
            top_p=s.top_p,
            seed=config.seed,
            keys=[(row.uid, name, into["sample"]) for row, into in zip(rows, self.samples, strict=True)],
            batch_size=config.eval_batch_size,
        )
        how = run_data.tokenization(self.run, self.run.datasets[0])
        for row, into, sample in zip(rows, self.samples, drawn, strict=True):
            into[name], into[f"{name}_finished"] = as_text(sample, row.prompt, self.tokenizer, how)
            into[f"{name}_tokens"] = len(sample.ids)
        if reference is not None and (s.temperature, s.top_p) == (1.0, 1.0):
            scored = [
                Row(r.uid, r.prompt, (d.ids,), ("target",), r.group, r.prompt_key)
                for r, d in zip(rows, drawn, strict=True)
            ]
            pairs = zip(self._logps(scorer, scored), self._logps(reference, scored), strict=True)
            for into, (own, other) in zip(self.samples, pairs, strict=True):
                into[f"{name}_log_ratio"] = own - other
        self._add_means(name)

    @torch.no_grad()
    def _logps(self, scorer: scoring.Scorer, rows: Sequence[Row]) -> list[float]:
        size = self.run.config.eval_batch_size
        parts = (
            scorer(Batch.collate(rows[i : i + size]), ("target",)).logps for i in range(0, len(rows), size)
        )
        return [value for part in parts for value in part.double().tolist()]

    def _add_means(self, name: str) -> None:
        """Length, share that ended, and divergence from the reference, into scores.csv."""
        for key, metric, interval in (
            (f"{name}_tokens", "samples/tokens", stats.cluster_mean),
            (f"{name}_finished", "samples/finished", stats.share_interval),
            (f"{name}_log_ratio", "samples/kl_to_reference", stats.cluster_mean),
        ):
            if key in self.samples[0]:
                self._add_groups(name, metric, [float(s[key]) for s in self.samples], interval)

    def _add_groups(
        self, model: str, metric: str, values: Sequence[float | None], interval: Callable[..., stats.Interval]
    ) -> None:
        """Rows of scores.csv for one number per sample (None: not defined), over all samples and each group's."""
        for group, index in self._members(self.samples):
            kept = [i for i in index if values[i] is not None]
            if kept:
                found = interval([values[i] for i in kept], [self.samples[i]["prompt_key"] for i in kept])
                where = {
                    **self.places.get(model, self.places[POLICY]),
                    "split": PREFIX[self.settings.splits[0]],
                    "group": group,
                    "metric": metric,
                }
                self._add(model, [where | bounds(found) | {"n": found.n}])

    def _members(self, rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[int]]]:
        """("all", every index), then each group's where there are several."""
        groups = [g for g in self.data.groups if any(r["group"] == g for r in rows)]
        parts = [(g, [i for i, r in enumerate(rows) if r["group"] == g]) for g in groups]
        return [("all", list(range(len(rows)))), *(parts if len(parts) > 1 else [])]

    # ------------------------------------------------------------------------------------------ win rates

    def compare(self, found: Mapping[str, Referee]) -> None:
        """Who wins, by every referee: wins.jsonl and win rates in scores.csv."""
        matches = [(name, other) for name in self.archives for other in self.settings.versus]
        if AGAINST in self.archives:
            matches.append((POLICY, AGAINST))
        for by, referee in found.items():
            for first, second in matches:
                wins = referee([
                    Contest(e, s[first], s[second], (s[f"{first}_finished"], s[f"{second}_finished"]))
                    for e, s in zip(self.examples, self.samples, strict=True)
                ])  # fmt: skip
                self._record(by, first, second, wins)

    def _record(self, by: str, first: str, second: str, wins: Sequence[Win | None]) -> None:
        metric = f"{by}/vs_{second}"
        self._add_groups(first, f"{metric}/win_rate", [w and w.win for w in wins], stats.share_interval)
        if by != "judge":
            self._add_groups(first, f"{metric}/p_preferred", [w and w.p for w in wins], stats.cluster_mean)
        else:
            agree = [None if w is None or w.agree is None else float(w.agree) for w in wins]
            self._add_groups(first, f"{metric}/orders_agree", agree, stats.share_interval)
        for sample, win in zip(self.samples, wins, strict=True):
            place_ = {k: sample[k] for k in ("uid", "sample", "prompt_key", "group")}
            result = {"win": None, "p": None} if win is None else {"win": win.win, "p": win.p}
            result["log_ratio"] = sample.get(
                f"{first}_log_ratio"
            )  # of the first response, against the reference
            self.wins.append({**place_, "by": by, "first": first, "second": second, **result})

    # ------------------------------------------------------------------------------------------ results

    def differences(self) -> list[dict[str, Any]]:
        """Paired differences policy - against, on the same examples and on the same prompts."""
        if AGAINST not in self.archives:
            return []
        rows = []
        for split in self.settings.splits:
            first, second = ({r["uid"]: r for r in self.records[name][split]} for name in (POLICY, AGAINST))
            names = ["loss", *(m for m in next(iter(first.values())) if "/" in m), "policy_accuracies"]
            for metric in names:
                both = [
                    (first[u], second[u]) for u in first if metric in first[u] and metric in second.get(u, {})
                ]
                rows += self._paired(PREFIX[split], metric, both, metric)
        won: dict[tuple[str, str], dict[str, list]] = defaultdict(lambda: {POLICY: [], AGAINST: []})
        for win in self.wins:
            if win["second"] != AGAINST:
                won[win["by"], win["second"]][win["first"]].append(win)
        for (by, second), found in won.items():
            both = [
                (a, b)
                for a, b in zip(found[POLICY], found[AGAINST], strict=True)
                if None not in (a["win"], b["win"])
            ]
            rows += self._paired(PREFIX[self.settings.splits[0]], f"{by}/vs_{second}/win_rate", both, "win")
        return rows

    def _paired(
        self, split: str, metric: str, both: Sequence[tuple[Mapping, Mapping]], key: str
    ) -> list[dict[str, Any]]:
        rows = []
        for group, index in self._members([a for a, _ in both]):
            chosen = [both[i] for i in index]
            if chosen:
                found = stats.paired_difference(
                    [stats.counted(a, key) for a, _ in chosen],
                    [stats.counted(b, key) for _, b in chosen],
                    [a["prompt_key"] for a, _ in chosen],
                )
                line = {"a": POLICY, "b": AGAINST, "split": split, "group": group, "metric": metric}
                rows.append(
                    line | {"difference": found.estimate} | bounds(found, value=None) | {"n": found.n}
                )
        return rows

    def write(self) -> None:
        """All files, and the tables to stdout."""
        differences = self.differences()
        document = {
            "archives": self.archives
            | ({REFERENCE: self.reference_archive} if self.loss.needs.reference else {}),
            "loss": f"{type(self.loss).__name__} {asdict(self.loss)}",
            "settings": asdict(self.settings),
            "provenance": {"git": git_facts(assembly.ROOT), "versions": versions(), "command": sys.argv},
            "scores": self.rows,
            "differences": differences,
        }
        contents = {
            "scores.csv": results.to_csv(self.rows, COLUMNS),
            "scores.json": json.dumps(document, indent=1) + "\n",
            "samples.jsonl": lines(self.samples),
            "wins.jsonl": lines(self.wins),
        }
        if differences:
            contents["differences.csv"] = results.to_csv(differences, DIFFERENCE_COLUMNS)
        for name, text in contents.items():
            if text:
                write_atomic(self.out / name, text)
        print(table(self.rows, differences))
        print("\n".join(f"  {self.out / name}" for name, text in contents.items() if text))


# ---------------------------------------------------------------------------------------------- small things


def place(archive: str | None) -> dict[str, Any]:
    """Step and examples of a checkpoint; empty for other weights."""
    if archive is not None:
        found = archives.find(archive)
        source = found.with_name(found.name.removeprefix("model-"))  # what a consolidated model was made of
        if (source / checkpoint.MANIFEST).is_file():
            opened = checkpoint.open_checkpoint(source)
            return {"step": opened.step, "examples": opened.examples}
    return {"step": "", "examples": ""}


def bounds(found: stats.Interval, value: str | None = "value") -> dict[str, Any]:
    """The interval as cells; empty where it has no ends."""
    ends = {"ci_low": found.low, "ci_high": found.high}
    return ({} if value is None else {value: found.estimate}) | {
        k: v if v == v else "" for k, v in ends.items()
    }


def with_interval(row: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The row of scores.csv with an interval where the evaluation gave none."""
    if row["ci_low"] != "" or row["group"] in ("mean_group", "worst_group"):
        return dict(row)
    mine = [r for r in records if row["group"] in ("all", r["group"]) and row["metric"] in r]
    interval = stats.share_interval if row["metric"] in ACCURACIES else stats.cluster_mean
    found = interval([stats.counted(r, row["metric"]) for r in mine], [r["prompt_key"] for r in mine])
    return {**row, **bounds(found, value=None)}


def lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    entry("score", Settings, run)
