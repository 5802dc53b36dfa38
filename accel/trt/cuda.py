"""One CUDA device as torch sees it: what it is, its memory, streams of our own, captured graphs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import MissingPackage, UserError
from ..machine import Gpu

_capturing = threading.Lock()


def index_of(device: str) -> int | None:
    """Which CUDA device "auto", "cuda" or "cuda:1" is; None for another kind of device."""
    kind, _, number = device.partition(":")
    if device != "auto" and (kind != "cuda" or not (number or "0").isdigit()):
        return None
    return int(number or 0)


class Cuda:
    """A CUDA device.

    Args:
        index: which one, as torch counts them.

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

    def activate(self) -> None:
        """Make it the calling thread's device: TensorRT uses whichever that is."""
        import torch

        torch.cuda.set_device(self.index)

    def free(self) -> int:
        """Free memory in bytes, for all processes together."""
        import torch

        return torch.cuda.mem_get_info(self.index)[0]

    def release(self) -> None:
        """Give memory that torch holds without using it back to the device."""
        import torch

        torch.cuda.empty_cache()

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)

    def stream(self) -> Any:
        """A stream that is not the default one, which would synchronise with everything and cannot be captured."""
        import torch

        return torch.cuda.Stream(self.device)

    def handle(self, stream: Any) -> int:
        return stream.cuda_stream

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Work of the body runs on `stream`: after what the caller has queued, before what the caller queues next."""
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
        """Record what `work` queues as a CUDA graph; the result replays it on the current stream.

        `work` must have run once before, outside of a capture, and may not wait for the GPU.
        """
        import torch

        graph = torch.cuda.CUDAGraph()
        # One capture at a time, and other threads may go on allocating meanwhile.
        with _capturing, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def synchronize(self, stream: Any) -> None:
        stream.synchronize()
