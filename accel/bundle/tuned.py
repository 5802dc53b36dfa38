"""What `accel tune` found fastest on this machine for the networks of a bundle: a record in the user's cache.

A record counts for the bundle that was measured, by its digest, on the processor that it was measured on, with the
versions of the libraries that ran it. Anything else is as if there were none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import cache_dir, inside, read_json, write_json
from ..machine import machine_name, version_of
from .manifest import Bundle

_SCHEMA = "accel-tuned/1"
_LIBRARIES = ("torch", "onnxruntime", "openvino")
# Options that a record may hold: the cache is the user's own, but what it says is not worth more than that.
_OPTIONS = {"threads": int, "folds": bool, "dtype": str}


@dataclass(frozen=True)
class Choice:
    """The fastest way of running a network.

    Attributes:
        engine: a name out of `accel.engines.ENGINES`.
        options: of that engine; those that are missing are its defaults.
        seconds: median of a call.
    """

    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def file_of(bundle: Bundle) -> Path:
    """Where the record of a bundle is."""
    return inside(cache_dir(), f"tuned/{bundle.digest[:32]}.json", "the cache folder")


def write(bundle: Bundle, choices: Mapping[str, Choice], measured: Mapping[str, Any]) -> Path:
    """Keep what was found.

    Args:
        choices: component -> the fastest.
        measured: all that was measured, for people.
    """
    chosen = {name: asdict(choice) for name, choice in choices.items()}
    write_json(file_of(bundle), {**_here(), "choices": chosen, "measured": dict(measured)})
    return file_of(bundle)


def read(bundle: Bundle) -> dict[str, Choice]:
    """Component -> choice; empty where nothing was measured for this bundle, machine and libraries."""
    try:
        file = file_of(bundle)
        record = read_json(file, "the record") if file.is_file() else {}
        if not isinstance(record, dict) or {key: record.get(key) for key in _here()} != _here():
            return {}
        found = {name: Choice(**entry) for name, entry in record["choices"].items()}
    except (UserError, TypeError, KeyError, AttributeError, OSError):
        return {}
    return {name: choice for name, choice in found.items() if _sound(choice)}


def forget(bundle: Bundle) -> bool:
    """Remove the record; returns whether there was one."""
    with contextlib.suppress(FileNotFoundError):
        file_of(bundle).unlink()
        return True
    return False


def _here() -> dict[str, Any]:
    return {"schema": _SCHEMA, "machine": machine_name(), "versions": {name: version_of(name) for name in _LIBRARIES}}


def _sound(choice: Choice) -> bool:
    """Whether it says what a record may say: types too, because a boolean is an integer."""
    return isinstance(choice.engine, str) and all(
        type(value) is _OPTIONS.get(option) for option, value in choice.options.items()
    )
