"""Prompt to image: request, conditioning, initial latents, sampler, decoder. Start: `accel.load`."""

from .output import Output
from .pipeline import Pipeline, component_names, load, opened

__all__ = ["Output", "Pipeline", "component_names", "load", "opened"]
