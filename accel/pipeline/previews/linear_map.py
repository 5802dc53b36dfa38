"""A linear map from a latent pixel to red, green and blue, fitted to a VAE decoder by least squares.

An autoencoder's latents are nearly a small picture, and a matrix of 3 x C numbers shows it, at no cost beside a step
of the UNet. It is fitted to the decoder's own pixels, averaged over the square that a latent pixel stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_SEED = 20260801


@dataclass(frozen=True)
class LinearMap:
    """pixel = factors @ latent + bias, pixels in about [-1, 1].

    Attributes:
        factors: for red, green and blue, a number for each latent channel.
        bias: of red, green and blue.
        error: root mean square of what it misses of the decoder's pixels, where it was fitted.
    """

    factors: Sequence[Sequence[float]]
    bias: Sequence[float]
    error: float = 0.0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Pixels float32 [N, 3, h, w] of latents [N, C, h, w], as the UNet sees them."""
        factors, bias = np.asarray(self.factors, np.float32), np.asarray(self.bias, np.float32)
        return np.einsum("rc,nchw->nrhw", factors, x) + bias[:, None, None]

    def as_dict(self) -> dict[str, Any]:
        return {"factors": [list(row) for row in self.factors], "bias": list(self.bias), "error": self.error}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LinearMap:
        return cls(data["factors"], data["bias"], data.get("error", 0.0))


def fit(x: np.ndarray, pixels: np.ndarray) -> LinearMap:
    """The map of latents [N, C, h, w] to the pixels [N, 3, H, W] that they decode to."""
    count, channels, height, width = x.shape
    scale = pixels.shape[2] // height
    squares = pixels.reshape(count, 3, height, scale, width, scale).mean(axis=(3, 5), dtype=np.float64)
    wanted = squares.transpose(0, 2, 3, 1).reshape(-1, 3)
    given = x.transpose(0, 2, 3, 1).reshape(-1, channels).astype(np.float64)
    given = np.concatenate([given, np.ones((len(given), 1))], axis=1)
    solved, *_ = np.linalg.lstsq(given, wanted, rcond=None)
    error = float(np.sqrt(np.mean((given @ solved - wanted) ** 2)))
    rounded = np.round(solved, 6)
    return LinearMap(rounded[:-1].T.tolist(), rounded[-1].tolist(), round(error, 6))


def probes(channels: int, size: tuple[int, int], count: int) -> np.ndarray:
    """Latents float32 [count, channels, *size] that are smooth as pictures: noise of several sizes, variance 1."""
    rng = np.random.default_rng(_SEED)
    height, width = size
    made = np.zeros((count, channels, height, width), np.float32)
    for side in (1, 2, 4, 8, 16):
        coarse = rng.standard_normal((count, channels, -(-height // side), -(-width // side)), np.float32)
        made += np.repeat(np.repeat(coarse, side, axis=2), side, axis=3)[:, :, :height, :width]
    return made / made.std()


def fitted(decode: Callable[[np.ndarray], np.ndarray], channels: int, size: tuple[int, int], count: int) -> LinearMap:
    """The map of a decoder.

    Args:
        decode: latents as the UNet sees them [1, C, h, w] -> pixels [1, 3, H, W].
        size: height and width of the latents to try.
        count: how many of them.
    """
    x = probes(channels, size, count)
    return fit(x, np.concatenate([decode(x[i : i + 1]) for i in range(count)]))
