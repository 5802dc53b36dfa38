"""The same image? Every variant against eager in float32, beside what rounding and repetition alone do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engines.base import to_numpy
from ..parity import compare


@dataclass(frozen=True)
class Sample:
    """What one variant computes: one UNet output, and images [N, H, W, 3] in [0, 1]."""

    unet: np.ndarray
    image: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        return (np.clip(self.image, 0, 1) * 255).round().astype(np.uint8)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.pixels.tobytes()).hexdigest()


def sample(unet: Mapping[str, Any], image: Any) -> Sample:
    """From the outputs of a UNet call and of a pipeline call."""
    return Sample(to_numpy(unet["out_sample"]).astype(np.float32), np.asarray(image.images))


def parity(ours: Sample | None, reference: Sample | None) -> dict[str, dict[str, Any] | None]:
    """Measures of the UNet output, and of the unrounded images in units of 1/255; None where one is missing."""
    if ours is None or reference is None:
        return {"unet": None, "image": None}
    return {
        "unet": compare(ours.unet, reference.unet).as_dict(),
        "image": compare(ours.image * 255.0, reference.image * 255.0, 255).as_dict(),
    }
