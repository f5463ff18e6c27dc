"""Runs -> one tidy table, from run directories or from Weights & Biases.

Both sources give ``RawRun`` objects; everything after that is shared, so the same run gives the same table and the same figure.
Table columns: run, config_hash, seed, step, examples, split, group, metric, value. ``group`` is "" for all examples, "worst_group",
"mean_group", or "group_<name>"; bounds that a run recorded are metrics of their own ("rewards/accuracies/ci_low").
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from engine.metric_names import direction, our_names
from utils import UserError, content_hash, did_you_mean, make_folder, write_atomic

COLUMNS = ["run", "config_hash", "seed", "step", "examples", "split", "group", "metric", "value"]
KEY = ["run", "split", "metric", "group"]
# keys of a row that say where it stands rather than what was measured
PLACE = frozenset(
    {
        "kind",
        "split",
        "step",
        "examples",
        "epoch",
        "time",
        "restored_from",
        "counters/examples",
        "counters/updates",
    }
)
# keys of a config that may differ between runs of one method
NOT_METHOD = re.compile(
    r"^(seed|exp_name|group_name|run_root|run_dir|fresh|resume.*|multirun_keys|wandb\..*|model\.archive|device|num_threads|allocator)$"
)
NAME = re.compile(
    r"^(?P<split>train|train_eval|eval|test)/(?P<metric>.+?)(?:/(?P<group>group_.+?|worst_group|mean_group))?(?P<bound>/ci_low|/ci_high)?$"
)


@dataclass(frozen=True)
class RawRun:
    """A run as a source gives it: nested config, provenance.json's content, metric rows in the order they were written."""

    name: str
    source: str
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    finished: bool


@dataclass(frozen=True)
class RunInfo:
    """What a figure's provenance says about a run. ``config`` is flat, with dotted keys."""

    run: str
    source: str
    method: str
    seed: int | None
    config_hash: str
    config_hash_no_seed: str
    commits: tuple[str, ...]
    dirty: bool
    finished: bool
    restored: bool  # it ends with its best weights; their evaluation stands in place of the last weights'
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Loaded:
    """The tidy table, its runs, and what was noticed on reading."""

    table: pd.DataFrame
    runs: tuple[RunInfo, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def series(self) -> dict[tuple[str, str, str, str], tuple[np.ndarray, np.ndarray]]:
        """(run, split, metric, group) -> (examples, value), both sorted by examples."""
        ordered = self.table.sort_values([*KEY, "examples"], kind="stable")
        return {
            key: (part["examples"].to_numpy(np.float64), part["value"].to_numpy(np.float64))
            for key, part in ordered.groupby(KEY, sort=False, observed=True)
        }

    @property
    def methods(self) -> list[str]:
        """Labels, those that were given by hand first, in their order."""
        return list(dict.fromkeys(info.method for info in self.runs))

    def of(self, method: str) -> list[RunInfo]:
        return [info for info in self.runs if info.method == method]

    def groups(self, split: str, metric: str) -> list[str]:
        """Names of the groups ("group_<name>") for which the metric was logged; W&B does not keep the order of a row's keys."""
        chosen = self.table[(self.table["split"] == split) & (self.table["metric"] == metric)]
        return sorted((g for g in chosen["group"].unique() if g.startswith("group_")), key=in_order)

    def has(self, split: str, metric: str, group: str = "") -> bool:
        return any(key[1:] == (split, metric, group) for key in self.series)

    def first_split(self, splits: str, metric: str, group: str = "") -> str:
        """The first of a comma-separated list of splits in which the metric was logged, else the first of the list."""
        names = [s.strip() for s in splits.split(",")]
        if group == "*":
            return next((s for s in names if self.groups(s, metric)), names[0])
        return next((s for s in names if self.has(s, metric, group)), names[0])


# ---------------------------------------------------------------------------------------------- rows -> table


def parse_key(key: str, default_split: str = "train") -> tuple[str, str, str]:
    """A logged name -> (split, metric, group)."""
    if key.startswith("train/weights/"):
        return "train", "weights", "group_" + key.removeprefix("train/weights/")
    found = NAME.match(key)
    if found is None:
        return default_split, key, ""
    return found["split"], found["metric"] + (found["bound"] or ""), found["group"] or ""


def older_names_of(raw: RawRun) -> dict[str, str]:
    """{older name: our name} for a run made by an older program; empty for a run of ours, also where it mirrors both."""
    keys = {key for row in raw.rows for key in row}
    if any(NAME.match(key) for key in keys):
        return {}
    datasets = raw.config.get("datasets")
    groups = [str(d) for d in datasets] if isinstance(datasets, (list, tuple)) else []
    numbers = [int(key.rpartition("_")[2]) for key in keys if re.search(r"_\d+$", key)]
    groups += [str(i) for i in range(len(groups), max(numbers, default=-1) + 1)]
    return our_names(groups, validation=any("_vald" in key or "/vald" in key for key in keys))


def in_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorting key: numbers inside names count as numbers (goqa_2 before goqa_10)."""
    return [
        (not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)
    ]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings -> {"loss.beta": 0.1, ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + str(key)] = value
    return flat


def tidy(
    raw_runs: Iterable[RawRun], by: Sequence[str] = (), labels: Mapping[str, str] | None = None
) -> Loaded:
    """Raw runs -> Loaded. ``by``: config keys whose values name the method; ``labels``: {automatic label: display name}.

    Runs are put in order (of ``labels``, else by method; then by seed), whatever the order in which a source gives them.
    """
    frames, runs, notes = [], [], []
    first = {label: i for i, label in enumerate((labels or {}).values())}

    def place(pair: tuple[RawRun, RunInfo]) -> tuple:
        info = pair[1]
        seed = -1 if info.seed is None else info.seed
        return first.get(info.method, len(first)), in_order(info.method), seed, in_order(info.run)

    for raw, info in sorted(((r, _describe(r, by, labels or {})) for r in raw_runs), key=place):
        frame, skipped = _frame(raw, info)
        if skipped:
            notes.append(f"{info.run}: {skipped} values are not finite and were left out")
        if frame.empty:
            notes.append(f"{info.run}: no metrics")
        frames.append(frame)
        runs.append(info)
    if not runs:
        raise UserError("no runs: nothing to draw")
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=COLUMNS)
    unused = [name for name in labels or {} if name not in {_automatic(i, by) for i in runs}]
    if unused:
        known = sorted({_automatic(i, by) for i in runs})
        raise UserError(
            f"labels: no method {unused[0]!r}{did_you_mean(unused[0], known)}; methods: {', '.join(known)}"
        )
    return Loaded(_with_aggregates(table), tuple(runs), tuple(notes))


def _describe(raw: RawRun, by: Sequence[str], labels: Mapping[str, str]) -> RunInfo:
    config, facts = flatten(raw.config), raw.provenance
    for key in by:
        if key not in config:
            raise UserError(f"by={key}: {raw.source} has no such config key{did_you_mean(key, config)}")
    seed = facts["seed"] if "seed" in facts else config.get("seed")
    same_method = {k: v for k, v in sorted(config.items()) if not NOT_METHOD.match(k)}
    # a run that was resumed may have been made by several commits
    git = [part.get("git") or {} for part in (facts, *facts.get("resumed", ()))]
    info = RunInfo(
        run=raw.name,
        source=raw.source,
        method="",
        seed=None if seed is None else int(seed),
        config_hash=facts.get("config_hash") or content_hash({**same_method, "seed": seed}),
        config_hash_no_seed=facts.get("config_hash_no_seed") or content_hash(same_method),
        commits=tuple(dict.fromkeys(g["commit"] for g in git if g.get("commit"))),
        dirty=any(g.get("dirty") for g in git),
        finished=raw.finished,
        restored=any(row.get("restored_from") is not None for row in raw.rows),
        config=config,
    )
    automatic = _automatic(info, by)
    return replace(info, method=labels.get(automatic, automatic))


def _automatic(info: RunInfo, by: Sequence[str]) -> str:
    """The method's label: the values of ``by``, else a bandit's cell, else the loss and (unless its name says so) the weighting."""
    config = info.config
    if by:
        return ", ".join(
            str(config[k]) if k.endswith("name") else f"{k.rpartition('.')[2]}={config[k]}" for k in by
        )
    if "cell" in config:
        return str(config["cell"])
    loss, weighting = config.get("loss.name"), config.get("weighting.name")
    if loss is None:
        return re.sub(r"[_-]?s(eed)?[_=-]?\d+$", "", Path(info.run).name) or info.run
    plain = weighting in (None, "uniform") or str(loss).startswith("gr_")
    return str(loss) if plain else f"{loss}+{weighting}"


def _frame(raw: RawRun, info: RunInfo) -> tuple[pd.DataFrame, int]:
    """The run's rows as a table, and how many values were not finite. Of a value written twice (a resumed run) the last counts."""
    columns: dict[str, list] = {
        name: [] for name in ("step", "examples", "split", "group", "metric", "value")
    }
    older = older_names_of(raw)
    parsed: dict[tuple[str, str], tuple[str, str, str]] = {}
    skipped = 0
    for row in raw.rows:
        examples = row.get("examples", row.get("counters/examples", row.get("_step")))
        if examples is None:
            continue
        step = row.get("step", row.get("counters/updates", math.nan))
        default = row["split"] if row.get("kind") == "eval" and "split" in row else "train"
        for key, value in row.items():
            if (
                key in PLACE
                or key.startswith("_")
                or isinstance(value, bool)
                or not isinstance(value, (int, float))
            ):
                continue
            if not math.isfinite(value):
                skipped += 1
                continue
            if (key, default) not in parsed:
                parsed[key, default] = parse_key(older.get(key, key), default)
            split, metric, group = parsed[key, default]
            for name, item in zip(columns, (step, examples, split, group, metric, float(value)), strict=True):
                columns[name].append(item)
    frame = pd.DataFrame(columns).astype({"step": "float64", "examples": "float64", "value": "float64"})
    frame = frame.drop_duplicates(["split", "metric", "group", "examples"], keep="last")
    frame.insert(0, "run", info.run)
    frame.insert(1, "config_hash", info.config_hash)
    frame.insert(2, "seed", pd.array([info.seed] * len(frame), dtype="Int64"))
    return frame[COLUMNS], skipped


def _with_aggregates(table: pd.DataFrame) -> pd.DataFrame:
    """Add worst_group (largest loss, smallest accuracy) and mean_group where a run logged all its groups but not these: the
    batch of a training step may lack some."""
    grouped = table[table["group"].str.startswith("group_") & ~table["metric"].str.contains("/ci_")]
    grouped = grouped.sort_values(
        "group", kind="stable"
    )  # sums depend on the order, which sources do not share
    better = {metric: direction(metric) for metric in grouped["metric"].unique()}
    grouped = grouped[grouped["metric"].map(better).notna()]
    if grouped.empty:
        return table
    place = ["run", "config_hash", "seed", "step", "examples", "split", "metric"]
    parts = (
        grouped.groupby(place, sort=False, dropna=False)["value"]
        .agg(["max", "min", "mean", "size"])
        .reset_index()
    )
    parts = parts[parts["size"] == parts.groupby(["run", "split", "metric"])["size"].transform("max")]
    less = parts["metric"].map(better) == "min"
    worst = parts[place].assign(group="worst_group", value=np.where(less, parts["max"], parts["min"]))
    mean = parts[place].assign(group="mean_group", value=parts["mean"])
    joined = pd.concat([table, worst[COLUMNS], mean[COLUMNS]], ignore_index=True)
    return joined.drop_duplicates(
        [*KEY, "examples"], keep="first", ignore_index=True
    )  # what the run logged itself wins


# ---------------------------------------------------------------------------------------------- run directories


def find_runs(paths: Iterable[str | Path]) -> list[Path]:
    """Run directories (those with a metrics.jsonl) at, under, or matching each path or glob pattern; what fresh=true has set aside
    only where it is named."""
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given).expanduser()
        places = [path]
        if not path.exists() and any(c in str(given) for c in "*?["):
            root = Path(path.anchor) if path.is_absolute() else Path()
            places = sorted(root.glob(str(path.relative_to(path.anchor))))
        runs = [run for place in places for run in _runs_under(place)]
        if not runs:
            raise UserError(
                f"runs={given}: no metrics.jsonl there; name a run directory, a folder of them, or a pattern"
            )
        found.update(dict.fromkeys(runs))
    return list(found)


def _runs_under(path: Path) -> list[Path]:
    if (path / "metrics.jsonl").is_file():
        return [path]
    found = (p.parent for p in path.rglob("metrics.jsonl")) if path.is_dir() else ()
    return sorted(p for p in found if not re.fullmatch(r"previous-\d+", p.name))


def directory_runs(paths: Iterable[str | Path]) -> Iterator[RawRun]:
    """RawRuns of run directories; names are made distinct by as many parent folders as that takes.

    A bandit experiment's directory holds many runs, one per cell and seed; each is a RawRun of its own.
    """
    folders = find_runs(paths)
    names = _distinct_names(folders)
    for folder, name in zip(folders, names, strict=True):
        run = RawRun(
            name=name,
            source=str(folder),
            config=read_yaml(folder / "config.yaml") if (folder / "config.yaml").is_file() else {},
            provenance=_json(folder / "provenance.json"),
            rows=read_rows(folder / "metrics.jsonl"),
            finished=(folder / "results.json").is_file(),
        )
        yield from _cells(run) if any("cell" in row for row in run.rows) else [run]


def _cells(experiment: RawRun) -> Iterator[RawRun]:
    """The runs of a bandit experiment: rows with a cell and a seed, which become config and provenance."""
    parts: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for row in experiment.rows:
        if "cell" in row and "seed" in row:
            measured = {key: value for key, value in row.items() if key not in ("cell", "seed")}
            parts.setdefault((row["cell"], row["seed"]), []).append(measured)
    hashes = ("config_hash", "config_hash_no_seed")  # of the whole experiment
    facts = {key: value for key, value in experiment.provenance.items() if key not in hashes}
    for (cell, seed), rows in parts.items():
        yield replace(
            experiment,
            name=f"{experiment.name}/{cell}/seed{seed}",
            config={"cell": cell, **experiment.config},
            provenance={**facts, "seed": seed},
            rows=rows,
            finished=experiment.rows[-1].get("kind") == "end",
        )


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    parts = [f.resolve().parts for f in folders]
    for depth in range(1, max((len(p) for p in parts), default=1) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [str(f) for f in folders]


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold keys and values, not a {type(values).__name__}")
    return values


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. A last line without its newline is the mark of a killed run and is left out."""
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}:{number}: not a JSON object ({error}); mend or delete the line"
            ) from error
    return rows


def load_directories(
    paths: Iterable[str | Path], by: Sequence[str] = (), labels: Mapping[str, str] | None = None
) -> Loaded:
    return tidy(directory_runs(paths), by, labels)


# ---------------------------------------------------------------------------------------------- Weights & Biases


def wandb_runs(
    entity: str | None, project: str, filters: Mapping[str, Any] | None = None, api: Any = None
) -> Iterator[RawRun]:
    """RawRuns of a W&B project. ``filters``: {"config.loss.name": "ipo", "state": "finished"} in the API's own (MongoDB) form.

    Reads the whole history (``scan_history``), not W&B's sample of it. ``api``: an object like ``wandb.Api()``.
    """
    where = f"{entity}/{project}" if entity else project
    failures: tuple[type[Exception], ...] = (ValueError, OSError)  # no such project; no connection
    try:
        if api is None:
            import wandb

            failures += (wandb.errors.Error,)
            api = wandb.Api()
        found = list(api.runs(where, filters=dict(filters or {}), order="+created_at"))
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        advice = "log in with `wandb login`, check entity and project, or draw from run directories"
        raise UserError(f"W&B {where}: {reason}; {advice}") from error
    for run in found:
        config = dict(run.config)
        facts = config.pop("provenance", None) or {}
        if "config_hash_no_seed" not in facts and re.fullmatch(r"[0-9a-f]{12,64}", str(run.group)):
            facts = {**facts, "config_hash_no_seed": run.group}  # our runs are grouped by that hash
        if "git" not in facts and run.commit:
            facts = {**facts, "git": {"commit": run.commit}}
        yield RawRun(
            name=run.name,
            source=f"wandb:{where}/{run.id}",
            config=config,
            provenance=facts,
            rows=list(run.scan_history()),
            finished=run.state == "finished",
        )


def load_wandb(
    entity: str | None,
    project: str,
    filters: Mapping[str, Any] | None = None,
    by: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
    cache: Path | None = None,
    refresh: bool = False,
    api: Any = None,
) -> Loaded:
    """The table of a W&B query. With ``cache`` the answer is kept as CSV there and read from it next time, without network."""
    if cache is None:
        return tidy(_distinct(wandb_runs(entity, project, filters, api)), by, labels)
    question = json.dumps([entity, project, dict(filters or {})], sort_keys=True)
    folder = cache / hashlib.sha256(question.encode()).hexdigest()[:16]
    if refresh or not (folder / "runs.json").is_file():
        _write_cache(folder, list(_distinct(wandb_runs(entity, project, filters, api))))
    return tidy(_read_cache(folder), by, labels)


def _distinct(raw_runs: Iterable[RawRun]) -> Iterator[RawRun]:
    """W&B does not ask names to differ: a second run of a name gets its id appended."""
    seen: set[str] = set()
    for raw in raw_runs:
        name = raw.name if raw.name not in seen else f"{raw.name} ({raw.source.rpartition('/')[2]})"
        seen.add(name)
        yield replace(raw, name=name)


def _write_cache(folder: Path, raw_runs: Sequence[RawRun]) -> None:
    """One CSV of rows per run, and runs.json, written last: its presence means that the answer is complete."""
    make_folder(folder)
    for number, raw in enumerate(raw_runs):
        names = list(
            dict.fromkeys(
                key for row in raw.rows for key, v in row.items() if isinstance(v, (int, float, str))
            )
        )
        with (folder / f"{number}.csv").open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, names, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(raw.rows)
    described = [{k: v for k, v in asdict(replace(raw, rows=())).items() if k != "rows"} for raw in raw_runs]
    write_atomic(folder / "runs.json", json.dumps(described, indent=1, default=str) + "\n")


def _read_cache(folder: Path) -> Iterator[RawRun]:
    for number, described in enumerate(_json(folder / "runs.json")):
        with (folder / f"{number}.csv").open(encoding="utf-8", newline="") as handle:
            rows = [{k: _number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(handle)]
        yield RawRun(rows=rows, **described)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
