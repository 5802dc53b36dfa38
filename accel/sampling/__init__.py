"""Noise schedules, initial noise, sampling constants and samplers: data and pure functions on arrays."""

from .constants import Sampling

__all__ = ["Sampling"]
