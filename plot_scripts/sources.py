"""What the plotting commands share: how they are told where the runs are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from plot_scripts.load import Loaded, load_directories, load_wandb, read_yaml
from utils import UserError, did_you_mean


def read_value(text: str, key: str = "") -> Any:
    """One value of the command line, as YAML: numbers, true, {a: b}."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={text}: cannot be read: {str(error).splitlines()[0]}") from error


def parser(description: str | None) -> argparse.ArgumentParser:
    """--runs, or --entity --project --filters, or a YAML with any of these keys."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="run directories, folders of them, patterns"
    )
    options.add_argument("--entity", help="W&B entity")
    options.add_argument("--project", help="W&B project")
    options.add_argument(
        "--filters",
        type=read_value,
        default={},
        help="W&B filters (MongoDB form), e.g. '{config.loss.name: ipo, state: finished}'; several sets: {$or: [{..}, {..}]}",
    )
    options.add_argument(
        "--cache", help="keep W&B's answer as CSV in this folder and redraw from it without network"
    )
    options.add_argument(
        "--refresh", action="store_true", help="ask W&B again although the cache has an answer"
    )
    options.add_argument(
        "--by", nargs="+", default=[], metavar="KEY", help="config keys that name a method, e.g. loss.name lr"
    )
    options.add_argument(
        "--labels", type=read_value, default={}, help="display names, e.g. '{gr_ipo: GR-IPO}'"
    )
    options.add_argument(
        "--carry", action="store_true", help="draw stopped runs on at their last value, marked"
    )
    options.add_argument("--out", default="figures", help="folder for the figures (default: figures)")
    options.add_argument(
        "--config", metavar="YAML", help="a file with any of these options; the command line wins"
    )
    return options


def parse(options: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Options of the command line over those of ``--config`` over the defaults."""
    config = options.parse_args(words).config
    if config is not None:
        if not Path(config).is_file():
            raise UserError(f"--config {config}: no such file")
        values = read_yaml(Path(config))
        known = [a.dest for a in options._actions]
        for key in values:
            if key not in known:
                raise UserError(
                    f"{config}: unknown key {key!r}{did_you_mean(key, known)}; keys: {', '.join(known[1:])}"
                )
        options.set_defaults(**values)
    return options.parse_args(words)


def parse_words(words: Sequence[str], lists: Sequence[str], paths: str | None = None) -> dict[str, Any]:
    """``key=value`` words -> values read as YAML; those of the keys in ``lists`` are split at commas.

    paths  the key that collects words which are no ``key=value``, or which name something that exists (``runs/lr=0.1``)
    """
    values: dict[str, Any] = {paths: []} if paths else {}
    for word in words:
        key, mark, text = word.partition("=")
        if paths and (not mark or Path(word).exists() or not key.isidentifier()):
            values[paths].append(word)
        elif not mark:
            raise UserError(f"{word}: must be key=value, e.g. out=figures")
        elif key in lists:
            whole = (
                [text] if text and Path(text).exists() else text.split(",")
            )  # a folder may have a comma in its name
            values[key] = [*values.get(key, []), *(t for t in whole if t)]
        else:
            values[key] = read_value(text, key)
    return values


def load(request: Any) -> Loaded:
    """The runs that ``runs``, or ``entity``, ``project`` and ``filters``, name."""
    if request.runs and request.project:
        raise UserError("runs and project both say where the runs are; give one")
    if request.project:
        cache = Path(request.cache) if request.cache else None
        return load_wandb(
            request.entity,
            request.project,
            request.filters,
            request.by,
            request.labels,
            cache,
            request.refresh,
        )
    if request.entity:
        raise UserError(f"entity={request.entity}: give project= as well, and no runs")
    if not request.runs:
        raise UserError("no runs named: give run directories, or a W&B project")
    return load_directories(request.runs, request.by, request.labels)


def run(main: Callable[[Sequence[str]], list[Path]], words: Sequence[str]) -> int:
    """Call ``main`` and print the files it wrote. Exit code: 0, or 2 with one message for a mistake the user can mend, a place
    that cannot be written included."""
    try:
        for path in main(words):
            print(path)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
