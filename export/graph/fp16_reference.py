"""The float16 reference of an export, on a CPU as a GPU computes it: sums of products in float32, rounded once."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten
_SUMS = {
    _aten.convolution.default,
    _aten.linear.default,
    _aten.addmm.default,
    _aten.mm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
}


class SummedInFloat32(TorchDispatchMode):
    """In this mode, products and convolutions of float16 tensors compute in float32 and round the result.

    On a processor without float16 arithmetic torch's own float16 convolution takes 300 times as long as a float32 one
    (SDXL's UNet: an hour for one call) and gives the same result: it sums in float32 too.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SUMS or args[0].dtype != torch.float16:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(torch.Tensor, lambda tensor: tensor.float(), (args, kwargs))
        return func(*args, **kwargs).to(torch.float16)
