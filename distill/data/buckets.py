"""Aspect-ratio buckets: frames of about one area, and the one that each image is cut for.

As SDXL was trained (Podell et al. 2023, arXiv 2307.01952, section 2.3): sides are multiples of a step, and the area is
about that of the square. At 1024 px in steps of 64 these are the upright sizes of the paper's table (appendix I), and
the same turned by a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from accel.errors import UserError

WIDEST = 2  # times the square's side, and half of it at least: the aspect ratio reaches 4
LEAST_AREA = 0.9  # of the square's, which is the largest


@dataclass(frozen=True, eq=False)
class Buckets:
    """The bucket of every row.

    Attributes:
        shapes: (width, height) of each bucket in pixels.
        of_row: number of its bucket, int16 [rows]; -1 where the size of the image could not be read.
    """

    shapes: tuple[tuple[int, int], ...]
    of_row: np.ndarray

    def shape(self, row: int) -> tuple[int, int]:
        return self.shapes[self.of_row[row]]

    def counts(self) -> dict[tuple[int, int], int]:
        """Rows by shape."""
        return {shape: int((self.of_row == number).sum()) for number, shape in enumerate(self.shapes)}


def shapes_of(resolution: int, step: int) -> tuple[tuple[int, int], ...]:
    """The frames of a resolution, (width, height), from the highest to the widest.

    Raises:
        UserError: for a step that does not divide the resolution.
    """
    if step > resolution or resolution % step:
        raise UserError(f"buckets of steps of {step} px do not hold {resolution} px", "--bucket-step 64, or 32")
    area = resolution**2
    lengths = [side for side in range(step, WIDEST * resolution + 1, step) if side * WIDEST >= resolution]
    found = [(w, h) for w in lengths for h in lengths if LEAST_AREA * area < w * h <= area]
    return tuple(sorted(found, key=lambda shape: (shape[0] / shape[1], shape)))


def assign(sizes: np.ndarray, resolution: int, step: int, least: int) -> Buckets:
    """The bucket of every image: the one whose aspect ratio is nearest, on a logarithmic scale.

    A bucket of fewer than `least` images is given up and its images go to the nearest one that stays, for a step takes
    all of its images from one bucket. Where no bucket has as many, the fullest one takes all.

    Args:
        sizes: (width, height) of each image, float [rows, 2]; NaN where it could not be read.
    """
    shapes = shapes_of(resolution, step)
    known = np.flatnonzero(np.isfinite(sizes).all(1))
    aspects = np.log(sizes[known, 0] / sizes[known, 1])
    counts = np.bincount(_nearest(aspects, shapes), minlength=len(shapes))
    if not known.size:
        raise UserError("the size of no image can be read, so there are no buckets", "check the data, or --no-buckets")
    kept = [number for number, count in enumerate(counts) if count >= least] or [int(counts.argmax())]
    shapes = tuple(shapes[number] for number in kept)
    of_row = np.full(len(sizes), -1, np.int16)
    of_row[known] = _nearest(aspects, shapes)
    return Buckets(shapes, of_row)


def _nearest(aspects: np.ndarray, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    there = np.log([width / height for width, height in shapes])
    return np.abs(aspects[:, None] - there[None]).argmin(1)
