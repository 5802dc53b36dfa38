"""Load a model on any engine; a diffusers pipeline is compiled on the way where the engine runs graphs."""

from .loader import load, opened
from .pretrained import AccelPipeline

__all__ = ["AccelPipeline", "load", "opened"]
