"""One CUDA device through torch: its properties, memory, streams and captured graphs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ..errors import MissingPackage, UserError
from ..machine import Gpu

_capturing = threading.Lock()


def index_of(device: str) -> int | None:
    """The index of "auto", "cuda" (both 0) or "cuda:1" among the CUDA devices; None for another kind of device."""
    kind, _, number = device.partition(":")
    if device != "auto" and (kind != "cuda" or not (number or "0").isdigit()):
        return None
    return int(number or 0)


@contextmanager
def named(what: str) -> Iterator[None]:
    """A range of this name in Nsight Systems (NVTX), where torch works on a GPU; elsewhere nothing."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        yield
        return
    torch.cuda.nvtx.range_push(what)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


class Cuda:
    """A CUDA device.

    Args:
        index: as in torch's "cuda:<index>".

    Raises:
        UserError: when torch sees no such device.

    Attributes:
        device: "cuda:0", ...
        gpu: name, memory in bytes and compute capability.
    """

    def __init__(self, index: int = 0):
        try:
            import torch
        except ImportError:
            raise MissingPackage("torch", "running on a GPU") from None
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not 0 <= index < count:
            seen = f"{count} GPUs" if count else "no CUDA device"
            raise UserError(f"GPU {index} is not usable: torch sees {seen}", "check nvidia-smi, the driver and torch")
        self.index, self.device = index, f"cuda:{index}"
        found = torch.cuda.get_device_properties(index)
        self.gpu = Gpu(
            name=found.name, memory=found.total_memory, compute_capability=f"{found.major}.{found.minor}", driver=None
        )

    def active(self) -> AbstractContextManager[Any]:
        """It is the calling thread's current device, which is the one TensorRT uses, until the end of a `with`."""
        import torch

        return torch.cuda.device(self.index)

    def free(self) -> int:
        """Free memory of the device in bytes."""
        import torch

        return torch.cuda.mem_get_info(self.index)[0]

    def release(self) -> None:
        """Return the memory that torch's allocator caches to the device."""
        import torch

        torch.cuda.empty_cache()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def pinned(self, tensor: Any) -> Any:
        """A host tensor in pinned memory, in its memory format: it is copied to the device without waiting."""
        import torch

        return torch.empty_like(tensor, pin_memory=True).copy_(tensor)

    def upload(self, tensor: Any) -> Any:
        """A copy of a host tensor on the device, queued on the current stream."""
        return tensor.to(self.device, non_blocking=True)

    def stream(self) -> Any:
        """A new stream. (The default one synchronises with all others and cannot be captured.)"""
        import torch

        return torch.cuda.Stream(self.device)

    def handle(self, stream: Any) -> int:
        return stream.cuda_stream

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Queue the body's work on `stream`: after what the caller has queued, before what the caller queues next."""
        import torch

        caller = torch.cuda.current_stream(self.device)
        if caller == stream:
            yield
            return
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            yield
        caller.wait_stream(stream)

    def capture(self, stream: Any, work: Callable[[], Any]) -> Callable[[], None]:
        """Capture what `work` queues as a CUDA graph.

        Args:
            work: has run once before, outside of a capture, and does not wait for the GPU.

        Returns:
            A function that replays the graph on the current stream.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        # One capture at a time; "thread_local" lets other threads allocate meanwhile.
        with _capturing, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()
