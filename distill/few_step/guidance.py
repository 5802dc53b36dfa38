"""A frozen teacher with classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import shared_lora


def guided(
    family: Any, teacher: nn.Module, x_t: torch.Tensor, t: torch.Tensor, conditions: Any, scale: float | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's prediction without and with guidance, float64 [b, c, h, w]; the number 1 needs one call of it.

    Args:
        scale: a number, or one for each image as [b, 1, 1, 1].
    """
    dtype = shared_lora.dtype_of(teacher)

    def call(given: Any) -> torch.Tensor:
        seen, said_of = family.cast(x_t, given, dtype)
        return family.call(teacher, seen, t, said_of).double()

    said = call(conditions)
    if isinstance(scale, (int, float)) and scale == 1:
        return said, said
    without = call(family.unconditional(conditions))
    return said, without + scale * (said - without)
