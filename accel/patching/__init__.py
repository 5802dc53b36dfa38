"""`accel.patch`: kernels of our own in a diffusers UNet or VAE."""

from .model import Patched, patch

__all__ = ["Patched", "patch"]
