"""A module's weights in pinned host memory, and on a GPU only while they are needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ...trt.cuda import Cuda


class Visiting:
    """The weights of a module, which wait in host memory.

    "model" uploads all of them at the first call and keeps them until `leave`: the GPU holds one network at a time, and
    loses nothing while it computes (diffusers' `enable_model_cpu_offload`). "sequential" uploads those of one layer for
    the time of its call: the GPU holds a layer, and every call waits for all weights to be copied (diffusers'
    `enable_sequential_cpu_offload`).

    Args:
        module: its tensors are in host memory; they are pinned here, so that uploads do not wait for the processor.
    """

    def __init__(self, module: nn.Module, cuda: Cuda, mode: str):
        self.module, self.cuda, self.mode = module, cuda, mode
        self._home: dict[torch.Tensor, torch.Tensor] = {}
        self._turn = threading.RLock()
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = cuda.pinned(tensor.data)
        if mode == "sequential":
            for part in module.modules():
                if next(_own(part), None) is not None:
                    part.register_forward_pre_hook(lambda own, _: self._upload(_own(own)))
                    part.register_forward_hook(lambda own, *_: self._drop(_own(own)), always_call=True)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a call of the module; one thread at a time."""
        with self._turn:
            if self.mode == "model":
                self._upload((*self.module.parameters(), *self.module.buffers()))
            yield

    def leave(self) -> None:
        """Drop what is on the GPU; the next call brings it back."""
        with self._turn:
            self._drop(list(self._home))

    def _upload(self, tensors: Any) -> None:
        with torch.inference_mode(False):  # else they could not be put in the place of ordinary tensors
            for tensor in tensors:
                if tensor not in self._home:
                    self._home[tensor] = tensor.data
                    tensor.data = self.cuda.upload(tensor.data)

    def _drop(self, tensors: Any) -> None:
        for tensor in tensors:
            if tensor in self._home:
                tensor.data = self._home.pop(tensor)


def _own(part: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors of a module that are not those of a module inside it."""
    yield from part.parameters(recurse=False)
    yield from part.buffers(recurse=False)
