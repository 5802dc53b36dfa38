"""Whether memory holds all variants of a run at once."""

from __future__ import annotations

import psutil

from ..dtypes import SHORT
from ..engines import status
from ..pipeline import component_names
from .state import State

_USED = 0.8  # share of the free memory that weights may take; activations and caches need the rest
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def holds_all(state: State) -> bool:
    """Whether the weights of all variants fit beside each other into what is free on the GPU, or in main memory."""
    needed = sum(weight_bytes(state, variant.dtype) for variant in state.live)
    return len(state.live) < 2 or needed <= _USED * free_bytes()


def weight_bytes(state: State, dtype: str) -> int:
    """Bytes of a variant's weights, by the number of parameters and the dtype it computes in."""
    total = 0
    for name in component_names(state.bundle):
        record = state.bundle.component(name)
        total += (record.parameters or 0) * _BYTES.get(SHORT.get(dtype, record.dtype), 4)
    return total


def free_bytes() -> int:
    """Free bytes of the GPU that torch would use, else of main memory."""
    if status("eager").ok:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
