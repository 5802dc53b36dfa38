"""Noise that any program can draw again: Philox4x32-10 (Salmon et al., SC 2011) and Box-Muller, number by number.

The number at `element` of a draw is a function of (seed, draw, element) alone, without a stream or a rejection: nodes
of a graph, a shader and a loop in any language give it. It is A1111's "NV" noise, and thereby the first draw of torch's
generator of that seed on a CUDA device, as long as the array has fewer numbers than the device has threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
BUMPS = (0x9E3779B9, 0xBB67AE85)  # of the key, each round
_LOW = np.uint64(0xFFFFFFFF)


def words(counter: np.ndarray, key: Sequence[int]) -> np.ndarray:
    """Philox4x32-10: words uint32 [4, ...] of a counter uint32 [4, ...] and a key of two words."""
    c = [np.asarray(word, np.uint64) for word in counter]
    for i in range(ROUNDS):
        first, second = (np.uint64(m) * word for m, word in zip(MULTIPLIERS, (c[0], c[2]), strict=True))
        k = [np.uint64((own + i * bump) % 2**32) for own, bump in zip(key, BUMPS, strict=True)]
        c = [second >> np.uint64(32) ^ c[1] ^ k[0], second & _LOW, first >> np.uint64(32) ^ c[3] ^ k[1], first & _LOW]
    return np.stack(c).astype(np.uint32)


def normal(seeds: Sequence[int], draw: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise [len(seeds), *shape].

    Args:
        seeds: one per image, from 0 to 2**64 - 1.
        draw: 0 for the initial latents, i + 1 for the noise added after step i.
        shape: shape of one image's latents.
    """
    counter = np.zeros((4, int(np.prod(shape))), np.uint32)
    counter[0], counter[2] = draw, np.arange(counter.shape[1])

    def one(seed: int) -> np.ndarray:
        first, second = words(counter, (seed % 2**32, seed >> 32))[:2].astype(np.float32)
        unit = first * np.float32(2.0**-32) + np.float32(2.0**-33)
        angle = second * np.float32(np.pi * 2.0**-31) + np.float32(np.pi * 2.0**-32)
        return (np.sqrt(np.float32(-2) * np.log(unit)) * np.sin(angle)).reshape(shape)

    return np.stack([one(seed) for seed in seeds])
