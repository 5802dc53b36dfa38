"""The stream and scratch memory (TensorRT: device memory) of one thread on one GPU.

All engines of a thread share them, because they run one after another: text encoder, UNet and VAE together need no more
scratch memory than the largest of them.
"""

from __future__ import annotations

import threading
from weakref import WeakValueDictionary

from .cuda import Cuda

_ALIGNMENT = 512
_threads = threading.local()


class Workspace:
    """Attributes: `stream`; `memory`, a uint8 tensor [bytes], None before first use."""

    def __init__(self, cuda: Cuda):
        self.cuda, self.stream, self.memory = cuda, cuda.stream(), None

    @property
    def handle(self) -> int:
        return self.cuda.handle(self.stream)

    def scratch(self, size: int) -> tuple[int, int]:
        """Address and size in bytes, at least `size`. Growing moves it, which captured graphs have to notice."""
        if self.memory is None or self.memory.numel() < size:
            self.memory = None
            self.memory = self.cuda.empty((max(size, _ALIGNMENT),), "uint8")
        return self.memory.data_ptr(), self.memory.numel()


def workspace(cuda: Cuda) -> Workspace:
    """The calling thread's workspace on a device; freed when no engine of the thread holds it any more."""
    if not hasattr(_threads, "workspaces"):
        _threads.workspaces = WeakValueDictionary()
    found = _threads.workspaces.get(cuda.index)
    if found is None:
        found = _threads.workspaces[cuda.index] = Workspace(cuda)
    return found
