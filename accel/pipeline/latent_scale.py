"""Latents as the UNet sees them, of unit variance, and as the VAE does: by one factor, or by one for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def scaled(z: np.ndarray, constants: Mapping[str, Any]) -> np.ndarray:
    """The VAE's latents [N, C, h, w] as the UNet sees them; constants as in `accel.bundle.Manifest.pipeline`."""
    return (z - _each(constants["shift_factor"])) * _each(constants["scaling_factor"])


def unscaled(x: np.ndarray, constants: Mapping[str, Any]) -> np.ndarray:
    """The UNet's latents [N, C, h, w] as the VAE decodes them."""
    return x * (1.0 / _each(constants["scaling_factor"])) + _each(constants["shift_factor"])


def _each(value: float | list[float]) -> Any:
    return np.asarray(value, np.float32)[:, None, None] if isinstance(value, list) else value
