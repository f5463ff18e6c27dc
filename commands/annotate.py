"""Auxiliary preferences for VRPO: how likely the first response of a pair is preferred, for labelled and auxiliary pairs.

    python -m commands.annotate annotate.data=DIR annotate.out=DIR2 model=tiny annotate.model=runs/RM/LATEST
    python -m commands.annotate annotate.data=DIR annotate.out=DIR2 model=tiny loss=reward annotate.cross_fit=4
    python -m commands.annotate annotate.data=DIR annotate.out=DIR2 annotate.scorer=function annotate.function=commands.oracles:opinions
    python -m commands.annotate annotate.data=DIR annotate.out=DIR2 annotate.scorer=judge annotate.judge.url=URL annotate.judge.model=NAME

Reads DIR/<split>.jsonl (of commands.sample, or your own), writes DIR2/<split>.jsonl for
`datasets=[local] data.local.path=DIR2/train.jsonl data.local.test_path=DIR2/test.jsonl`, and how well the preferences agree
with human labels: DIR2/calibration.json and calibration.csv. A killed command continues where it was.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import assembly
from commands import rows as jsonl
from commands.calibration import Calibration, Pairs, calibrate, nll, sigmoid
from commands.cli import Output, entry
from commands.judge import Judge, JudgeSettings
from commands.rows import Labelled
from commands.scorers import FunctionScorer, JudgeScorer, ModelScorer, Scores
from config.compose import Run, compose, recorded
from config.schema import DataConfig
from data.split import SPLITS
from engine import models, parallel, preferences, runtime
from preference_datasets import Tokenization
from trainers import autocast
from utils import UserError, content_hash, log, make_folder, stream_seed, write_atomic

Scorer = Callable[[Sequence[Labelled]], list[Scores]]


@dataclass(frozen=True)
class Settings:
    """data: folder of train.jsonl (and validation.jsonl, test.jsonl), or one file, taken for train. out: folder of the
    results. scorer: reward | gpm (a model trained with loss=reward or loss=gpm: annotate.model=RUN/LATEST, its model= as in
    training), function (annotate.function=module:function, see commands/scorers.py) or judge (annotate.judge.url=,
    annotate.judge.model=, see commands/judge.py; its key only through the environment).
    splits: which are annotated, the others are copied; null: all, with cross_fit train alone. calibrate: split whose human
    labels set the temperature; auto: validation; where there is none, train, if the scorer has not seen its labels; else
    none. cross_fit: K >= 2 trains K scorers with this command's model=, loss= and training keys, each without a K-th of the
    prompts, and scores those with it. batch_size: rows scored together."""

    data: str
    out: str
    scorer: Literal["reward", "gpm", "function", "judge"] = "reward"
    model: str | None = None
    function: str | None = None
    judge: JudgeSettings | None = None
    splits: tuple[str, ...] | None = None
    calibrate: Literal["auto", "none", "train", "validation", "test"] = "auto"
    cross_fit: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        trained = self.scorer in preferences.OUTPUTS
        if self.cross_fit < 0 or self.cross_fit == 1:
            raise UserError(f"annotate.cross_fit={self.cross_fit}: must be at least 2, or 0 for none")
        if self.cross_fit and not trained:
            raise UserError(
                f"annotate.cross_fit={self.cross_fit}: annotate.scorer={self.scorer} is not trained here"
            )
        if trained and bool(self.cross_fit) == (self.model is not None):
            raise UserError(
                "annotate.model=null: give the trained scorer, annotate.model=RUN/LATEST, or train some: annotate.cross_fit=4"
                if self.model is None
                else f"annotate.model={self.model} annotate.cross_fit={self.cross_fit}: the folds train their own; give one"
            )
        if self.cross_fit and self.calibrate not in ("auto", "none", "train"):
            raise UserError(
                f"annotate.calibrate={self.calibrate}: with annotate.cross_fit only train is scored; leave it away, or none"
            )
        for name, value, how in (
            ("function", self.function, "annotate.function=commands.oracles:opinions"),
            ("judge", self.judge, "annotate.judge.url=https://api.openai.com/v1 annotate.judge.model=NAME"),
        ):
            if (self.scorer == name) != (value is not None):
                raise UserError(
                    f"annotate.scorer={self.scorer}, annotate.{name}={value}: they go together; "
                    f"e.g. annotate.scorer={name} {how}"
                )
        if self.batch_size < 1:
            raise UserError(f"annotate.batch_size={self.batch_size}: must be at least 1")


def run(run: Run, settings: Settings) -> None:
    """Score every pair, calibrate on human labels, write the annotated rows and what they are worth."""
    runtime.configure(run.config.num_threads, run.config.allocator)
    out = Path(settings.out)
    files = inputs(Path(settings.data), out)
    wanted = splits(settings, list(files))
    rows = {name: jsonl.read(files[name]) for name in wanted}
    scored: dict[str, dict[str, Any]] = {}
    if settings.cross_fit:
        scored["train"] = score_folds(run, settings, rows["train"], out)
    else:
        scorer = build_scorer(run, settings, out)
        scored = {name: score(run, settings, scorer, name, part_, out) for name, part_ in rows.items()}
        if isinstance(scorer, JudgeScorer):
            scorer.judge.log()
    calibration = fit(settings, rows, scored, out)
    temperature = calibration.temperature if calibration else 1.0
    for name, path in files.items():
        target = out / f"{name}.jsonl"
        if name in rows:
            report_seen_labels(name, rows[name], scored[name], calibration)
            write_split(target, rows[name], scored[name], temperature)
        else:
            shutil.copyfile(path, target)
        log.info("wrote %s", target)


def inputs(data: Path, out: Path) -> dict[str, Path]:
    """split -> file."""
    if data.is_file():
        found = {"train": data}
    else:
        found = {name: data / f"{name}.jsonl" for name in SPLITS if (data / f"{name}.jsonl").is_file()}
    if not found:
        raise UserError(f"annotate.data={data}: no such file, and no folder with train.jsonl")
    if out.resolve() in (data.resolve(), *(path.parent.resolve() for path in found.values())):
        raise UserError(f"annotate.out={out}: must not be where the data are; name another folder")
    make_folder(out)
    return found


def splits(settings: Settings, there: list[str]) -> list[str]:
    """Which files are scored."""
    if settings.cross_fit and settings.splits not in (None, ("train",)):
        raise UserError(
            f"annotate.splits={list(settings.splits)}: with annotate.cross_fit only train is scored"
        )
    wanted = settings.splits or (("train",) if settings.cross_fit else tuple(there))
    stray = [name for name in (*wanted, settings.calibrate) if name not in (*there, "auto", "none")]
    if stray:
        raise UserError(
            f"annotate.splits, annotate.calibrate: there is no {stray[0]}.jsonl, only {', '.join(there)}"
        )
    return list(dict.fromkeys([*wanted, *([settings.calibrate] if settings.calibrate in there else [])]))


# ---------------------------------------------------------------------------------------------- scorers


def build_scorer(run: Run, settings: Settings, out: Path) -> Any:
    """What annotate.scorer says."""
    if settings.scorer == "function":
        return FunctionScorer(settings.function)
    if settings.scorer == "judge":
        return JudgeScorer(Judge(settings.judge, out / "judge"))
    return model_scorer(run, settings)


def model_scorer(run: Run, settings: Settings) -> ModelScorer:
    """The trained model of annotate.model, with the loss that its run recorded (else this command's)."""
    loss, _ = recorded(settings.model, "annotate.model") or (run.loss, None)
    expected = preferences.OUTPUTS[settings.scorer]
    if loss.needs.output != expected:
        raise UserError(
            f"annotate.scorer={settings.scorer}: needs a model whose head gives a {expected}, but {settings.model} was trained "
            f"with {type(loss).__name__}; train one with loss={settings.scorer}, and where it is no run of ours say so here "
            f"too: loss={settings.scorer}"
        )
    config = run.config
    tau = loss.tau if settings.scorer == "gpm" else None
    tokenizer = models.load_tokenizer(run.model)
    preference, weights = preferences.load(
        run.model,
        settings.model,
        loss.needs,
        tau=tau,
        device=parallel.pick_device(config.device),
        tokenizer=tokenizer,
        layout=config.scoring.layout,
    )
    how = Tokenization(
        bos=config.data.bos,
        mode=config.data.tokenize,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.truncation or "keep_start",
    )
    identity = {
        "scorer": settings.scorer,
        "model": run.model.name,
        "weights": weights,
        **({} if tau is None else {"tau": tau}),
        "tokens": content_hash(asdict(how))[:16],
    }
    return ModelScorer(preference, tokenizer, how, identity)


# ---------------------------------------------------------------------------------------------- cross-fitting


def fold_of(one: Labelled, num_folds: int) -> int:
    """A prompt's pairs are in one fold; adding rows moves no others."""
    return stream_seed(0, "cross_fit", json.dumps(one.example.prompt, sort_keys=True)) % num_folds


def fold_scorer(
    run: Run, settings: Settings, rows: Sequence[Labelled], fold: int, out: Path
) -> tuple[list[Labelled], str]:
    """(the rows of the fold, the checkpoint of a scorer trained on all others); a trained one is not trained again."""
    mine = [one for one in rows if fold_of(one, settings.cross_fit) == fold]
    others = [one for one in rows if fold_of(one, settings.cross_fit) != fold]
    if not mine or not others:
        raise UserError(
            f"annotate.cross_fit={settings.cross_fit}: fold {fold} has {len(mine)} of {len(rows)} rows; use fewer folds"
        )
    folder = out / "cross_fit" / f"fold_{fold}"
    for name, part_ in (("train", others), ("test", mine)):
        write_fold(folder / f"{name}.jsonl", [jsonl.without_auxiliary(one.row) for one in part_])
    common = tuple(f"data.{key}=" for key in DataConfig.__dataclass_fields__)
    ours = ("datasets=", "data.", "exp_name=", "run_dir=")
    kept = [w for w in run.words if not w.startswith(ours) or w.startswith(common)]
    kept = [
        f"loss={settings.scorer}",  # unless the command names another
        *kept,
        "datasets=[local]",
        f"data.local.path={folder}/train.jsonl",
        f"data.local.test_path={folder}/test.jsonl",
        f"run_dir={folder}/run",
        f"exp_name=fold_{fold}",
    ]
    log.info(
        "fold %d of %d: training on %d rows, scoring %d", fold, settings.cross_fit, len(others), len(mine)
    )
    train(compose(kept), kept)
    return mine, f"{folder}/run/LATEST"


def write_fold(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Refuse other rows than those there: a finished scorer is not trained again, and may have seen what it would score."""
    if path.exists() and path.read_text(encoding="utf-8") != jsonl.as_lines(rows):
        raise UserError(
            f"{path}: was made from other rows or for another annotate.cross_fit; name another annotate.out, or delete it"
        )
    jsonl.write(path, rows)


def score_folds(
    run: Run, settings: Settings, rows: Sequence[Labelled], out: Path
) -> dict[str, dict[str, Any]]:
    """As ``score``, every row by the model that has not seen its prompt."""
    found: dict[str, dict[str, Any]] = {}
    for fold in range(settings.cross_fit):
        mine, archive = fold_scorer(run, settings, rows, fold, out)
        scorer = model_scorer(run, replace(settings, model=archive, cross_fit=0))
        found |= score(run, settings, scorer, "train", mine, out, fold)
    return found


def train(run: Run, words: list[str]) -> None:
    """The run in this process, or in one process per device where the trainer says so."""
    if run.config.trainer.parallel == "none":
        code = assembly.run_training(run).exit_code
    else:
        from train import launch

        code = launch(run, words)
    if code:
        raise SystemExit(code)  # stopped by a signal, with a checkpoint; the same command continues


# ---------------------------------------------------------------------------------------------- scoring


def score(
    run: Run,
    settings: Settings,
    scorer: Any,
    name: str,
    rows: Sequence[Labelled],
    out: Path,
    fold: int | None = None,
) -> dict[str, dict[str, Any]]:
    """uid -> {"log_odds": [..]} or {"failed": why}, with where they come from; kept in OUT/scores as they are made."""
    identity = {
        **scorer.identity,
        "precision": run.config.precision,
        **({} if fold is None else {"fold": fold}),
    }
    texts = content_hash([jsonl.without_preferences(one.row) for one in rows])[:16]
    where = out / "scores" / (f"{name}.jsonl" if fold is None else f"{name}-fold_{fold}.jsonl")
    output = Output(where, {**identity, "rows": texts})
    with tqdm(total=len(rows), initial=len(output.done), unit="row", desc=name, mininterval=1.0) as bar:
        for start in range(0, len(rows), settings.batch_size):
            # a batch that a kill cut in the middle is scored whole again: other company would round otherwise
            part_ = rows[start : start + settings.batch_size]
            missing = [one.example.uid for one in part_ if one.example.uid not in output.done]
            if not missing:
                continue
            with autocast(run.config.precision, parallel.pick_device(run.config.device)):
                found = scorer(part_)
            made = {
                one.example.uid: {"failed": f} if isinstance(f, str) else {"log_odds": f.tolist()}
                for one, f in zip(part_, found, strict=True)
            }
            output.append({"uid": uid, **made[uid]} for uid in missing)
            bar.update(len(missing))
    lines = map(
        json.loads, where.read_bytes().splitlines()
    )  # as bytes: a uid may hold what ends a line of text
    scored = {row.pop("uid"): row | {"from": identity} for row in lines}
    report_failures(name, scored)
    return scored


def report_failures(name: str, found: dict[str, dict[str, Any]]) -> None:
    for reason, count in Counter(f["failed"] for f in found.values() if "failed" in f).items():
        log.warning(
            "%s: %d of %d rows get no auxiliary responses, and so the plain loss: %s",
            name,
            count,
            len(found),
            reason,
        )


# ---------------------------------------------------------------------------------------------- calibration


def fit(
    settings: Settings, rows: dict[str, list[Labelled]], scored: dict[str, dict[str, Any]], out: Path
) -> Calibration | None:
    """The temperature from human labels; None: the scorer's probabilities as they are."""
    name = settings.calibrate
    if name == "auto":
        unseen = settings.cross_fit or settings.scorer not in preferences.OUTPUTS
        order = ("train",) if settings.cross_fit else ("validation", "train") if unseen else ("validation",)
        name = next((split for split in order if split in rows), "none")
    if name == "none":
        if settings.calibrate == "auto":
            log.warning(
                "the preferences are not calibrated: there are no human labels that the scorer has not seen; give "
                "annotate.data a validation.jsonl, annotate.calibrate=SPLIT, or use annotate.cross_fit"
            )
        return None
    pairs = labelled_pairs(rows[name], scored[name])
    if not pairs.uid:
        raise UserError(f"annotate.calibrate={name}: no row of it could be scored")
    found = calibrate(pairs, name, out)
    write_atomic(out / "calibration.json", json.dumps(found.to_dict(), indent=1) + "\n")
    found.log()
    return found


def labelled_pairs(rows: Sequence[Labelled], scored: dict[str, Any]) -> Pairs:
    kept = [one for one in rows if "log_odds" in scored[one.example.uid]]
    return Pairs(
        np.array([scored[one.example.uid]["log_odds"][0] for one in kept]),
        np.array([one.example.scalars.get("p_chosen", 1.0) for one in kept]),
        tuple(json.dumps(one.example.prompt, sort_keys=True) for one in kept),
        tuple(one.example.uid for one in kept),
    )


def report_seen_labels(
    name: str, rows: Sequence[Labelled], scored: dict[str, Any], calibration: Calibration | None
) -> None:
    """Warn where the scorer knows these labels much better than those it was calibrated on: it was trained on them."""
    if calibration is None or name == calibration.split:
        return
    pairs = labelled_pairs(rows, scored)
    if len(pairs.uid) < 2:
        return
    losses = nll(pairs.odds / calibration.temperature, pairs.outcome)
    spread = losses.std(ddof=1) * (1 / len(losses) + 1 / calibration.calibrated.n) ** 0.5
    if losses.mean() < calibration.calibrated.log_loss - 4 * spread:
        log.warning(
            "%s: log loss %.3f, but %.3f on %s: the scorer was trained on these labels, and repeats their noise; "
            "use annotate.cross_fit=4",
            name, losses.mean(), calibration.calibrated.log_loss, calibration.split,
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------- rows


def write_split(path: Path, rows: Sequence[Labelled], scored: dict[str, Any], temperature: float) -> None:
    """The rows with their preferences, as a whole file."""
    jsonl.write(path, [annotated(one, scored[one.example.uid], temperature) for one in rows])


def annotated(one: Labelled, found: dict[str, Any], temperature: float) -> dict[str, Any]:
    """One row. Where a pair could not be scored the row loses all auxiliary pairs: leaving out only those that are hard to
    score would leave auxiliary pairs of another law than the labelled pair's."""
    if "failed" in found:
        return jsonl.without_auxiliary(one.row) | {"annotation": found}
    row = jsonl.without_preferences(one.row)
    p = [float(x) for x in sigmoid(np.array(found["log_odds"]) / temperature)]
    if "a_1" in row:
        row |= {"chosen_preference": p[0], "rejected_preference": 1.0 - p[0]}
        row |= {"a_1_preference": p[1], "a_2_preference": 1.0 - p[1]}
    elif "aux_responses" in row:
        row |= {"chosen_preference": p[0], "aux_preferences": p[1:]}
    row["annotation"] = {**found["from"], "temperature": temperature, "labelled": p[0]}
    return row


if __name__ == "__main__":
    entry("annotate", Settings, run)
