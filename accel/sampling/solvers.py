"""What a sampler with a loop of its own needs, and the names that the update rules had in 0.1."""

from __future__ import annotations

from .linear import Callback, Constrain, Model, Noise, conversions
from .samplers import Timesteps, sample_ddim, sample_dmd2, sample_dpmpp_2m, sample_euler

__all__ = [
    "Callback",
    "Constrain",
    "Model",
    "Noise",
    "Timesteps",
    "conversions",
    "sample_ddim",
    "sample_dmd2",
    "sample_dpmpp_2m",
    "sample_euler",
]
