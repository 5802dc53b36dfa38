"""Kernels for the eager and the compiled path, one operation per file; exports never see them."""

from .geglu import geglu
from .group_norm_silu import group_norm_silu
from .quant_rowwise import quant_rowwise, w8a8_linear

__all__ = ["geglu", "group_norm_silu", "quant_rowwise", "w8a8_linear"]
