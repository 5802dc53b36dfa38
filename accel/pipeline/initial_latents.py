"""Initial latents: noise, a noised image (SDEdit, arXiv 2108.01073), or an image and a mask (inpainting).

Inpainting with an ordinary UNet puts the kept part back after every step (RePaint's idea, arXiv 2201.09865, without its
resampling); a UNet with nine input channels is shown mask and masked image instead. Both as diffusers does it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import images
from ..arrays import cast, concat
from ..engines import Engine
from ..engines.base import to_numpy
from ..errors import UserError
from ..sampling import noise, samplers
from .request import Chunk, Request
from .tiling import VaeTiling

# Draws of the noise that the VAE's posterior is sampled with; the sampler's own end at its number of steps.
_OF_IMAGE, _OF_MASKED = 1_000_001, 1_000_002


@dataclass(frozen=True)
class Start:
    """Float32 numpy arrays.

    Attributes:
        x: initial state [N, C, h, w].
        noised: whether x is a noised image, and not noise alone.
        extra: further input channels of the UNet [N, 1 + C, h, w], or None.
        constrain: (i, x, array) -> x, what is put back after each step, or None; `array` makes x's kind of array.
    """

    x: np.ndarray
    noised: bool = False
    extra: np.ndarray | None = None
    constrain: Callable[[int, Any, Callable], Any] | None = None


def encode(
    encoder: Engine,
    pixels: np.ndarray,
    constants: Mapping[str, Any],
    seeds: list[int],
    draw: int | None,
    tiling: VaeTiling | None = None,
) -> np.ndarray:
    """Latents float32 [N, C, h, w] of pixels in [-1, 1]: a sample of the posterior, or a tiny VAE's latents.

    Args:
        draw: of the noise that the posterior is sampled with; None for its mean, as the VAE has it (not scaled).
    """
    (spec,) = encoder.component.inputs
    limit = encoder.component.dims["images"].max

    def encoded(part: np.ndarray) -> np.ndarray:
        return cast(to_numpy(encoder(sample=cast(encoder.array(part), spec.dtype))["latent_parameters"]), "float32")

    parts = [pixels[i : i + limit] for i in range(0, len(pixels), limit)]
    latents = concat([encoded(part) if tiling is None else tiling.encode(part, encoded) for part in parts])
    channels = constants["latent_channels"]
    if latents.shape[1] == 2 * channels:
        mean, log_variance = latents[:, :channels], np.clip(latents[:, channels:], -30, 20)
        if draw is None:
            return mean
        latents = mean + np.exp(0.5 * log_variance) * noise.normal(seeds, draw, mean.shape[1:])
    return latents if draw is None else scaled(latents, constants)


def scaled(z: np.ndarray, constants: Mapping[str, Any]) -> np.ndarray:
    """The VAE's latents [N, C, h, w] as the UNet sees them, of unit variance; see `Manifest.pipeline` for constants."""
    return (z - _each(constants["shift_factor"])) * _each(constants["scaling_factor"])


def unscaled(x: np.ndarray, constants: Mapping[str, Any]) -> np.ndarray:
    """The UNet's latents [N, C, h, w] as the VAE decodes them."""
    return x * (1.0 / _each(constants["scaling_factor"])) + _each(constants["shift_factor"])


def _each(value: float | list[float]) -> Any:
    return np.asarray(value, np.float32)[:, None, None] if isinstance(value, list) else value


def start(
    request: Request,
    chunk: Chunk,
    first: np.ndarray,
    *,
    channels: int,
    encoder: Callable[[], Engine],
    schedule: samplers.NoiseSchedule,
    constants: Mapping[str, Any],
) -> Start:
    """The start of one chunk.

    Args:
        first: noise of the chunk, float32 [n, C, h, w].
        channels: number of channels of the UNet's input.
        encoder: loads the VAE encoder.

    Raises:
        UserError: when the UNet and the images do not fit each other.
    """
    given, plan, tiling = request.images, request.plan, request.tiling
    latent = constants["latent_channels"]
    inpaints, edits = channels == 2 * latent + 1, channels == 2 * latent
    if not inpaints and not edits and channels != latent:
        raise UserError(f"UNets with {channels} input channels are not supported", "use text-to-image or inpainting")
    if inpaints and given.mask is None:
        raise UserError("this is an inpainting model: it needs an image and a mask", "--image FILE --mask FILE")
    if edits and (given.image is None or given.mask is not None):
        what = "an image to edit" if given.image is None else "an image alone, and no mask"
        raise UserError(f"this model edits images (InstructPix2Pix): it needs {what}", "--image FILE")
    if given.image is None:
        return Start(first, noised=plan.resumes)
    pixels = images.batch(given.image, request.total, request.pixels)[chunk.rows] * 2 - 1
    if edits:
        seen = encode(encoder(), pixels, constants, chunk.seeds, None, tiling)
        return Start(first, extra=np.asarray(seen, np.float32))
    mask = None if given.mask is None else images.masks(given.mask, request.total, request.pixels)[chunk.rows]
    fresh = mask is not None and plan.start == 0
    known = None if fresh and inpaints else encode(encoder(), pixels, constants, chunk.seeds, _OF_IMAGE, tiling)
    x = first if fresh else plan.noised(schedule, known, first, plan.start)
    x = np.asarray(x, np.float32)
    if mask is None:
        return Start(x, noised=True)
    small = images.shrunk(mask, constants["vae_scale"])
    if inpaints:
        seen = encode(encoder(), pixels * (mask < 0.5), constants, chunk.seeds, _OF_MASKED, tiling)
        return Start(x, not fresh, extra=np.concatenate([small, seen], axis=1).astype(np.float32))

    def constrain(i: int, x: Any, array: Callable) -> Any:
        last = i + 1 == len(plan.timesteps)
        kept = known if last else plan.noised(schedule, known, first, i + 1)
        return array(np.asarray((1 - small) * kept, np.float32)) + array(small) * x

    return Start(x, not fresh, constrain=constrain)
