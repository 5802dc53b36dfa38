"""bfloat16 on a CPU that multiplies in it, for the operations that gain by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# Their backward passes take longer in bfloat16 than in float32: torch 2.13 on a Xeon with AMX, ms of one step of the
# emoji UNet: attention 219 for 22; of its VAE: group norm 67 for 21.
SLOWER = (F.scaled_dot_product_attention, F.group_norm)
PRECISIONS = ("auto", "fp32", "bf16")  # auto: bf16 where the processor has tiles for it (AMX)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Convolutions and products in one of `PRECISIONS`; weights, attention and group norm stay float32.

    With bf16, what comes out of a network may be bfloat16: a loss takes it as float32.
    """
    if precision == "fp32" or (precision == "auto" and not torch.cpu.get_capabilities().get("amx_bf16")):
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), _Full():
        yield


class _Full(TorchFunctionMode):
    """Runs the operations that are slower in bfloat16 in float32."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func not in SLOWER:
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*map(_full, args), **{name: _full(value) for name, value in (kwargs or {}).items()})


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
