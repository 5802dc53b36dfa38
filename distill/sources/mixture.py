"""Several data sets as one, and some rows of one: what `--data "photos=3 | art=1"` and its filters make."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np

from accel.errors import UserError

from .item import ImageSource, Item


def parts_of(spec: str) -> list[tuple[str, Fraction]]:
    """The data sets that `--data` names with their shares, which add up to 1: one, or several separated by `|`.

    Of several each may have a weight, 1 where it has none: `photos=3 | art` draws three of four examples from photos.

    Raises:
        UserError: for an empty name, or a weight that is not a number above 0.
    """
    if "|" not in spec:
        return [(spec, Fraction(1))]
    found = []
    for part in spec.split("|"):
        name, equals, weight = part.strip().rpartition("=")
        name, weight = (name.strip(), weight.strip()) if equals else (weight, "1")
        try:
            share = Fraction(weight)
        except (ValueError, ZeroDivisionError):
            share = Fraction(0)
        if not name or share <= 0:
            what = f"{weight!r} is no weight above 0" if name else "a name is missing"
            raise UserError(
                f"--data {spec!r}: {what}", '--data "photos=3 | art=1", for three of four images from photos'
            )
        found.append((name, share))
    whole = sum(share for _, share in found)
    return [(name, share / whole) for name, share in found]


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of a source, in their order (an `ImageSource`)."""

    source: ImageSource
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Item:
        return self.source[int(self.rows[row])]

    def captions(self, row: int) -> tuple[str, ...]:
        return self.source.captions(int(self.rows[row]))

    def size(self, row: int) -> tuple[int, int]:
        return self.source.size(int(self.rows[row]))

    def value(self, row: int, column: str) -> Any:
        return self.source.value(int(self.rows[row]), column)

    @cached_property
    def identity(self) -> str:
        rows = np.ascontiguousarray(self.rows, np.int64)
        return hashlib.sha256(f"subset:{self.source.identity}\n".encode() + rows.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Joined:
    """The rows of several sources, one source after the other (an `ImageSource`)."""

    sources: Sequence[ImageSource]

    @cached_property
    def ends(self) -> list[int]:
        """The row after the last one of each source."""
        return list(accumulate(map(len, self.sources)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> Item:
        source, own = self._place(row)
        return source[own]

    def captions(self, row: int) -> tuple[str, ...]:
        source, own = self._place(row)
        return source.captions(own)

    def size(self, row: int) -> tuple[int, int]:
        source, own = self._place(row)
        return source.size(own)

    def value(self, row: int, column: str) -> Any:
        source, own = self._place(row)
        return source.value(own, column)

    def _place(self, row: int) -> tuple[ImageSource, int]:
        which = int(np.searchsorted(self.ends, row, "right"))
        return self.sources[which], row - (self.ends[which - 1] if which else 0)

    @cached_property
    def identity(self) -> str:
        return hashlib.sha256("\n".join(["joined", *(one.identity for one in self.sources)]).encode()).hexdigest()
