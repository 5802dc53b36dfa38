"""The most memory that a torch module's activations take at once, from shapes alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


def peak(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """The most bytes of tensors alive at once in `module(**inputs)`, its inputs counted and its weights not.

    Everything runs on the meta device, so that a network of any size takes no memory. Attention counts as a kernel that
    keeps no scores, which torch has on CPUs and GPUs; scratch memory inside kernels does not count.

    Args:
        module: on the meta device, in the dtype to compute in.
        inputs: likewise.
    """
    own = {id(tensor.untyped_storage()) for tensor in (*module.parameters(), *module.buffers())}
    alive = _Alive(own)
    for value in inputs.values():
        alive.add(value)
    with torch.no_grad(), alive, _FusedAttention():
        outputs = module(**inputs)
    del outputs
    return alive.most


def largest_layer(module: torch.nn.Module) -> int:
    """Bytes of the weights of the layer that has the most."""
    return max(
        sum(t.numel() * t.element_size() for t in (*part.parameters(recurse=False), *part.buffers(recurse=False)))
        for part in module.modules()
    )


class _Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are gone."""

    def __init__(self, own: set[int]):
        super().__init__()
        self.own, self.held, self.most = own, 0, 0
        self._seen: weakref.WeakSet = weakref.WeakSet()

    def add(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if id(storage) in self.own or storage in self._seen:
            return
        self._seen.add(storage)
        size = tensor.numel() * tensor.element_size()
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.held -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            self.add(value)
        return out


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            query, value = args[0], args[2] if len(args) > 2 else kwargs["value"]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return function(*args, **(kwargs or {}))
