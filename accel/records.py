"""Frozen dataclasses from JSON objects, checked against their annotations.

An error names what was read, the path within it, and the value:
"manifest: components.unet.dims.batch.min: expected an integer, got 'x'".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", list: "a list", tuple: "a list"}
_NAMES[type(None)] = "null"
_hints = cache(get_type_hints)


def read(kind: Any, data: Any, *path: str) -> Any:
    """A value as `json.loads` gives it, as an instance of an annotation.

    Args:
        kind: a dataclass, whose fields may be missing where they have a default; a dict {key: kind} of the keys that an
            object must have; `str`, `int`, `float`, `bool`, `list`, `dict`, `Any`; or of these `X | Y`,
            `tuple[X, ...]`, `list[X]` and `Mapping[str, X]`. Keys that `kind` does not name are ignored.
        data: the value.
        path: what is read, then the keys that lead to the value within it.

    Raises:
        ValueError: for the first value that is missing or of another type.
    """
    origin, args = dict if isinstance(kind, dict) else get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return read(next((choice for choice in args if _is(data, get_origin(choice) or choice)), args[0]), data, *path)
    if not _is(data, origin):
        raise ValueError(f"{_place(path)}: expected {_NAMES.get(origin, 'a JSON object')}, got {data!r:.40}")
    if origin in (tuple, list) and args:
        return origin(read(args[0], item, *path, str(number)) for number, item in enumerate(data))
    if origin is Mapping:
        return {key: read(args[1], item, *path, key) for key, item in data.items()}
    if not (is_dataclass(kind) or isinstance(kind, dict)):
        return data
    kinds = kind if isinstance(kind, dict) else _hints(kind)
    declared = fields(kind) if is_dataclass(kind) else ()
    optional = {f.name for f in declared if f.default is not MISSING or f.default_factory is not MISSING}
    if missing := [key for key in kinds if key not in data and key not in optional]:
        raise ValueError(f"{_place((*path, missing[0]))}: missing")
    values = {key: read(kinds[key], data[key], *path, key) for key in kinds if key in data}
    return kind(**values) if is_dataclass(kind) else values


def _is(data: Any, kind: Any) -> bool:
    """Whether a value is of this type in JSON, where `true` is not a number and 1 is one with or without a point."""
    if kind is Any or isinstance(data, bool):
        return kind in (Any, bool)
    wide = {float: (int, float), tuple: (list, tuple), list: (list, tuple)}
    return isinstance(data, wide.get(kind, kind if kind in _NAMES else dict))


def _place(path: tuple[str, ...]) -> str:
    return ": ".join(part for part in (path[0], ".".join(path[1:])) if part)
