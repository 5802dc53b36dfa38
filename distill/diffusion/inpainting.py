"""What an inpainting UNet sees beside x_t: where the image is hidden, and the latents of what is not hidden.

    input = [x_t, mask, E(pixels * (1 - mask))]        9 channels where latents have 4 (arXiv 2112.10752)

in the order of diffusers' StableDiffusionInpaintPipeline; the mask is 1 where the image is to be painted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from accel.errors import UserError

from ..data import rng
from ..data.draws import Draw, take
from ..data.encoders import Encoders, sent
from ..settings import Recipe

MASKED = Draw("masked")
WHOLE = 0.25  # share of images that are hidden altogether, as stable-diffusion-inpainting was trained


def masks(seed: int, indices: Sequence[int], height: int, width: int) -> torch.Tensor:
    """Random rectangles, float32 [b, 1, height, width]: 1 in them, 0 elsewhere. Every size and place is as likely."""
    made = torch.zeros(len(indices), 1, height, width)
    for mask, index in zip(made, indices, strict=True):
        whole, *at = rng.generator(seed, int(index), "mask").random(5)
        if whole < WHOLE:
            mask.fill_(1)
            continue
        tall, wide = math.ceil((1 - at[0]) * height), math.ceil((1 - at[1]) * width)
        top, left = int(at[2] * (height - tall + 1)), int(at[3] * (width - wide + 1))
        mask[:, top : top + tall, left : left + wide] = 1
    return made


def hidden(batch: Mapping[str, Any], seed: int, encoders: Encoders) -> torch.Tensor:
    """Mask and latents of the masked image, float32 [b, 1 + 4, h, w], of a batch that has its `pixels`."""
    mean = batch["latent_mean"]
    mask = sent(masks(seed, batch["index"], *mean.shape[2:]), mean.device)
    cells = mask.repeat_interleave(encoders.factor, 2).repeat_interleave(encoders.factor, 3)
    seen = encoders.images(batch["pixels"] * (1 - cells))
    return torch.cat([mask, seen["latent_mean"] + seen["latent_std"] * take(batch, seed, MASKED)], 1)


def check(recipe: Recipe, encoders: Encoders) -> None:
    """Refuse a UNet whose further input channels nobody here knows, and a cache that cannot hold what is drawn anew.

    Raises:
        UserError: naming them.
    """
    channels, latent = encoders.source.config("unet").get("in_channels", 4), encoders.latent_channels
    if channels != latent and not encoders.inpaints:
        raise UserError(
            f"the UNet of {encoders.source.name} has {channels} input channels; training knows {latent} (text to "
            f"image) and {2 * latent + 1} (inpainting)",
            "give a text-to-image or an inpainting pipeline",
        )
    if encoders.inpaints and recipe.cache not in ("auto", "none"):
        raise UserError(
            f"{encoders.source.name} is for inpainting: its masks are drawn anew every time, so the latents of what "
            "they leave cannot come from a cache",
            "--cache none",
        )
