"""Packed layers, with quantized weights: what a bundle stores, what torch rebuilds from it, and what is exported.

In torch they compute in float32 what the exported graph computes. During an export they emit QuantizeLinear and
DequantizeLinear nodes, whose scales and weights are the layer's own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .attention import put
from .config import is_product
from .fake_quant import FakeQuantProduct, fake_layers, join_bos, split_bos, traits
from .formats import INT8, Format, of_layer
from .rounding import nearest_, quantized, unpacked, weight_scale


class Packed(nn.Module):
    """Base of packed modules: scales, and quantized weights if there are weights."""

    def __init__(self, form: Format = INT8, block: int = 0):
        super().__init__()
        self.form, self.block = form, block

    def quantized(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if not self.form.activations:
            return x
        if not torch.compiler.is_exporting():
            return nearest_(x.float() / scale.float(), self.form).mul_(scale.float()).to(x.dtype)
        dtype = getattr(torch, self.form.stored)
        zero = torch.zeros((), dtype=dtype)
        q = _onnx("QuantizeLinear", (x, scale, zero), dtype, x.shape)
        return _onnx("DequantizeLinear", (q, scale, zero), x.dtype, x.shape)

    def dequantized(self, axis: int) -> torch.Tensor:
        """The weight in the dtype of its scales, of which the outputs are along `axis`."""
        weight, scale = self.weight, self.weight_scale
        if self.block:  # [in, out / 2] by [in / block, out]; the file says that the pairs are int4 (`export.graph`)
            if torch.compiler.is_exporting():
                shape = (len(weight), scale.shape[1])
                return _onnx("DequantizeLinear", (weight, scale), scale.dtype, shape, axis=0, block_size=self.block)
            return (unpacked(weight, self.form) * scale.float().repeat_interleave(self.block, 0)).to(scale.dtype)
        if torch.compiler.is_exporting():
            return _onnx("DequantizeLinear", (weight, scale), scale.dtype, weight.shape, axis=axis)
        shape = [1] * weight.dim()
        shape[axis] = -1
        return (weight.float() * scale.float().view(shape)).to(scale.dtype)


def _onnx(op: str, inputs: tuple, dtype: torch.dtype, shape: Sequence[Any], **attrs: Any) -> torch.Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attrs, dtype=dtype, shape=tuple(shape))


class PackedConv2d(Packed):
    """weight [out, in, kh, kw], weight_scale [out]; input_scale [] and output_scale [] where those are rounded.

    The canonical graph leaves outputs in float: TensorRT and OpenVINO do not need them quantized. `export.graph.uint8`
    quantizes them for ONNX Runtime, and `outputs = True` does the same here.
    """

    outputs = False

    def __init__(self, layer: nn.Conv2d, own: Sequence[str]):
        super().__init__(*of_layer(own))
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
        assert layer.padding_mode == "zeros"
        _empty(self, tuple(layer.weight.shape), layer.out_channels, layer.bias is not None)
        self.register_buffer("output_scale", torch.empty(()) if "output" in own else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = self.quantized(x, self.input_scale), self.dequantized(0)
        y = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.quantized(y, self.output_scale) if self.outputs and self.output_scale is not None else y


class PackedLinear(Packed):
    """weight [in, out], transposed so that engines need not transpose it; the rest as in `PackedConv2d`.

    In int4, weight is uint8 [in, out / 2], and weight_scale [in / block, out].
    """

    def __init__(self, layer: nn.Linear, own: Sequence[str]):
        super().__init__(*of_layer(own))
        self.bos = "bos" in own
        _empty(self, (layer.in_features, layer.out_features), layer.out_features, layer.bias is not None)
        self.register_buffer("smooth", torch.empty(layer.in_features) if "smooth" in own else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.dequantized(1)
        x = x if self.smooth is None else x / self.smooth
        if not self.bos:
            return self.rounded(x, weight)
        first, others = split_bos(x)
        return join_bos(self._product(first, weight), self.rounded(others, weight))

    def rounded(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._product(self.quantized(x, self.input_scale), weight)

    def _product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, weight)
        return y if self.bias is None else y + self.bias


class PackedProduct(Packed):
    """A product of two activations; left_scale [], right_scale []."""

    active = True

    def __init__(self, own: Sequence[str] = ()) -> None:
        super().__init__(*of_layer(own))
        self.register_buffer("left_scale", torch.empty(()))
        self.register_buffer("right_scale", torch.empty(()))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.quantized(left, self.left_scale), self.quantized(right, self.right_scale))


def _empty(layer: Packed, weight: tuple[int, ...], out: int, bias: bool) -> None:
    scales: tuple[int, ...] = (out,)
    if layer.block:
        weight, scales = (weight[0], weight[1] // 2), (weight[0] // layer.block, out)
    layer.register_buffer("weight", torch.empty(weight, dtype=getattr(torch, layer.form.stored)))
    layer.register_buffer("weight_scale", torch.empty(scales))
    layer.register_buffer("input_scale", torch.empty(()) if layer.form.activations else None)
    layer.register_buffer("bias", torch.empty(out) if bias else None)


def _built(layer: nn.Module, own: Sequence[str]) -> Packed:
    return (PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear)(layer, own)


def place(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> None:
    """Put empty packed layers in a model built from its config, so that a stored state dict fits.

    Args:
        layers: {name: traits}, as `traits` gives them.
    """
    for name, own in layers.items():
        if is_product(name):
            put(model, name, PackedProduct(own))
        else:
            _replace(model, name, _built(model.get_submodule(name), own))


@torch.no_grad()
def pack(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace the fake-quantized layers of a model by packed ones, in place.

    Args:
        dtype: of scales and biases. Scales are rounded to it first, so that no error is added afterwards.
    """
    own = traits(model)
    for name, layer in list(fake_layers(model)):
        if isinstance(layer, FakeQuantProduct):
            product = PackedProduct(own[name])
            product.left_scale = _rounded(layer.left_range.scale, dtype)
            product.right_scale = _rounded(layer.right_range.scale, dtype)
            _replace(model, name, product)
            continue
        weight, packed = layer.effective_weight(), _built(layer, own[name])
        scale = _rounded(weight_scale(weight, layer.form, layer.block), dtype)
        packed.weight = quantized(weight, scale, layer.form)
        packed.weight_scale = scale.T.contiguous() if layer.block else scale
        if packed.input_scale is not None:
            packed.input_scale = _rounded(layer.input_range.scale, dtype)
        if getattr(packed, "output_scale", None) is not None:
            packed.output_scale = _rounded(layer.output_range.scale, dtype)
        if getattr(packed, "smooth", None) is not None:
            packed.smooth = layer.smooth.to(dtype)
        if packed.bias is not None:
            packed.bias = layer.bias.detach().to(dtype)
        _replace(model, name, packed.train(layer.training))


def _rounded(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale in another dtype; never zero, because activations are divided by it."""
    low = scale.to(dtype)
    return torch.where(low > 0, low, torch.full_like(low, torch.finfo(dtype).smallest_normal))


def set_outputs(model: nn.Module, on: bool) -> None:
    """Set whether packed convolutions quantize their outputs, as the graph for ONNX Runtime does."""
    for module in model.modules():
        if isinstance(module, PackedConv2d):
            module.outputs = on


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
