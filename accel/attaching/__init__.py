"""`accel.attach`: the compiled networks of a bundle in a diffusers pipeline."""

from .attached import Attached, attach

__all__ = ["Attached", "attach"]
