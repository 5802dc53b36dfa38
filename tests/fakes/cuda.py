"""A fake of `accel.trt.cuda.Cuda` on the CPU, with streams that can be captured.

A capture records every torch operation and every TensorRT enqueue with the memory that it had; a replay does the same
on the same memory again. So a graph that was not captured anew when it had to be computes a wrong answer, as on a GPU.
"""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from accel.errors import UserError
from accel.machine import Gpu


class Stream:
    def __init__(self, number: int):
        self.number = number


class Cuda:
    """One device; `Cuda.state` is shared by all handles to it, as a device is."""

    names = ("Fake GPU",)
    capability = "9.0"
    current: list[Stream] = []
    captures: dict[int, list] = {}
    made = 0
    active_index = 0
    launches = 0  # operations that were recorded, of all captures
    waits = 0  # of the host for the device
    free_bytes = 6 << 30
    uploads = uploaded = resident = most = 0  # copies of weights, their bytes, and the bytes held now and at most

    def __init__(self, index: int = 0):
        if index >= len(self.names):
            seen = f"torch sees {len(self.names)} GPUs"
            raise UserError(f"GPU {index} is not usable: {seen}", "check nvidia-smi, the driver and torch")
        self.index, self.device = index, "cpu"
        self.gpu = Gpu(name=self.names[index], memory=8 << 30, compute_capability=self.capability, driver=None)

    @contextmanager
    def active(self):
        before, Cuda.active_index = Cuda.active_index, self.index
        try:
            yield
        finally:
            Cuda.active_index = before

    def free(self) -> int:
        return self.free_bytes

    def release(self) -> None:
        pass

    def empty(self, shape, dtype):
        kind = getattr(torch, dtype)
        count = int(torch.Size(shape).numel()) * kind.itemsize
        block = torch.full((count + 256,), 0xA5, dtype=torch.uint8)  # what was there before: never zeros
        start = -block.data_ptr() % 256
        return block[start : start + count].view(kind).view(shape)

    def pinned(self, tensor):
        return tensor.clone()

    def upload(self, tensor):
        """A copy whose bytes are resident until nothing holds it."""
        size = tensor.nbytes
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().copy() if size else None
        if data is None:
            return tensor.clone()
        cls = Cuda
        cls.uploads, cls.uploaded, cls.resident = cls.uploads + 1, cls.uploaded + size, cls.resident + size
        cls.most = max(cls.most, cls.resident)
        weakref.finalize(data, _gone, size)
        return torch.from_numpy(data).view(tensor.dtype).view(tensor.shape)

    def stream(self) -> Stream:
        Cuda.made += 1
        return Stream(Cuda.made)

    def handle(self, stream: Stream) -> int:
        return stream.number

    @contextmanager
    def on(self, stream: Stream):
        self.current.append(stream)
        try:
            yield
        finally:
            self.current.pop()

    @classmethod
    def capturing(cls, handle: int):
        """The list to which work on a stream is to be added, or None."""
        return cls.captures.get(handle)

    def capture(self, stream: Stream, work):
        recorded: list = []
        self.captures[stream.number] = recorded
        try:
            with _Record(recorded), self.on(stream):
                work()
        finally:
            del self.captures[stream.number]

        def replay():
            for step in recorded:
                step()

        return replay

    def synchronize(self, stream: Stream) -> None:
        assert stream.number not in self.captures, "a synchronisation while a stream is captured"
        Cuda.waits += 1


def _gone(size: int) -> None:
    Cuda.resident -= size


class _Record(TorchDispatchMode):
    """Adds each operation to a list, as something that can be done again on the same tensors."""

    def __init__(self, recorded: list):
        super().__init__()
        self.recorded = recorded

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert "_local_scalar_dense" not in func.name(), "a value is read back while a stream is captured"
        out = func(*args, **kwargs)
        aliases = [r.alias_info for r in func._schema.returns]
        if any(a is not None and not a.is_write for a in aliases):
            return out  # a view: the same memory under another shape
        Cuda.launches += 1
        outs = out if isinstance(out, (tuple, list)) else [out]

        def again():
            new = func(*args, **kwargs)
            for old, made in zip(outs, new if isinstance(new, (tuple, list)) else [new], strict=True):
                if isinstance(old, torch.Tensor) and made.data_ptr() != old.data_ptr():
                    old.copy_(made)

        self.recorded.append(again)
        return out
