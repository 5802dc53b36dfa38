"""Resize, crop and flip: which square, or which rectangle of its bucket, of an image training uses.

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
    """Resize to `resized`, cut a frame at (`left`, `top`), then mirror it if `flipped`.

    Attributes:
        resized: (width, height).
        left: of the frame in the resized image, before it is mirrored.
        top: likewise.
        flipped: left and right are exchanged.
    """

    resized: tuple[int, int]
    left: int
    top: int
    flipped: bool


Frame = int | tuple[int, int]  # side of a square, or (width, height), in pixels


def sides(frame: Frame) -> tuple[int, int]:
    """(width, height) of a frame."""
    return (frame, frame) if isinstance(frame, int) else frame


def place(
    size: tuple[int, int],
    frame: Frame,
    *,
    center_crop: bool,
    random_flip: bool,
    rng: np.random.Generator,
    epoch: int = 0,
) -> Placement:
    """Draw the placement of an image of (width, height) for a frame.

    `epoch` counts the times the image is shown. Of one square in the middle there are two views, the image and its
    mirror image, so these take turns, and the draw says which comes first.

    The image becomes as small as covers the frame: of a square, the short side becomes its side. Three numbers are
    drawn whatever the options are, so that switching one of them does not move the others.

    Raises:
        ValueError: when one side is more than LARGEST_ASPECT times the other.
    """
    short, long = min(size), max(size)
    if long > LARGEST_ASPECT * short:
        raise ValueError(f"{size[0]} x {size[1]} pixels is too narrow for a square")
    wide, high = sides(frame)
    if wide * size[1] >= high * size[0]:
        width, height = wide, wide * size[1] // size[0]
    else:
        width, height = high * size[0] // size[1], high
    flip, across, down = rng.random(3)
    if center_crop:
        left, top = int(round((width - wide) / 2.0)), int(round((height - high) / 2.0))
    else:
        left, top = int(across * (width - wide + 1)), int(down * (height - high + 1))
    mirrored = (flip < 0.5) != bool(center_crop and epoch % 2)
    return Placement((width, height), left, top, bool(random_flip and mirrored))


def pixels(image: Image.Image, placement: Placement, frame: Frame) -> torch.Tensor:
    """The frame of an RGB image, float32 [3, height, width] in -1..1."""
    wide, high = sides(frame)
    if image.size != placement.resized:
        image = image.resize(placement.resized, Image.Resampling.BILINEAR)
    left, top = placement.left, placement.top
    image = image.crop((left, top, left + wide, top + high))
    if placement.flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    values = np.asarray(image, np.float32) / 127.5 - 1
    return torch.from_numpy(values).permute(2, 0, 1).contiguous()


def time_ids(placement: Placement, original: tuple[int, int], frame: Frame) -> list[int]:
    """SDXL's micro-conditioning (Podell et al. 2023, arXiv 2307.01952, section 2.2).

    [original height, original width, crop top, crop left, target height, target width]. SDXL crops the mirrored
    image, so the crop's left edge is counted in that one.

    Args:
        original: (width, height) of the image before resizing.
    """
    wide, high = sides(frame)
    left = placement.resized[0] - placement.left - wide if placement.flipped else placement.left
    return [original[1], original[0], placement.top, left, high, wide]
