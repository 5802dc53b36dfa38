"""float16 on a CPU as a GPU computes it: products and convolutions summed in float32 and rounded once."""

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
    """Inside, what sums products of float16 tensors does so in float32.

    A processor without float16 arithmetic takes 300 times as long for torch's own float16 convolution as for a float32
    one (SDXL's UNet: an hour for a single call), and its result is no other: it, too, is summed in float32.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _SUMS or args[0].dtype != torch.float16:
            return func(*args, **kwargs)
        wide = tree_map_only(torch.Tensor, lambda tensor: tensor.float(), (args, kwargs))
        return func(*wide[0], **wide[1]).to(torch.float16)
