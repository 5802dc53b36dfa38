"""Random numbers of training, as pure functions of (seed, index of the example).

`index` counts the examples of a run from its first step on, over all processes: example i of the run is the same
image with the same noise in any number of processes and micro-batches, and after any restart. So a resumed run
needs no random state to go on exactly, and two processes see together what one sees with the joint batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

# One stream per use, so that a new use never shifts the numbers of another. Add at the end only.
STREAMS = (
    "order",
    "placement",
    "caption",
    "dropout",
    "posterior",
    "timestep",
    "noise",
    "offset",
    "perturbation",
    "instance",
    "renoise",
    "steps",
    "matching",
    "critic",
    "fake",
    "real",
    "mask",
    "masked",
    "guidance",
    "scale",
)


def generator(seed: int, index: int, stream: str, draw: int = 0) -> np.random.Generator:
    """Random numbers of one example for one use (a member of STREAMS); `draw` counts where a use needs several."""
    key = (seed, index, STREAMS.index(stream), *([draw] if draw else []))
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def row(index: int, count: int, seed: int) -> tuple[int, int]:
    """(row, epoch) of an example in a data set of `count` rows; every epoch is a shuffle of its own."""
    epoch, place = divmod(index, count)
    return int(_shuffle(count, seed, epoch)[place]), epoch


@lru_cache(maxsize=2)
def _shuffle(count: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, epoch, "order").permutation(count)


def normal(seed: int, indices: Sequence[int], stream: str, shape: tuple[int, ...], draw: int = 0) -> torch.Tensor:
    """Standard normal float32 [len(indices), *shape]."""
    rows = [generator(seed, int(index), stream, draw).standard_normal(shape, dtype=np.float32) for index in indices]
    return torch.from_numpy(np.stack(rows))


def integers(
    seed: int, indices: Sequence[int], stream: str, low: int, high: int | Sequence[int], draw: int = 0
) -> torch.Tensor:
    """Whole numbers low <= n < high, int64 [len(indices)]; `high` may be one for each."""
    ends = [high] * len(indices) if isinstance(high, int) else high
    rows = zip(indices, ends, strict=True)
    return torch.tensor([int(generator(seed, int(index), stream, draw).integers(low, end)) for index, end in rows])


def uniform(seed: int, indices: Sequence[int], stream: str, low: float, high: float, draw: int = 0) -> torch.Tensor:
    """Numbers low <= x < high, float64 [len(indices)]."""
    return torch.tensor([generator(seed, int(index), stream, draw).uniform(low, high) for index in indices]).double()


def micro_batch(step: int, micro: int, *, batch: int, accumulation: int, rank: int, world: int) -> range:
    """Indices of the examples of one micro-batch of one process. Batches of all processes together are consecutive."""
    first = ((step * accumulation + micro) * world + rank) * batch
    return range(first, first + batch)
