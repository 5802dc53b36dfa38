"""Which kernel computes attention: the table, what can run here, and the processor that calls it."""

from .kernels import KERNELS, NAMES, check

__all__ = ["KERNELS", "NAMES", "check"]
