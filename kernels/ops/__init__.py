"""Kernels for the eager and the compiled path, one operation per file; exports never see them."""

from .geglu import geglu
from .group_norm_silu import group_norm_silu

__all__ = ["geglu", "group_norm_silu"]
