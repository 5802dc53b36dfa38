"""What a sampler with a loop of its own needs, and the names that the update rules had in 0.1."""

from __future__ import annotations

from .linear import Callback, Constrain, Model, Noise, conversions
from .noise_schedule import NoiseSchedule
from .samplers import Timesteps, sample_ddim, sample_dmd2, sample_dpmpp_2m, sample_euler

__all__ = [
    "Callback",
    "Constrain",
    "Model",
    "Noise",
    "Timesteps",
    "sample_ddim",
    "sample_dmd2",
    "sample_dpmpp_2m",
    "sample_euler",
]


def _predictions(schedule: NoiseSchedule, a: float, t: float) -> tuple[tuple[float, float], ...]:
    """((x0x, x0p), (ex, ep)) such that x0 = x0x x + x0p prediction and eps = ex x + ep prediction, at alpha_bar = a."""
    return conversions(schedule.prediction_type, a**0.5, (1 - a) ** 0.5, t)
