"""A bundle as a folder that OpenVINO GenAI and optimum-intel read."""

from .folder import describe, write

__all__ = ["describe", "write"]
