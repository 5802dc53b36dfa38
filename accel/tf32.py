"""float32 in float32 on a GPU: cuDNN's convolutions would round their inputs to TF32 (10 bits) by default."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Turn:
    """Torch's settings are those of the whole process: calls that want the same share them, others wait."""

    def __init__(self) -> None:
        self.free, self.wanted, self.inside = threading.Condition(), "", 0
        self.before: list[str] = []


_TURN = _Turn()


def _places() -> list[Any]:
    import torch

    return [torch.backends.cuda.matmul, torch.backends.cudnn.conv]


@contextmanager
def float32_as(precision: str) -> Iterator[None]:
    """Compute float32 products and convolutions on CUDA as "ieee" or "tf32" within the block; restored after it."""
    turn = _TURN
    with turn.free:
        turn.free.wait_for(lambda: turn.inside == 0 or turn.wanted == precision)
        turn.inside += 1
        if turn.inside == 1:
            turn.wanted, turn.before = precision, [place.fp32_precision for place in _places()]
            for place in _places():
                place.fp32_precision = precision
    try:
        yield
    finally:
        with turn.free:
            turn.inside -= 1
            if turn.inside == 0:
                for place, value in zip(_places(), turn.before, strict=True):
                    place.fp32_precision = value
                turn.free.notify_all()
