"""Prompt to image: request, conditioning, initial latents, sampler, decoder. Start: `accel.load`."""

from .pipeline import Pipeline, component_names, load

__all__ = ["Pipeline", "component_names", "load"]
