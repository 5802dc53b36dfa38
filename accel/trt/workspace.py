"""One thread's stream and scratch memory on one GPU, shared by all its engines: they run one after another.

The largest engine decides its size, so text encoder, UNet and VAE together need no more scratch than one of them.
"""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary

from .cuda import Cuda

_ALIGNMENT = 512
_threads = threading.local()


class Workspace:
    """Attributes: `stream`, and `memory`, a uint8 tensor or None."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.stream, self.memory = cuda, cuda.stream(), None

    @property
    def handle(self) -> int:
        return self.cuda.handle(self.stream)

    def scratch(self, size: int) -> tuple[int, int]:
        """Address and size of at least `size` bytes. Growing moves it, which captured graphs have to notice."""
        if self.memory is None or self.memory.numel() < size:
            self.memory = None
            self.memory = self.cuda.empty((max(size, _ALIGNMENT),), "uint8")
        return self.memory.data_ptr(), self.memory.numel()


def workspace(cuda: Cuda) -> Workspace:
    """The calling thread's workspace on a device; it lives as long as an engine of the thread holds it."""
    if not hasattr(_threads, "workspaces"):
        _threads.workspaces = WeakValueDictionary()
    found = _threads.workspaces.get(cuda.index)
    if found is None:
        found = _threads.workspaces[cuda.index] = Workspace(cuda)
    return found
