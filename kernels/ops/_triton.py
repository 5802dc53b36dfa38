"""Triton where it is installed; the ops run their torch reference where it is not, or on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def jit(kernel: Callable) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody calls then."""
    return triton.jit(kernel) if triton is not None else kernel
