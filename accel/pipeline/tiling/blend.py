"""Overlapping tiles of an image, computed one by one and blended where they overlap, in float32 numpy.

A tile ends at the edge of the image, so that the last ones are smaller. `zoom` is how many pixels of the result one
pixel along a side becomes: 8 in a decoder, 1/8 in an encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np

Run = Callable[[Any], np.ndarray]


def spans(length: int, size: int, step: int) -> list[slice]:
    """Where the tiles lie along a side."""
    return [slice(start, min(start + size, length)) for start in range(0, length, step)]


def ramped(x: np.ndarray, run: Run, *, size: int, step: int, zoom: Fraction) -> np.ndarray:
    """The tiles, each faded in over the one above it and then over the one to its left, as AutoencoderKL does it.

    Args:
        x: [N, C, h, w].
        run: tile [N, C, a, b] -> its result [N, D, a * zoom, b * zoom].
        size: side of a tile.
        step: from one tile to the next; they overlap by `size - step`.

    Returns:
        Float32 [N, D, h * zoom, w * zoom].
    """
    overlap, keep = int((size - step) * zoom), int(step * zoom)
    above: list[np.ndarray] = []  # the lowest lines of the row of tiles before, as they were blended
    rows = []
    for down in spans(x.shape[2], size, step):
        row, below = [], []
        left = None
        for i, across in enumerate(spans(x.shape[3], size, step)):
            tile = np.array(run(np.ascontiguousarray(x[:, :, down, across])), np.float32)
            if above:
                _fade(above[i], tile, axis=2)
            if left is not None:
                _fade(left, tile, axis=3)
            left = tile[..., -overlap:].copy()
            below.append(tile[:, :, -overlap:].copy())
            row.append(tile[:, :, :keep, :keep].copy())
        above = below
        rows.append(np.concatenate(row, axis=3))
    return np.concatenate(rows, axis=2)


def _fade(before: np.ndarray, tile: np.ndarray, axis: int) -> None:
    """Let the end of one tile go over into the beginning of the next, in place."""
    extent = min(before.shape[axis], tile.shape[axis])
    share = (np.arange(extent) / extent).reshape([-1, 1] if axis == 2 else [-1])
    end, start = _ends(before, tile, extent, axis)
    start[:] = end * (1 - share).astype(np.float32) + start * share.astype(np.float32)


def _ends(before: np.ndarray, tile: np.ndarray, extent: int, axis: int) -> Iterator[np.ndarray]:
    if axis == 2:
        return iter((before[:, :, -extent:], tile[:, :, :extent]))
    return iter((before[..., -extent:], tile[..., :extent]))


def masked(x: np.ndarray, run: Run, *, size: int, step: int, zoom: Fraction) -> np.ndarray:
    """The tiles, each laid over those before it by a mask that rises from 0 to 1 along two sides: AutoencoderTiny's.

    Args, returns: as `ramped`.
    """
    overlap, side = int((size - step) * zoom), int(size * zoom)
    rising = np.clip(np.arange(side, dtype=np.float32) / np.float32(overlap - 1), 0, 1)
    level = np.ones_like(rising)
    made: np.ndarray | None = None
    for down in spans(x.shape[2], size, step):
        for across in spans(x.shape[3], size, step):
            tile = np.asarray(run(np.ascontiguousarray(x[:, :, down, across])), np.float32)
            if made is None:
                made = np.zeros((*tile.shape[:2], *(int(length * zoom) for length in x.shape[2:])), np.float32)
            high, wide = tile.shape[2:]
            top, left = int(down.start * zoom), int(across.start * zoom)
            place = made[:, :, top : top + high, left : left + wide]
            mask = (rising if top else level)[:high, None] * (rising if left else level)[:wide]
            place[:] = mask * tile + (1 - mask) * place
    assert made is not None
    return made
