"""Folders in the cache with what was made of a bundle: each is whole or not there, and the longest unused go first."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError
from ..files import new_folder, read_json, write_json

_INDEX = "kept.json"


def found(place: Path) -> bool:
    """Whether a folder is kept, its files unchanged since; it counts as used now. A damaged one is deleted."""
    try:
        os.utime(place)  # it was used: others go first
        stamps = read_json(place / _INDEX, "the list of kept files")
        if all(_stamp(place / name) == stamp for name, stamp in stamps.items()):
            return True
    except (OSError, UserError, AttributeError):
        pass
    shutil.rmtree(place, ignore_errors=True)
    return False


def keep(place: Path, size: int, most: int, write: Callable[[Path], object]) -> None:
    """Keep what `write` puts into a folder, where there is room; a cache that cannot be written costs making it again.

    Args:
        place: of the folder; its neighbours are of the same kind.
        size: bytes that it will have, about.
        most: bytes of the folder and its neighbours together.
        write: is given the folder to fill; an OSError of it, or of ours, leaves nothing behind and is not raised.
    """
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not has_room(place.parent, size, most, _folders(place.parent)):
            return
        with new_folder(place) as folder:
            write(folder)
            write_json(folder / _INDEX, {file.name: _stamp(file) for file in folder.iterdir()})
    except (OSError, UserError):
        pass


def _stamp(file: Path) -> list[int]:
    """Size and modification time: digests of gigabytes would take as long as what is kept saves."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def has_room(disk: Path, size: int, most: int, others: Sequence[Path]) -> bool:
    """Whether `size` more bytes may be kept; for them the longest unused of the others go.

    Args:
        disk: a folder on the disk that will have them.
        most: bytes that all may have together.
        others: folders of the same kind.
    """
    if size > most or shutil.disk_usage(disk).free < 2 * size:
        return False
    sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in others}
    for path in sorted(others, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) <= most - size:
            break
        shutil.rmtree(path, ignore_errors=True)
        sizes.pop(path)
    return True


def _folders(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".")]
