"""float32 in float32 on a GPU: cuDNN's convolutions would round their inputs to TF32 (10 bits) by default."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Turn:
    """Torch's settings are those of the whole process: calls that want the same share them, others wait."""

    def __init__(self) -> None:
        self.free, self.wanted, self.inside = threading.Condition(), False, 0
        self.restore: Callable[[], None] = lambda: None


_TURN = _Turn()


def _set(allow: bool) -> Callable[[], None]:
    """Set torch's settings; a function that puts back what they were.

    The old switches (`allow_tf32`) are set: torch refuses to read them where one of the new ones (`fp32_precision`)
    was set alone, and torch.compile reads the old ones. The new ones follow, and are put back too.
    """
    import torch

    old = [torch.backends.cuda.matmul, torch.backends.cudnn]
    new = [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]
    switches: list[bool | None] = []
    for place in old:
        try:
            switches.append(place.allow_tf32)
        except RuntimeError:  # the caller has set new ones
            switches.append(None)
    values = [place.fp32_precision for place in new]

    def restore() -> None:
        for place, switch in zip(old, switches, strict=True):
            if switch is not None:
                place.allow_tf32 = switch
        for place, value in zip(new, values, strict=True):
            place.fp32_precision = value

    for place in old:
        place.allow_tf32 = allow
    return restore


@contextmanager
def float32_in_tf32(allow: bool) -> Iterator[None]:
    """Allow or forbid TF32 in float32 products and convolutions on CUDA within the block; restored after it."""
    turn = _TURN
    with turn.free:
        turn.free.wait_for(lambda: turn.inside == 0 or turn.wanted == allow)
        turn.inside += 1
        if turn.inside == 1:
            turn.wanted, turn.restore = allow, _set(allow)
    try:
        yield
    finally:
        with turn.free:
            turn.inside -= 1
            if turn.inside == 0:
                turn.restore()
                turn.free.notify_all()
