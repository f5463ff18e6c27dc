"""The data of a run: rows of every split, tokenised for what the loss needs, and the batch plan over them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.compose import Run
from data.files import ReadSettings
from data.names import dataset_module
from data.plan import Plan
from data.schema import Example, Row
from data.token_cache import TokenCache
from engine.metric_names import parts
from engine.stopping import Plateau
from losses.types import Loss
from preference_datasets import Counts, Tokenization, sft_examples, tokenize
from utils import UserError
from weighting import Uniform


@dataclass
class Data:
    """Rows per split, and what they came from. ``examples`` are those the rows were made of, same order."""

    groups: tuple[str, ...]
    datasets: tuple[str, ...]
    rows: dict[str, list[Row]]
    examples: dict[str, list[Example]]
    source: dict[str, list[int]]  # split -> index into ``datasets`` of each row
    counts: Counts

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one response."""
        rows = (row for part in self.rows.values() for row in part)
        return max((len(row.prompt) + max(map(len, row.responses), default=0) for row in rows), default=0)


def load_examples(run: Run) -> dict[str, list[list[Example]]]:
    """split -> one list per entry of ``datasets``."""
    found: dict[str, list[list[Example]]] = {}
    common = {
        "on_bad_row": run.config.data.on_bad_row,
        "max_bad_fraction": run.config.data.max_bad_fraction,
    }
    for spec in run.datasets:
        settings = spec.settings
        if isinstance(settings, ReadSettings):
            common["rejected_path"] = str(Path(run.config.run_dir) / f"rejected-{spec.name}.jsonl")
            settings = replace(settings, **{k: v for k, v in common.items() if getattr(settings, k) is None})
        for split, examples in dataset_module(spec.source).load(spec.name, settings, run.config.seed).items():
            found.setdefault(split, [[] for _ in run.datasets])[run.datasets.index(spec)] = examples
    return found


def _targets(examples: list[Example], sft_on: str, counts: Counts) -> list[Example]:
    """``sft_examples``; the pairs of a prompt that it passes over are counted."""
    made = sft_examples(examples, sft_on)
    if sft_on == "chosen":
        left_out = Counter(e.group for e in examples)
        left_out.subtract(e.group for e in made)
        for group, number in left_out.items():
            counts.add("repeated", group, number)
    return made


def load_data(run: Run, tokenizer: Any, loss: Loss | None = None) -> Data:
    """Read and tokenise every split for what ``loss`` needs (default: the run's)."""
    loss = loss or run.loss
    needs = loss.needs
    by_split = load_examples(run)
    counts = Counts()
    if "target" in needs.policy:
        by_split = {s: [_targets(e, loss.sft_on, counts) for e in lists] for s, lists in by_split.items()}
    groups = tuple(dict.fromkeys(e.group for lists in by_split.values() for part in lists for e in part))
    roles = tuple(dict.fromkeys((*needs.policy, *needs.reference)))
    rows: dict[str, list[Row]] = {}
    kept: dict[str, list[Example]] = {}
    source: dict[str, list[int]] = {}
    cache = TokenCache(Path(run.config.token_cache)) if run.config.token_cache is not None else None
    for split, lists in by_split.items():
        rows[split], kept[split], source[split] = [], [], []
        for i, (spec, examples) in enumerate(zip(run.datasets, lists, strict=True)):
            check_columns(examples, needs.scalars, spec.name, split)
            made = tokenize(
                examples,
                tokenizer,
                tokenization(run, spec),
                groups=groups,
                roles=roles,
                optional_roles=needs.optional_roles,
                counts=counts,
                cache=cache,
            )
            by_uid = {e.uid: e for e in examples}
            rows[split] += made
            kept[split] += [by_uid[row.uid] for row in made]
            source[split] += [i] * len(made)
    counts.log()
    if cache is not None:
        cache.log()
    if not rows.get("train") and not run.config.eval_only_once:
        raise UserError(f"datasets={run.config.datasets}: no training rows are left; see the counts above")
    return Data(groups, tuple(s.name for s in run.datasets), rows, kept, source, counts)


def tokenization(run: Run, spec: Any) -> Tokenization:
    config = run.config
    return Tokenization(
        bos=config.data.bos,
        mode=config.data.tokenize,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.truncation or spec.settings.truncation_mode,
    )


def check_columns(examples: Sequence[Example], scalars: Sequence[str], name: str, split: str) -> None:
    """Every row must have the columns that the loss needs."""
    for example in examples:
        for column in scalars:
            if column not in example.scalars:
                raise UserError(
                    f"{example.uid}: column {column!r} is missing, which this loss needs; "
                    f"{name}/{split} has {sorted(example.scalars) or 'no such columns'}"
                )


def check_preferences(run: Run, splits: Mapping[str, Sequence[Row]]) -> None:
    """Rows with auxiliary responses need the columns that the loss reads of them; ``fresh_pairs`` makes those of train."""
    needs = run.loss.needs
    for split, rows in splits.items():
        if split == "train" and run.config.fresh_pairs.num_pairs:
            continue
        with_aux = [row for row in rows if set(needs.optional_roles) & set(row.roles)]
        for column in needs.optional_scalars:
            bare = [row for row in with_aux if column not in {*row.scalars, *row.response_scalars}]
            if bare:
                raise UserError(
                    f"{bare[0].uid}: has auxiliary responses but no {column}, like {len(bare)} of {len(rows)} {split} rows; "
                    "add the column with commands.annotate"
                )


def check_groups(run: Run, groups: Sequence[str], splits: Mapping[str, Sequence[Row]]) -> None:
    """Where group weights or the stopping rule rest on groups, each must be in every evaluated split: a worst group that
    leaves one out is not the worst. Raises UserError."""
    watched = None
    if isinstance(run.stopping, Plateau):
        metric = run.stopping.watched()
        split, _, group, _ = parts(metric)
        split = {"eval": "validation", "train_eval": "train", "test": "test"}.get(split)
        if split not in run.config.splits_each_time or not splits.get(split):
            there = ", ".join(f"{len(rows)} {s}" for s, rows in splits.items() if rows) or "none"
            raise UserError(
                f"stopping.metric={metric}: will not be there; evaluated are {run.config.splits_each_time}, and the rows to evaluate are: "
                f"{there}; the data set's validation_fraction or num_validation makes a validation split (eval/)"
            )
        watched = split if group else None
    for split, rows in splits.items():
        present = {row.group for row in rows}
        missing = [name for i, name in enumerate(groups) if i not in present]
        if rows and missing and (split == watched or not isinstance(run.weighting, Uniform)):
            raise UserError(
                f"no {split} row of group {', '.join(missing)}: its worst-group metrics would leave that out; "
                "add rows or drop the group"
                + (", or watch another stopping.metric" if split == watched else "")
            )


def _check_strata(what: str, names: Sequence[str], strata: Sequence[int]) -> None:
    present = set(strata)
    empty = [name for i, name in enumerate(names) if i not in present]
    if empty:
        raise UserError(
            f"{what} {', '.join(empty)} has no training rows that could be drawn; add some, or drop it"
        )


def build_plan(run: Run, data: Data) -> Plan:
    """The batch plan: plain epochs, weighted mixtures of data sets, or groups drawn uniformly."""
    config, rows = run.config, data.rows["train"]
    strata, probs = None, None
    if config.weighted_batches:
        strata, probs = [row.group for row in rows], [1.0] * len(data.groups)
        _check_strata("weighted_batches=true: group", data.groups, strata)
    elif config.data.mix_weights is not None:
        strata = data.source["train"]
        probs = [config.data.mix_weights[name] for name in data.datasets]
        _check_strata("data.mix_weights: data set", data.datasets, strata)
    return Plan(
        rows,
        seed=config.seed,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        sep_pairs=config.sep_pairs,
        strata=strata,
        strata_probs=probs,
        num_groups=len(data.groups),
    )
