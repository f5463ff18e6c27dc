"""Command line -> one validated, typed description of a run. The only place that sees Hydra's config object."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from config.aliases import split_flags, translate
from config.build import MISSING, build, convert, load_class
from config.schema import Config, DataConfig
from utils import UserError, content_hash, did_you_mean, log

CONFIG_DIR = Path(__file__).resolve().parent
GROUPS = ("model", "loss", "weighting", "stopping", "data_selection", "trainer", "experiment")
# where a run is written and how it is watched: may differ between two starts of the same run
NOT_IDENTITY = (
    "run_root", "run_dir", "exp_name", "fresh", "resume", "resume_from", "resume_allow", "audit", "wandb", "multirun_keys",
    "cache_dir", "token_cache", "reference_cache", "reference_check", "eval_batch_size", "checkpoint", "num_threads", "allocator", "device",
    "trainer",
)  # fmt: skip


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of ``datasets``: its name as typed, the module data/<source>.py, and that module's Settings."""

    name: str
    source: str
    settings: Any


@dataclass(frozen=True)
class Run:
    """Everything a run is: typed settings, built parts, the resolved plain config that is written to disk, and the override
    words that ``compose`` was given."""

    config: Config
    loss: Any
    weighting: Any
    stopping: Any
    data_selection: Any
    model: Any
    datasets: tuple[DatasetSpec, ...]
    plain: dict[str, Any]
    words: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """The part of the config that decides the numbers."""
        return {k: v for k, v in self.plain.items() if k not in NOT_IDENTITY}

    @property
    def config_hash(self) -> str:
        return content_hash(self.identity)

    @property
    def config_hash_no_seed(self) -> str:
        """Equal for runs that differ in the seed alone, also where paths name it: model.archive=runs/sft_seed0/LATEST."""
        plain = {k: v for k, v in self.identity.items() if k != "seed"}
        archive = plain["model"].get("archive")
        plain["model"] = dict(plain["model"], archive=archive and re.sub(r"(seed[=_-]?)\d+", r"\1*", archive))
        return content_hash(plain)


# ------------------------------------------------------------------------------------------------ the command line


def options(group: str) -> list[str]:
    """Names of config/<group>/*.yaml."""
    return sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))


def prepare(argv: list[str]) -> list[str]:
    """Words as typed -> words for Hydra: aliases translated, group names checked, keys forced so that a key Hydra does
    not know reaches our own message ("did you mean") instead of its."""
    flags, overrides = split_flags(argv)
    overrides = translate(overrides)
    parsed = [_parsed(word) for word in overrides]
    words, swept = [], []
    last = {override.key_or_group: i for i, override in enumerate(parsed)}
    for i, override in enumerate(parsed):
        key = override.key_or_group
        if last[key] != i:
            continue  # the last word on a key counts, as for scripts that put their defaults before "$@"
        if override.is_sweep_override():
            swept.append(key)
        if key in GROUPS:
            for value in _choices(override):
                if value not in options(key) and (key, value) != ("experiment", "null"):
                    raise UserError(
                        f"{key}={value}: there is no config/{key}/{value}.yaml{did_you_mean(str(value), options(key))}; "
                        f"known: {', '.join(options(key))}"
                    )
            words.append(override.input_line.lstrip("+"))
        elif key in ("", "dataset"):  # Hydra takes them for a group
            raise UserError(
                f"unknown key {override.input_line}; it is datasets=[a,b] and data.<name>.KEY=VALUE"
            )
        elif key == "hydra":
            raise UserError(f"hydra={override.get_value_element_as_str()}: set a key of it, hydra.KEY=VALUE")
        elif override.is_delete() or key.startswith("hydra"):
            if key == "hydra/launcher":
                _need_launcher(str(override.value()))
            words.append(override.input_line)
        elif isinstance(override.value(), Glob):
            raise UserError(
                f"{override.input_line}: glob() goes through the files of a group ({', '.join(GROUPS)}); write the values, a,b"
            )
        else:
            _not_inside_a_list(key)
            words.append("++" + override.input_line.lstrip("+"))
    if swept and not {"-m", "--multirun"} & set(flags):
        raise UserError(f"{swept[0]}: several values make a sweep; add -m, or put a list in brackets, [a,b]")
    if swept:
        words.append(f"++multirun_keys=[{','.join(swept)}]")
    return flags + words


def _need_launcher(name: str) -> None:
    """A launcher for a cluster is a package of its own."""
    try:
        missing = importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None
    except ModuleNotFoundError:  # no plugin of Hydra at all
        missing = True
    if missing and (name == "slurm" or name.startswith("submitit_")):
        raise UserError(f"hydra/launcher={name}: not installed; pip install hydra-submitit-launcher")


def _parsed(word: str) -> Any:
    try:
        return OverridesParser.create().parse_override(_quoted(word))
    except HydraException as error:
        raise UserError(
            f"{word}: cannot be read; every word is KEY=VALUE, a list is [a,b], a mapping {{a:1}}, and text with brackets, commas or "
            "quotes in it stands in quotes, KEY=\"'a,b'\""
        ) from error


UNREADABLE = re.compile(r"[^\w\s/+.$%*@?|:-]|[^\x00-\x7f]")  # what Hydra wants in quotes
LITERAL = ("exp_name", "run_dir", "run_root")  # 2024_11_28 is a number to Hydra: 20241128


def _quoted(word: str) -> str:
    """Paths need no quotes, whatever Hydra thinks of "=" (a multirun's jobs: model.archive=runs/two/loss=ipo/seed=0/LATEST), "~",
    "&" or letters beyond ASCII in them."""
    key, _, value = word.partition("=")
    if set(value) & set("'\"[]{},\\") or re.match(r"\w+\(.*\)$", value):
        return word
    return f"{key}='{value}'" if UNREADABLE.search(value) or (value and key.lstrip("+") in LITERAL) else word


def _not_inside_a_list(key: str) -> None:
    """Hydra's answer would be about int() and name no key."""
    node = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text("utf-8"))
    words = key.split(".")
    for i, word in enumerate(words):
        if isinstance(node, list):
            name = ".".join(words[:i])
            raise UserError(f"{key}: {name} is a list; give all of it, {name}=[a,b]")
        node = node.get(word) if isinstance(node, dict) else None


def _choices(override: Any) -> list[str]:
    if isinstance(override.value(), Glob):  # Hydra takes it from the files that there are
        return []
    if override.is_sweep_override():
        return [str(v) for v in override.sweep_string_iterator()]
    return ["null" if override.value() is None else str(override.value())]


def compose(argv: list[str]) -> Run:
    """A validated Run from override words, without Hydra's entry (tests, commands)."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    words = prepare(argv)
    if words and words[0].startswith("-"):
        raise UserError(f"{words[0]}: is train.py's; here every word is key=value")
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        try:
            cfg = hydra_compose("config", overrides=words)
        except (
            HydraException,
            OmegaConfBaseException,
            ValueError,
        ) as error:  # its mistakes are not all of its class
            raise UserError(f"cannot compose the configuration: {composition_problem(error)}") from error
    return replace(resolve(cfg, words), words=tuple(argv))


def composition_problem(error: BaseException) -> str:
    """What Hydra says, and why where it does not say that itself."""
    cause = f" ({_first_line(error.__cause__)})" if error.__cause__ else ""
    return f"{_first_line(error)}{cause}"


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


# ------------------------------------------------------------------------------------------------ config -> Run


def resolve(cfg: DictConfig, typed: Iterable[str] = ()) -> Run:
    """Check everything that can be checked before data or models are touched. ``typed``: Hydra's words of the command line.

    Raises UserError with all problems that were found, one a line.
    """
    try:
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"cannot resolve the configuration: {_first_line(error)}") from error
    swept = convert(list[str], plain.get("multirun_keys"), "multirun_keys")
    methods = {"experiment", "loss", "weighting", "trainer", "stopping"} & set(swept)
    typed = {word.lstrip("+").partition("=")[0] for word in typed}
    typed_keys = set() if methods else typed
    for group in ("weighting", "stopping"):
        _leave_out_foreign(plain, group, typed_keys)
    if isinstance(plain.get("loss"), dict):
        _leave_out_foreign(plain, "loss", typed={f"loss.{key}" for key in plain["loss"]})
    _leave_out_data(plain, typed)
    _name_multirun(plain, swept)
    plain.pop("experiment", None)
    problems: list[str] = []

    def attempt(make, *args):
        try:
            return make(*args)
        except UserError as error:
            problems.append(str(error))
            return None

    parts = {name: plain.get(name) for name in ("model", "loss", "weighting", "stopping", "data_selection")}
    top = {k: v for k, v in plain.items() if k not in parts}
    datasets = attempt(_datasets, plain) or ()
    if isinstance(top.get("data"), Mapping):
        known = set(DataConfig.__dataclass_fields__)
        top["data"] = {k: v for k, v in plain["data"].items() if k in known}
    config = attempt(build, Config, top, "", GROUPS)
    loss = attempt(_part, "loss", parts["loss"], ("losses",))
    weighting = attempt(_part, "weighting", parts["weighting"], ("weighting",))
    stopping = attempt(_part, "stopping", parts["stopping"], ("engine.stopping",))
    selection = attempt(_part, "data_selection", parts["data_selection"], ("engine.selection",))
    model = attempt(_model, parts["model"])
    if problems:
        raise UserError("\n".join(problems))
    run = Run(config, loss, weighting, stopping, selection, model, datasets, plain)
    _cross_check(run)
    return run


def _name_multirun(plain: dict[str, Any], keys: list[str]) -> None:
    """A job of a multirun writes to run_dir/<swept key=value,...>/seed=<seed>."""
    names = []
    for key in sorted(keys, key=lambda k: (k == "seed", k)):
        value: Any = plain
        for word in key.split("."):
            value = value.get(word) if isinstance(value, Mapping) else None
        if isinstance(value, Mapping):
            value = value.get("name")
        names.append(f"{key}={value}")
    if names:
        plain["run_dir"] = "/".join([str(plain["run_dir"]), *(n.replace("/", "_") for n in names)])


def _leave_out_foreign(plain: dict[str, Any], group: str, typed: set[str]) -> None:
    """An experiment's keys go with the part they are of (``experiment=X stopping=none``). What was typed stays, and is refused
    if the part has no such key, but for 0, false and null: they say what such a part does anyway, and the older
    repositories set them for every loss. In a multirun over methods nothing counts as typed: ``weighting.step_size=0.1``
    is for the jobs whose weighting has it."""
    part = plain.get(group)
    if not isinstance(part, dict):
        return
    keys: dict[str, set[str]] = {}  # by class: loss=gr_ipo is the class of loss=ipo
    for name in options(group):
        own = yaml.safe_load((CONFIG_DIR / group / f"{name}.yaml").read_text("utf-8"))
        keys.setdefault(str(own.get("class")), set()).update(own)
    mine = keys.get(str(part.get("class")))
    if mine is None:  # refused by its name later, or somebody's own class: its keys are not ours to judge
        return
    others = set().union(*keys.values()) - mine
    for key in [k for k in part if k in others and not (f"{group}.{k}" in typed and part[k])]:
        log.info("%s.%s=%s: not for %s=%s", group, key, part.pop(key), group, part["name"])


def _leave_out_data(plain: dict[str, Any], typed: set[str]) -> None:
    """Likewise its settings of data sets that are not among the run's: ``experiment=X datasets=[hh]``."""
    names, data = plain.get("datasets"), plain.get("data")
    if not isinstance(names, list) or not isinstance(data, dict):
        return  # refused later
    others = [k for k in data if k not in DataConfig.__dataclass_fields__ and k not in names]
    for name in others:
        if not any(key == f"data.{name}" or key.startswith(f"data.{name}.") for key in typed):
            log.info("data.%s: not for datasets=%s", name, names)
            del data[name]


def _part(group: str, values: Any, packages: tuple[str, ...]) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{group}={values}: choose one of {', '.join(options(group))}")
    values = dict(values)
    values.pop("name", None)
    path = values.pop("class", None)
    if path is None:
        raise UserError(f"{group}.class is missing")
    cls = load_class(path, packages, f"{group}.class")
    return build(cls, values, f"{group}.")


def recorded(archive: str, key: str = "model.archive") -> tuple[Any, Any] | None:
    """(loss, ModelSpec) that the run which ``archive``, the value of ``key``, belongs to was configured with; None if it is no
    run of ours."""
    from engine import archives

    found = archives.find(archive, key)
    for folder in (found, *found.parents[:1]):
        path = folder / "config.yaml"
        if path.is_file():
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            return _part("loss", values["loss"], ("losses",)), _model(values["model"])
    return None


def _model(values: Any) -> Any:
    from engine.model_spec import ModelSpec

    if not isinstance(values, Mapping):
        raise UserError(f"model={values}: choose one of {', '.join(options('model'))}")
    if values.get("archive") == "":  # an unset shell variable; as a path it is the working directory
        raise UserError(
            "model.archive=: an empty path; give RUN/LATEST, or leave it out for the model's own weights"
        )
    return build(ModelSpec, values, "model.")


def dataset_file(name: str) -> Path:
    """config/dataset/<name>.yaml, or of the name's stem: goqa_3 -> goqa, oqa_SEX_Male -> oqa."""
    stem = name
    while stem:
        path = CONFIG_DIR / "dataset" / f"{stem}.yaml"
        if path.is_file():
            return path
        stem = stem.rpartition("_")[0]
    known = options("dataset")
    raise UserError(
        f"datasets: unknown name {name!r}{did_you_mean(re.sub(r'_.*', '', name), known)}; known: {', '.join(known)}"
    )


def _datasets(plain: dict[str, Any]) -> tuple[DatasetSpec, ...]:
    """Merge config/dataset/<name>.yaml with data.<name>.* for every name; write the result back into ``plain``."""
    names, data = plain.get("datasets"), plain.get("data")
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return ()  # refused with the rest of the top level
    if not isinstance(data, Mapping):
        raise UserError(f"data={data}: must be a mapping")
    common = set(DataConfig.__dataclass_fields__)
    stray = [k for k in data if k not in common and k not in names]
    if stray:
        raise UserError(
            "\n".join(
                f"unknown key data.{k}{did_you_mean(k, [*common, *names])}; data.<name>.* is for the names in datasets={names}"
                for k in stray
            )
        )
    specs = []
    for name in names:
        values = yaml.safe_load(dataset_file(name).read_text(encoding="utf-8"))
        given = data.get(name) or {}
        if not isinstance(given, Mapping):
            raise UserError(f"data.{name}={given}: must be a mapping, e.g. data.{name}.path=FILE")
        values.pop("name", None)
        source = values.pop("source")
        for key, fixed in (("name", name), ("source", source)):
            if given.get(key, fixed) != fixed:
                raise UserError(f"data.{name}.{key}={given[key]}: is {fixed} and cannot be changed")
        given = {k: v for k, v in given.items() if k not in ("name", "source")}
        merged = {**values, **given}
        unknown = [k for k in given if k not in values]
        if unknown:
            k = unknown[0]
            raise UserError(
                f"unknown key data.{name}.{k}{did_you_mean(k, values)}; keys: {', '.join(values)}"
            )
        try:
            settings = build(importlib.import_module(f"data.{source}").Settings, merged, f"data.{name}.")
        except UserError as error:
            raise UserError(str(error).replace("data.<name>.", f"data.{name}.")) from error
        plain["data"][name] = {"name": name, "source": source, **merged}
        specs.append(DatasetSpec(name, source, settings))
    return tuple(specs)


def _cross_check(run: Run) -> None:
    """What depends on two parts at once."""
    from engine.optim import optimizer_arguments

    needs, config = run.loss.needs, run.config
    optimizer_arguments(config.optimizer, config.weight_decay, config.optimizer_options)
    loss = run.plain["loss"]["name"]
    if needs.reference and config.assert_sft_step and run.model.archive is None and not config.audit:
        raise UserError(
            f"loss={loss} compares with a reference, which should be an SFT model: give model.archive=RUN/LATEST "
            "(a run, checkpoint, HF directory, .safetensors or policy.pt), or assert_sft_step=false to use the "
            "model's own weights"
        )
    if not needs.trains and not config.eval_only_once:
        raise UserError(f"loss={loss} only evaluates: add eval_only_once=true")
    if config.sample_during_eval and needs.output != "logps":
        raise UserError(
            f"sample_during_eval=true: loss={loss} trains a model that gives {needs.output}s and cannot write"
        )
    if getattr(run.weighting, "adaptive_step_size", False) and run.plain["stopping"]["name"] == "none":
        log.warning(
            "weighting.adaptive_step_size=true: stopping=none cuts no learning rate, so the step size stays"
        )
    if config.fresh_pairs.num_pairs and "aux_1" not in needs.optional_roles:
        raise UserError(
            f"fresh_pairs.num_pairs={config.fresh_pairs.num_pairs}: loss={loss} has no auxiliary pairs; use loss=vrpo or "
            "loss=vrpo_reward"
        )
    if config.fresh_pairs.num_pairs and getattr(run.loss, "lam", None) == "auto":
        raise UserError(
            f"loss.lam=auto fresh_pairs.num_pairs={config.fresh_pairs.num_pairs}: M/(M+1) is for pairs that are drawn once; with "
            "new ones every epoch E epochs average over about E M pairs: give the number, E M / (E M + 1), or 1"
        )
    if config.checkpoint.format == "sharded" and run.model.use_lora:
        raise UserError(
            "checkpoint.format=sharded with model.use_lora=true: an adapter is small and loads as one; use "
            "checkpoint.format=full"
        )
    run.data_selection.check(run.loss)
    selection = run.plain["data_selection"]["name"]
    if (selection == "none") != (config.selected_batch_size is None):
        raise UserError(
            f"data_selection={selection} selected_batch_size={config.selected_batch_size}: give both or neither: how rows of a "
            "batch are chosen (uniform | rho_loss_dpo) and how many are kept"
        )
    if config.data.mix_weights is not None:
        unknown = [k for k in config.data.mix_weights if k not in config.datasets]
        missing = [k for k in config.datasets if k not in config.data.mix_weights]
        positive = all(0 < weight < math.inf for weight in config.data.mix_weights.values())
        if unknown or missing or not positive:
            raise UserError(
                f"data.mix_weights={config.data.mix_weights}: needs one positive weight for each of datasets={config.datasets}"
            )


__all__ = [
    "CONFIG_DIR",
    "MISSING",
    "DatasetSpec",
    "Run",
    "compose",
    "options",
    "prepare",
    "recorded",
    "resolve",
]
