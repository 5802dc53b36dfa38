"""Folders that other exporters wrote, taken into accel's cache as bundles."""

from .taken import KINDS, kind_of, taken

__all__ = ["KINDS", "kind_of", "taken"]
