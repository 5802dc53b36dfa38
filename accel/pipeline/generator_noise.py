"""Noise from torch generators, drawn in diffusers' order, so that a generator gives the same image in both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from ..errors import UserError


class GeneratorNoise:
    """First the initial latents, then the noise of one stochastic step after another.

    Args:
        generator: one `torch.Generator` for all images, or one for each.
        images: number of images.
        shape: of one image's latents, (C, h, w).
    """

    def __init__(self, generator: Any, images: int, shape: Sequence[int]):
        self.generators = list(generator) if isinstance(generator, (list, tuple)) else [generator]
        if isinstance(generator, (list, tuple)) and len(generator) != images:
            raise UserError(f"{len(generator)} generators for {images} images", "give one, or one for each image")
        self.rows = 1 if len(self.generators) == images else images
        self.shape = shape
        self.step = cache(self._step)  # a request that is made in parts asks for each step once a part

    @property
    def seeds(self) -> list[int]:
        """A number for each image that the draws which are not the sampler's (of a VAE's posterior) follow from."""
        first = self.generators[0].initial_seed()
        return (
            [one.initial_seed() for one in self.generators] if self.rows == 1 else [first + i for i in range(self.rows)]
        )

    def draw(self) -> np.ndarray:
        """The next normal float32 noise, [images, C, h, w]."""
        import torch

        shape = (self.rows, *self.shape)
        return torch.cat(
            [torch.randn(shape, generator=one, device=one.device).cpu() for one in self.generators]
        ).numpy()

    def _step(self, i: int) -> np.ndarray:
        return self.draw()
