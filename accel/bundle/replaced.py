"""Reading a bundle that somebody may be replacing meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..assets import resolve
from ..errors import UserError
from .manifest import Bundle

_T = TypeVar("_T")


def steadily(path: str | Path, work: Callable[[Bundle], _T]) -> _T:
    """Open a bundle and do something with its files; again from the start, where it was replaced meanwhile.

    So whoever reads during an overwrite gets the old one or the new one, and never the manifest of one and the weights
    of the other.

    Raises:
        UserError: as `Bundle.open` and the work.
    """

    def mark() -> tuple[int, ...] | None:
        """Which folder lies there now; an inode alone may be used again."""
        try:
            found = Path(resolve(path)).stat()
            return found.st_dev, found.st_ino, found.st_ctime_ns
        except OSError:
            return None

    for _ in range(5):
        before = mark()
        try:
            made = work(Bundle.open(path))
            if mark() == before:
                return made
        except UserError:
            if mark() == before:
                raise
    raise UserError(f"{path} is being replaced again and again", "wait for whoever writes it")
