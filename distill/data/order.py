"""Which row example i of a run shows: one data set in a shuffle of every epoch, several by weight, buckets in groups.

Streams of rows are merged by `turn`, which knows of any item of the merged stream where it comes from, without the
items before it. So the number of an example decides its row, and a run resumes anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np

from accel.errors import UserError

from . import rng
from .buckets import Buckets

# Examples of the validation loss are counted from here on, so that none shares its noise with one of training.
HELD_OUT = 1 << 60

Rows = Sequence[int]

_BLOCK = 1024
_HELD_OUT_DRAW, _BUCKET_DRAW, _PART_DRAW, _CELL_DRAW = 1, 2, 3, 1 << 16


@dataclass(frozen=True)
class Order:
    """The row of every example.

    Attributes:
        seed: of the run.
        cells: rows by bucket and data set; without buckets there is one bucket.
        weights: how often each cell is drawn from, in proportion.
        group: examples in a row that are of one bucket, which is what all processes take for a step.
        held_out: rows of the validation loss by bucket, which training never shows.
    """

    seed: int
    cells: tuple[tuple[Rows, ...], ...]
    weights: tuple[tuple[int, ...], ...]
    group: int = 1
    held_out: tuple[Rows, ...] = field(default=())

    @property
    def count(self) -> int:
        """Rows that training shows."""
        return sum(len(rows) for bucket in self.cells for rows in bucket)

    def __call__(self, index: int) -> tuple[Rows, int, int]:
        """(rows of its cell, place among them, epoch of the cell) of an example."""
        if index >= HELD_OUT:
            return self._held_out(index - HELD_OUT)
        bucket, place = 0, index
        if len(self.cells) > 1:
            group, within = divmod(index, self.group)
            bucket, group = _shuffled_turn(group, tuple(map(sum, self.weights)), self.seed, _BUCKET_DRAW)
            place = group * self.group + within
        cells, part = self.cells[bucket], 0
        if len(cells) > 1:
            part, place = _shuffled_turn(place, self.weights[bucket], self.seed, _PART_DRAW + bucket)
        rows = cells[part]
        if len(self.cells) == len(cells) == 1:
            place, epoch = rng.row(place, len(rows), self.seed)
            return rows, place, epoch
        epoch, place = divmod(place, len(rows))
        return rows, int(_shuffle(len(rows), self.seed, epoch, _CELL_DRAW + bucket * len(cells) + part)[place]), epoch

    def _held_out(self, place: int) -> tuple[Rows, int, int]:
        for rows in self.held_out:
            if place < len(rows):
                return rows, place, 0
            place -= len(rows)
        raise IndexError("no such example is held out")

    def held_out_batches(self, batch: int) -> list[range]:
        """Indices of the examples held out, in batches of one bucket."""
        made, first = [], HELD_OUT
        for rows in self.held_out:
            last = first + len(rows)
            made += [range(start, min(start + batch, last)) for start in range(first, last, batch)]
            first = last
        return made


def turn(number: int, weights: Sequence[int]) -> tuple[int, int]:
    """Of several streams merged by weight: which one item `number` is from, and its number in that one.

    The first n items hold n * weight / sum(weights) of each stream, give or take one for each stream before it.
    """
    rest = sum(weights)
    for which, weight in enumerate(weights):
        before = number * weight // rest
        if (number + 1) * weight // rest > before:
            return which, before
        number, rest = number - before, rest - weight
    raise ValueError(f"no weight above 0 in {weights}")


def _shuffled_turn(number: int, weights: tuple[int, ...], seed: int, draw: int) -> tuple[int, int]:
    """As `turn`, with the turns of every block shuffled: in equal distances they would fall in step with the phases of
    a method. The items of each stream stay in their order."""
    block, place = divmod(number, _BLOCK)
    return _turns(block, weights, seed, draw)[place]


@lru_cache(maxsize=128)
def _turns(block: int, weights: tuple[int, ...], seed: int, draw: int) -> list[tuple[int, int]]:
    even = [turn(block * _BLOCK + place, weights) for place in range(_BLOCK)]
    following = {which: own for which, own in reversed(even)}
    made = []
    for place in rng.generator(seed, block, "order", draw).permutation(_BLOCK):
        which, _ = even[place]
        made.append((which, following[which]))
        following[which] += 1
    return made


@lru_cache(maxsize=256)
def _shuffle(count: int, seed: int, number: int, draw: int) -> np.ndarray:
    return rng.generator(seed, number, "order", draw).permutation(count).astype(np.int32)


def order_of(
    counts: Sequence[int],
    seed: int,
    *,
    shares: Sequence[Fraction] = (Fraction(1),),
    buckets: Buckets | None = None,
    group: int = 1,
    held_out: int = 0,
) -> Order:
    """The order of data sets of so many rows, which lie one after the other.

    Args:
        counts: rows of each data set.
        shares: of the examples, of each data set.
        buckets: of all rows; those without one are left out.
        group: examples of a step, all processes together.
        held_out: rows kept from training.

    Raises:
        UserError: when no row is left to train on.
    """
    total = sum(counts)
    away = np.zeros(total, bool)
    usable = np.arange(total) if buckets is None else np.flatnonzero(buckets.of_row >= 0)
    if held_out >= len(usable):
        raise UserError(
            f"{held_out} of {len(usable)} usable images held out leave none to train on",
            "a smaller --validation, or more data",
        )
    if held_out:
        chosen = rng.generator(seed, 0, "order", _HELD_OUT_DRAW).permutation(len(usable))[:held_out]
        away[usable[chosen]] = True
    elif len(counts) == 1 and buckets is None:
        return Order(seed, ((range(total),),), ((1,),))
    part_of = np.repeat(np.arange(len(counts)), counts)
    bucket_of = np.zeros(total, int) if buckets is None else buckets.of_row
    cells, shared, kept_out = [], [], []
    for bucket in range(1 if buckets is None else len(buckets.shapes)):
        rows = [np.flatnonzero((bucket_of == bucket) & (part_of == part) & ~away) for part in range(len(counts))]
        cells.append(tuple(rows))
        trained = [int(((part_of == part) & ~away & (bucket_of >= 0)).sum()) for part in range(len(counts))]
        shared.append(
            [share * len(own) / of if of else Fraction(0) for share, own, of in zip(shares, rows, trained, strict=True)]
        )
        kept_out.append(np.flatnonzero((bucket_of == bucket) & away))
    whole = lcm(*(share.denominator for bucket in shared for share in bucket))
    weights = tuple(tuple(int(share * whole) for share in bucket) for bucket in shared)
    return Order(seed, tuple(cells), weights, group, tuple(kept_out) if held_out else ())
