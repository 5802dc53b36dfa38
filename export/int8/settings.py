"""What decides an int8 export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from accel.int8.config import Int8Config

from . import image_parity
from .calibration import Calibration

QUANTISED = ("unet", "text_encoder", "text_encoder_2", "vae_decoder")


@dataclass(frozen=True)
class Settings:
    """What decides an int8 export.

    Attributes:
        recipe: which layers, how (`accel.int8.config`). What it keeps by name is meant for the UNet.
        calibration: what is drawn to calibrate.
        dtype: of everything that is not int8: float32, or float16 for a GPU.
        strict: the UNet is int8 whatever it is worth; the verdict says what it is. Otherwise, and for the other
            networks always, a component that is slower or outside the budget stays as it was.
        budget: least PSNR, in dB, of images against float32.
        keep_budget: leave layers of the UNet in higher precision until the budget holds.
        sensitivity: folder to write the table and the plot of what each layer costs to, or None.
        judged: images that parity is measured on.
        networks: what is to be int8, if it is worth it.
        trained: scales of a student trained with fake quantisation, by layer; empty to calibrate.
        threads: of the engines whose speed is measured; 0 lets them choose.
    """

    recipe: Int8Config
    calibration: Calibration
    dtype: str = "float32"
    strict: bool = True
    budget: float = image_parity.BUDGET
    keep_budget: bool = False
    sensitivity: Path | None = None
    judged: int = image_parity.IMAGES
    networks: tuple[str, ...] = QUANTISED
    trained: Mapping[str, torch.Tensor] | None = None
    threads: int = 0
