"""Noise that is the same on every engine and every machine: a pure function of seed and draw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def normal(seeds: Sequence[int], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise [len(seeds), *shape].

    Every image has a stream of its own, so an image does not change with the batch it is made in.

    Args:
        seeds: one per image.
        draw: 0 for the initial latents, i + 1 for the noise added after step i.
        shape: shape of one image's latents.
    """

    def one(seed: int) -> np.ndarray:
        bits = np.random.Philox(np.random.SeedSequence((seed, draw)))
        return np.random.Generator(bits).standard_normal(shape, dtype=np.float32)

    return np.stack([one(seed) for seed in seeds])
