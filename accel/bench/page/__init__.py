"""Benchmark documents as self-contained web pages."""

from __future__ import annotations

from .compared import compared
from .single import page

__all__ = ["compared", "page"]
