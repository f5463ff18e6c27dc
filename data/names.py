"""From the name a user lists in ``datasets=[..]`` to the settings file and the module that reads it."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

from utils import UserError, did_you_mean


def dataset_names() -> tuple[str, ...]:
    """The data sets that have settings: the stems of config/dataset/*.yaml."""
    folder = Path(__file__).resolve().parents[1] / "config" / "dataset"
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def parse_name(name: str, known: Collection[str] | None = None) -> tuple[str, str | None]:
    """``"hh" -> ("hh", None)``, ``"goqa_3" -> ("goqa", "3")``, ``"oqa_SEX_Male" -> ("oqa", "SEX_Male")``.

    What follows the name is an index for goqa, goqma and oqa; for the others a free label, so that one source can be
    used twice with its own settings: ``datasets=[local_a,local_b]`` with ``data.local_a.path=``, ``data.local_b.path=``.
    """
    known = dataset_names() if known is None else known
    if name in known:
        return name, None
    # the longest name first, so that a data set "local_news" is not read as "local" labelled "news"
    for base in sorted(known, key=len, reverse=True):
        if name.startswith(base + "_") and len(name) > len(base) + 1:
            return base, name[len(base) + 1 :]
    raise UserError(
        f"datasets=[{name}]: no such data set{did_you_mean(name, known)}; there are {', '.join(sorted(known))}"
    )


def dataset_module(source: str) -> ModuleType:
    """The module data/<source>.py, which has ``Settings`` and ``load(name, settings, seed)``."""
    module = None
    if source.isidentifier():
        try:
            module = importlib.import_module(f"data.{source}")
        except ModuleNotFoundError as error:
            if error.name != f"data.{source}":
                raise
    if module is None or not (hasattr(module, "Settings") and hasattr(module, "load")):
        names = dataset_names()
        raise UserError(
            f"source={source}: no module data/{source}.py with Settings and load{did_you_mean(source, names)}"
        )
    return module
