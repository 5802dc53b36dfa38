"""Folders that other exporters wrote, taken into accel's cache as bundles."""

from .taken import kind_of, taken

__all__ = ["kind_of", "taken"]
