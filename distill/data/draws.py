"""Random tensors of a batch, drawn ahead by the processes that load it.

A turn of training lists what its loss reads (`OptimizerPhase.draws`); the loader adds it to each example, so that it
comes with the batch, pinned for a GPU. What is not listed is drawn where it is read. The numbers are those of `rng`
either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from . import rng
from .encoders import sent


@dataclass(frozen=True)
class Draw:
    """One random tensor of each example.

    Attributes:
        stream, draw: as `rng` counts them.
        low, high: a whole number low <= n < high, int64 [b], where `high` is given; else standard normal float32.
        dims: of the example's latents [c, h, w], how many leading ones a normal draw has.
    """

    stream: str
    draw: int = 0
    low: int = 0
    high: int = 0
    dims: int = 3

    @property
    def key(self) -> str:
        """Its name in a batch."""
        return f"drawn {self.stream} {self.draw}"

    def of(self, seed: int, indices: Sequence[int], latents: Sequence[int]) -> torch.Tensor:
        """The draw of some examples [b, ...], whose latents have the shape `latents`."""
        if self.high:
            return rng.integers(seed, indices, self.stream, self.low, self.high, self.draw)
        return rng.normal(seed, indices, self.stream, tuple(latents[: self.dims]), self.draw)


def take(batch: Mapping[str, Any], seed: int, draw: Draw) -> torch.Tensor:
    """A draw of a batch on the device of its latents: what came with the batch, or else drawn now."""
    if draw.key in batch:
        return batch[draw.key]
    mean = batch["latent_mean"]
    return sent(draw.of(seed, batch["index"], mean.shape[1:]), mean.device)


class Turn(Protocol):
    """What is asked of `training.method.OptimizerPhase` here."""

    draws: tuple[Draw, ...]

    def due(self, step: int) -> bool: ...


@dataclass(frozen=True)
class Ahead:
    """What a loader draws.

    Attributes:
        turns: of a training step; those that are due at a step say what is drawn for its examples.
        seed: of the run.
        channels, factor: of the latents that an image becomes.
    """

    turns: tuple[Turn, ...]
    seed: int
    channels: int
    factor: int

    def of(self, example: Mapping[str, Any], step: int) -> dict[str, torch.Tensor]:
        """The draws of an example of a training step, without a batch dimension."""
        wanted: Iterable[Draw] = dict.fromkeys(draw for turn in self.turns if turn.due(step) for draw in turn.draws)
        if "latent_mean" in example:
            shape = tuple(example["latent_mean"].shape)
        else:
            shape = (self.channels, *(side // self.factor for side in example["pixels"].shape[1:]))
        return {draw.key: draw.of(self.seed, [example["index"]], shape)[0] for draw in wanted}
