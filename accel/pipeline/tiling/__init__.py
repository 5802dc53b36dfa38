"""Large images through a VAE in overlapping tiles, so that memory is that of a tile."""

from .vae import VaeTiling

__all__ = ["VaeTiling"]
