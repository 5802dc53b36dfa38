"""Files of a cache in the making: each has a note beside it, with its digest, that says it is whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

from accel.errors import Notice, UserError
from accel.files import parse_json, read_bytes, write_bytes

from .cache import intact

_MOST_BYTES = 64 << 20


def note_of(folder: Path, name: str) -> Path:
    """Where the note of a file lies."""
    return folder / f"{name}.json"


def read_note(folder: Path, name: str) -> dict[str, Any] | None:
    """The note of a file; None where there is none, or a part of one."""
    try:
        note = parse_json(read_bytes(note_of(folder, name), "a part of the cache", _MOST_BYTES))
    except (UserError, ValueError):
        return None
    whole = isinstance(note, dict) and isinstance(note.get("sha256"), str) and isinstance(note.get("bytes"), int)
    return note if whole else None


def entry_of(data: bytes) -> dict[str, Any]:
    """Digest and size of a file, as notes and the index of a cache have them."""
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def put(folder: Path, name: str, data: bytes, **more: Any) -> None:
    """Write a file, then the note that says it is whole, with what else it is to remember."""
    write_bytes(folder / name, data)
    write_bytes(note_of(folder, name), json.dumps(entry_of(data) | more).encode())


def _older(path: Path, note: Path, size: int) -> bool:
    """Whether a file has its size and was last changed before its note was written."""
    try:
        state = path.stat()
        return state.st_size == size and state.st_mtime_ns < note.stat().st_mtime_ns
    except OSError:
        return False


def is_kept(folder: Path, name: str) -> bool:
    """Whether a file is there as it was written. It is read through once, and again where it changed after its note.

    A damaged one loses its note, so that nobody counts on it.
    """
    path, note, entry = folder / name, note_of(folder, name), read_note(folder, name)
    if entry and _older(path, note, entry["bytes"]):
        return True
    if entry and intact(path, entry):
        with contextlib.suppress(OSError):  # of somebody else's folder; it is read through the next time again
            os.utime(note)
        return True
    if entry or note.exists():
        what = "is damaged" if path.exists() else "is missing"
        warnings.warn(Notice(f"{path} {what}; it is made again"), stacklevel=4)
        note.unlink(missing_ok=True)
    return False
