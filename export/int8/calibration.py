"""The calibration set: real prompts, sampled exactly as they will be when the model is deployed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from accel.assets import DIGITS
from accel.errors import Notice, UserError
from accel.files import digest_of
from accel.pipeline import Pipeline
from accel.text.prompt_files import read_prompts

IMAGES = 32
FEW = 16
# Pixels at once: eight images of 64 px or four of 256 px. More are no faster, and their activations take the memory.
_AT_ONCE, _PIXELS_AT_ONCE = 8, 4 * 256**2
_TEXT_KEYS = ("text", "prompt", "caption")
# Evaluation images use held-out seeds.
HELD_OUT = 1_000_000


@dataclass(frozen=True)
class Calibration:
    """Prompts, noise, and sampling.

    Attributes:
        prompts: one per image.
        seed: of the first image's noise.
        sampling: arguments of the pipeline instead of the bundle's own. An export has none: steps, timesteps and
            guidance are the deployed ones. (A benchmark measures what wrong ones cost.)
    """

    prompts: tuple[str, ...]
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def run(self, pipeline: Pipeline, progress: Callable[[float], None] = lambda fraction: None) -> np.ndarray:
        """Draw all images, float32 [n, h, w, 3] in 0..1, a few at a time."""
        made: list[np.ndarray] = []
        done, at_once = 0, 1  # the first image tells how large they are
        while done < len(self.prompts):
            part = list(self.prompts[done : done + at_once])
            made.append(pipeline(part, seed=self.seed + done, output_type="np", **self.sampling).images)
            done += len(part)
            at_once = min(_AT_ONCE, max(1, _PIXELS_AT_ONCE // math.prod(made[0].shape[1:3])))
            progress(done / len(self.prompts))
        return np.concatenate(made)

    def held_out(self, images: int) -> Calibration:
        """The same prompts from held-out seeds, repeated or cut to a number of images."""
        prompts = tuple(self.prompts[i % len(self.prompts)] for i in range(images))
        return Calibration(prompts, self.seed + HELD_OUT, self.sampling)

    def record(self, sampler: Mapping[str, Any]) -> dict[str, Any]:
        """The manifest's record of this set. Its digest is part of the identity of every engine file."""
        kept = {"images": len(self.prompts), "seed": self.seed, "sampler": dict(sampler) | dict(self.sampling)}
        return kept | {"digest": digest_of(kept | {"prompts": list(self.prompts)})}


def calibration(prompts: Sequence[str], images: int = IMAGES, seed: int = 0) -> Calibration:
    """A set of `images` images; the prompts are repeated as often as needed.

    Raises:
        UserError: for no prompts, or no images. A Notice warns of so few images that ranges may be too narrow.
    """
    prompts = [text.strip() for text in prompts if text.strip()]
    if not prompts:
        raise UserError("there are no calibration prompts", "give a file with one prompt per line to --calibration")
    if images < 1:
        raise UserError(f"invalid number of calibration images: {images}", f"--calibration-images {IMAGES}")
    if images < FEW:
        warnings.warn(
            f"only {images} calibration image{'s' * (images > 1)}: ranges may be too narrow (default: {IMAGES})",
            Notice,
            stacklevel=2,
        )
    return Calibration(tuple(prompts[i % len(prompts)] for i in range(images)), seed)


def default_prompts(name: str) -> list[str]:
    """The built-in prompts for a model, by its name: those of digits for shipped models, general ones for others."""
    return read_prompts((DIGITS if name.split("/")[0] == "digits" else DIGITS.parent) / "prompts.txt")
