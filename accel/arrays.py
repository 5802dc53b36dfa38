"""The few array operations that numpy and torch spell differently."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def is_torch(x: Any) -> bool:
    return hasattr(x, "detach")


def cast(x: Any, dtype: str) -> Any:
    """x in another dtype, by its numpy-style name."""
    if is_torch(x):
        import torch

        return x.to(getattr(torch, dtype))
    return x.astype(dtype, copy=False)


def concat(parts: Sequence[Any], axis: int = 0) -> Any:
    if is_torch(parts[0]):
        import torch

        return torch.cat(list(parts), dim=axis)
    return np.concatenate(parts, axis=axis)


def all_finite(x: Any) -> bool:
    """Whether x has neither NaN nor infinities, looked at where it lies."""
    if is_torch(x):
        return bool(x.isfinite().all())
    return bool(np.isfinite(x).all())


def to_host(x: Any) -> np.ndarray:
    """x as numpy; from a GPU in one copy into page-locked memory, which is several times as fast as into other."""
    if not is_torch(x):
        return x
    if not x.is_cuda:
        return x.detach().cpu().numpy()
    import torch

    pinned = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    torch.cuda.current_stream(x.device).synchronize()
    return pinned.numpy()


def synchronize(x: Any) -> None:
    """Wait until x is computed, so that a clock read afterwards tells the truth."""
    if is_torch(x) and x.is_cuda:
        import torch

        torch.cuda.synchronize(x.device)
