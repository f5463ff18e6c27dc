"""Who wins? Responses of two models to the same prompts, compared by a reward model, a function of your own, or a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import run_data
from commands import rows as jsonl
from commands.calibration import sigmoid
from commands.judge import Judge, JudgeSettings, Question
from commands.rows import Labelled
from commands.scorers import FunctionScorer, ModelScorer
from config.compose import Run, recorded
from data.schema import Example, Text
from engine import models, parallel, preferences
from utils import UserError, content_hash, log

BATCH = 16  # pairs scored together


@dataclass(frozen=True)
class Contest:
    """Two responses to the prompt of ``example``; ``done``: whether each ended by itself."""

    example: Example
    first: str
    second: str
    done: tuple[bool, bool] = (True, True)

    def labelled(self, number: int) -> Labelled:
        """As a labelled pair, the first response in the place of the chosen one."""
        example = replace(
            self.example,
            uid=f"{self.example.uid}@{number}",
            responses=(("chosen", self.text(self.first)), ("rejected", self.text(self.second))),
            response_scalars={"finished": tuple(float(d) for d in self.done)},
        )
        return Labelled(jsonl.to_row(example), example)

    def question(self) -> Question:
        return Question(self.example.prompt, self.first, self.second)

    def text(self, response: str) -> Text:
        chat = not isinstance(self.example.prompt, str)
        return ({"role": "assistant", "content": response},) if chat else response


@dataclass(frozen=True)
class Win:
    """win: 1 the first, 0 the second, 1/2 a tie (a judge's two orders averaged). p: probability that the first is preferred.
    agree: whether a judge's two orders agreed; None for the others."""

    win: float
    p: float
    agree: bool | None = None


Referee = Callable[[Sequence[Contest]], list[Win | None]]


def by_scorer(scorer: Any, name: str) -> Referee:
    """Referee from a scorer of commands.scorers: the response with the larger score wins. None where it cannot say."""

    def compare(contests: Sequence[Contest]) -> list[Win | None]:
        rows = [contest.labelled(i) for i, contest in enumerate(contests)]
        found = [odds for i in range(0, len(rows), BATCH) for odds in scorer(rows[i : i + BATCH])]
        for reason, count in Counter(f for f in found if isinstance(f, str)).items():
            log.warning("%s: %d of %d pairs are left out: %s", name, count, len(found), reason)
        wins = []
        for contest, odds in zip(contests, found, strict=True):
            same = contest.first == contest.second and contest.done[0] == contest.done[1]
            value = 0.0 if same else odds  # rounding of two equal rows is no preference
            wins.append(
                None if isinstance(value, str) else _decided(float(np.atleast_1d(np.asarray(value))[0]))
            )
        return wins

    return compare


def _decided(odds: float) -> Win:
    return Win((np.sign(odds) + 1) / 2, float(sigmoid(np.float64(odds))))


def by_judge(judge: Judge) -> Referee:
    """Referee from a language model asked in both orders; None where it could not be read in one of them."""

    def compare(contests: Sequence[Contest]) -> list[Win | None]:
        verdicts = judge([contest.question() for contest in contests])
        judge.log()
        return [
            None if v.p is None else Win(v.p, v.p, None if c.first == c.second else v.forward == v.backward)
            for c, v in zip(contests, verdicts, strict=True)
        ]

    return compare


def referees(
    run: Run, function: str | None, reward_model: str | None, judge: JudgeSettings | None, cache: Path
) -> dict[str, Referee]:
    """name -> referee of those that were asked for."""
    found: dict[str, Referee] = {}
    if function is not None:
        found["function"] = by_scorer(FunctionScorer(function), "function")
    if reward_model is not None:
        found["reward_model"] = by_scorer(reward_scorer(run, reward_model), "reward_model")
    if judge is not None:
        found["judge"] = by_judge(Judge(judge, cache))
    return found


def reward_scorer(run: Run, archive: str) -> ModelScorer:
    """A trained reward or general preference model, with the architecture and tokenizer that its run recorded (else the
    command's model=), whatever the models that it compares."""
    loss, spec = recorded(archive, "score.reward_model") or (run.loss, run.model)
    if loss.needs.output == "logps":
        raise UserError(
            f"score.reward_model={archive}: has no reward head; give a run of loss=reward or loss=gpm, and for a checkpoint "
            "without config.yaml say which: loss=reward"
        )
    tokenizer = models.load_tokenizer(spec)
    preference, weights = preferences.load(
        spec,
        archive,
        loss.needs,
        tau=loss.tau if loss.needs.output == "embedding" else None,
        device=parallel.pick_device(run.config.device),
        tokenizer=tokenizer,
        layout=run.config.scoring.layout,
    )
    how = run_data.tokenization(run, run.datasets[0])
    identity = {"model": spec.name, "weights": weights, "tokens": content_hash(asdict(how))[:16]}
    return ModelScorer(preference, tokenizer, how, identity)
