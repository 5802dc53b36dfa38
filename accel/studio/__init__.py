"""The studio: one prompt on two engines, side by side, in a browser on this machine."""

from __future__ import annotations

from .compare import Engines, Pair, compare
from .question import Choices, Question, asked

__all__ = ["Choices", "Engines", "Pair", "Question", "asked", "compare"]
