"""Prompt to image: request, conditioning, initial latents, sampler, decoder. Start: `accel.load`."""

from .lazy_engines import component_names
from .opening import check_call, load, opened, read_embeddings
from .output import Output
from .pipeline import Pipeline

__all__ = ["Output", "Pipeline", "check_call", "component_names", "load", "opened", "read_embeddings"]
