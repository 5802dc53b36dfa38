"""Resize, crop and flip: which square of an image training uses.

As torchvision's Resize, CenterCrop or RandomCrop, and RandomHorizontalFlip do it, which BK-SDM and diffusers' training
scripts use; with Pillow alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

# Beyond that the resized image would be a strip of gigabytes, of which a small square is kept.
LARGEST_ASPECT = 32


@dataclass(frozen=True)
class Placement:
    """Resize to `resized`, cut a square at (`left`, `top`), then mirror it if `flipped`.

    Attributes:
        resized: (width, height).
        left: of the square in the resized image, before it is mirrored.
        top: likewise.
        flipped: left and right are exchanged.
    """

    resized: tuple[int, int]
    left: int
    top: int
    flipped: bool


def place(
    size: tuple[int, int],
    resolution: int,
    *,
    center_crop: bool,
    random_flip: bool,
    rng: np.random.Generator,
    epoch: int = 0,
) -> Placement:
    """Draw the placement of an image of (width, height) for a square of `resolution` pixels.

    `epoch` counts the times the image is shown. Of one square in the middle there are two views, the image and its
    mirror image, so these take turns, and the draw says which comes first.

    The short side becomes `resolution`. Three numbers are drawn whatever the options are, so that switching one of
    them does not move the others.

    Raises:
        ValueError: when one side is more than LARGEST_ASPECT times the other.
    """
    short, long = min(size), max(size)
    if long > LARGEST_ASPECT * short:
        raise ValueError(f"{size[0]} x {size[1]} pixels is too narrow for a square")
    width, height = (resolution if side == short else int(resolution * long / short) for side in size)
    flip, across, down = rng.random(3)
    if center_crop:
        left, top = int(round((width - resolution) / 2.0)), int(round((height - resolution) / 2.0))
    else:
        left, top = int(across * (width - resolution + 1)), int(down * (height - resolution + 1))
    mirrored = (flip < 0.5) != bool(center_crop and epoch % 2)
    return Placement((width, height), left, top, bool(random_flip and mirrored))


def pixels(image: Image.Image, placement: Placement, resolution: int) -> torch.Tensor:
    """The square of an RGB image, float32 [3, resolution, resolution] in -1..1."""
    if image.size != placement.resized:
        image = image.resize(placement.resized, Image.Resampling.BILINEAR)
    left, top = placement.left, placement.top
    image = image.crop((left, top, left + resolution, top + resolution))
    if placement.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = np.asarray(image, np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def time_ids(placement: Placement, original: tuple[int, int], resolution: int) -> list[int]:
    """SDXL's micro-conditioning (Podell et al. 2023, arXiv 2307.01952, section 2.2).

    [original height, original width, crop top, crop left, target height, target width]. SDXL crops the mirrored
    image, so the crop's left edge is counted in that one.

    Args:
        original: (width, height) of the image before resizing.
        resolution: side of the square.
    """
    left = placement.resized[0] - placement.left - resolution if placement.flipped else placement.left
    return [original[1], original[0], placement.top, left, resolution, resolution]
