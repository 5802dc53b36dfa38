"""Bundles on the Hugging Face hub: which one a name means, and its files as they are needed."""

from .errors import explained
from .origin import Origin, find

__all__ = ["Origin", "explained", "find"]
