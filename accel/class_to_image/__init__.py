"""Class to image: models of the EDM family, few-step or with Heun's steps, on any engine. Start: `accel.load`."""

from .opening import load, opened
from .pipeline import ClassPipeline
from .request import complete

__all__ = ["ClassPipeline", "complete", "load", "opened"]
