"""The safety checker of Stable Diffusion 1.x: which images it rejects."""

from .checker import COMPONENT, SafetyChecker

__all__ = ["COMPONENT", "SafetyChecker"]
