"""Prompt to image: request, conditioning, initial latents, sampler, decoder. Start: `accel.load`."""

from .output import Output
from .pipeline import Pipeline, check_call, component_names, load, opened

__all__ = ["Output", "Pipeline", "check_call", "component_names", "load", "opened"]
