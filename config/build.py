"""Plain values -> frozen dataclasses, with messages that name the key as the user types it."""

from __future__ import annotations

import dataclasses
import importlib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

from utils import UserError, did_you_mean

MISSING = "???"  # OmegaConf's mark for a value the user has to give


def build(cls: type, values: Mapping[str, Any], prefix: str, beside: Iterable[str] = ()) -> Any:
    """An instance of the dataclass ``cls`` from ``values``. ``beside``: keys that are not its fields and may be meant.

    Raises UserError for an unknown key ("did you mean"), a missing one, or a value of the wrong type; all of them
    in one message.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    known = [*fields, *beside]
    arguments: dict[str, Any] = {}
    problems = [
        f"unknown key {prefix}{key}{did_you_mean(str(key), known)}; {_listing(prefix, known)}"
        for key in values
        if key not in fields
    ]
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in values or values[name] == MISSING:
            if required or name in values:
                problems.append(f"{prefix}{name} is required and has no default: give {prefix}{name}=VALUE")
            continue
        try:
            arguments[name] = convert(hints[name], values[name], prefix + name)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return cls(**arguments)


def _listing(prefix: str, names: Iterable[str]) -> str:
    where = prefix.rstrip(".") or "the top level"
    return f"keys of {where}: {', '.join(names) or 'none'}"


def convert(hint: Any, value: Any, key: str) -> Any:
    """``value`` as the annotated type. An int is a good float; a bool is no number; a list of two is no tuple of three."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, key)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        options = ", ".join(str(a) for a in args)
        raise UserError(
            f"{key}={value}: must be one of {options}{did_you_mean(str(value), [str(a) for a in args])}"
        )
    if dataclasses.is_dataclass(hint):
        return build(hint, convert(dict, value, key), key + ".")
    if hint in (list, tuple) or origin in (list, tuple):
        return _convert_sequence(origin or hint, args, value, key)
    if hint is dict or origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{key}={value}: must be a mapping, e.g. {key}={{a: 1}}")
        item = args[1] if args else Any
        return {str(k): convert(item, v, f"{key}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, key)


def _convert_union(args: tuple, value: Any, key: str) -> Any:
    if value is None:
        if type(None) in args:
            return None
        raise UserError(f"{key}=null: a value is needed")
    errors = []
    for option in (a for a in args if a is not type(None)):
        try:
            return convert(option, value, key)
        except UserError as error:
            errors.append(str(error))
    raise UserError(" or ".join(errors))


def _convert_sequence(origin: type, args: tuple, value: Any, key: str) -> Any:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{key}={value}: must be a list, e.g. {key}=[{value}]")
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            raise UserError(f"{key}={list(value)}: must have {len(args)} entries")
        return tuple(convert(a, v, f"{key}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))
    item = args[0] if args else Any
    return origin(convert(item, v, f"{key}[{i}]") for i, v in enumerate(value))


def _convert_scalar(hint: type, value: Any, key: str) -> Any:
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            pass
    if type(value) is hint:
        return value
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)  # exp_name=3
    kind = {int: "an integer", float: "a number", bool: "true or false", str: "text"}.get(hint, hint.__name__)
    raise UserError(f"{key}={value}: must be {kind}, not {type(value).__name__}")


def load_class(path: str, packages: tuple[str, ...], key: str) -> type:
    """The dataclass at ``path``, which must lie in one of ``packages``: a config file cannot name arbitrary code."""
    module_name, _, name = convert(str, path, key).rpartition(".")
    if not any(module_name == p or module_name.startswith(p + ".") for p in packages):
        raise UserError(f"{key}={path}: must be a class of {' or '.join(packages)}")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}={path}: cannot be imported ({error})") from error
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"{key}={path}: is not a dataclass")
    return found
