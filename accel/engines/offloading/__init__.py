"""Weights that wait in host memory and visit a GPU. Importing this package loads no torch."""

from __future__ import annotations

from ...errors import unknown

MODES = ("model", "sequential")


def check(mode: str | None) -> None:
    """Raises a UserError for a mode that is not one of `MODES`, or None."""
    if mode is not None and mode not in MODES:
        raise unknown("offload", mode, MODES)
