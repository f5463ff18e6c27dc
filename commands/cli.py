"""What the commands share: `python -m commands.NAME key=value ...`, where NAME.key=value are the command's own settings and
everything else describes a run as for train.py."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from config.build import build
from config.compose import Run, compose
from utils import UserError, content_hash, make_folder, setup_logging, write_atomic


def entry(
    name: str, settings: type, work: Callable[[Run, Any], None], *, defaults: tuple[str, ...] = ()
) -> None:
    """Parse ``sys.argv``, run ``work(run, settings)``; user errors are one message and exit code 2.

    defaults  overrides put before the user's own
    """
    setup_logging()
    try:
        own, rest = split(sys.argv[1:], name)
        if any(word in ("-h", "--help") for word in rest):
            print(usage(name, settings, work))
            return
        options = build(settings, own, f"{name}.")
        work(compose([*defaults, *rest]), options)
    except UserError as error:
        for line in str(error).replace("<command>.", f"{name}.").splitlines():
            print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2) from None


def split(argv: Iterable[str], name: str) -> tuple[dict[str, Any], list[str]]:
    """({key: value} of the words ``<name>.key=value``, the other words); ``<name>.part.key`` is {part: {key: value}}."""
    own: dict[str, Any] = {}
    rest: list[str] = []
    for word in argv:
        key, equals, value = word.lstrip("-").partition("=")
        if equals and key.startswith(f"{name}."):
            *parts, last = key.removeprefix(f"{name}.").split(".")
            inner = own
            for word_ in parts:
                inner = inner.setdefault(word_, {})
            try:
                inner[last] = yaml.safe_load(value) if value else None
            except yaml.YAMLError as error:
                raise UserError(f"{key}={value}: cannot be read ({error})") from error
        else:
            rest.append(word)
    return own, rest


def usage(name: str, settings: type, work: Callable) -> str:
    """The command's own keys with their defaults."""
    lines = [
        f"python -m commands.{name} {name}.key=value ... and any override of train.py",
        "",
        (work.__doc__ or "").strip(),
    ]
    for f in dataclasses.fields(settings):
        default = "required" if f.default is dataclasses.MISSING else _as_typed(f.default)
        lines.append(f"  {name}.{f.name}  ({default})")
    lines += ["", (settings.__doc__ or "").strip()]
    return "\n".join(lines)


def _as_typed(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, tuple) else "null" if value is None else str(value)


class Output:
    """A JSONL file that a killed command continues: rows are appended whole, and those already there are not made again.

    A file ``<path>.settings.json`` says what made it; other settings are refused.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, key: str = "uid") -> None:
        self.path, self.key = path, key
        make_folder(path.parent)
        beside = path.with_name(path.name + ".settings.json")
        mine = json.loads(json.dumps(settings))
        if beside.exists() and path.exists():
            theirs = json.loads(beside.read_text(encoding="utf-8"))
            if content_hash(theirs) != content_hash(mine):
                changed = sorted(k for k in {*theirs, *mine} if theirs.get(k) != mine.get(k))
                raise UserError(
                    f"{path}: was made with other settings ({', '.join(f'{k}: {theirs.get(k)} -> {mine.get(k)}' for k in changed)}); "
                    "name another output, or delete it"
                )
        else:
            path.unlink(missing_ok=True)
            write_atomic(beside, json.dumps(mine, indent=1) + "\n")
        self.done = self._read()

    def _read(self) -> set[str]:
        if not self.path.exists():
            return set()
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # a torn last line of a killed command
            os.truncate(self.path, len(whole))
        return {json.loads(line)[self.key] for line in whole.splitlines()}

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows, durable before it returns."""
        rows = list(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        self.done.update(row[self.key] for row in rows)
