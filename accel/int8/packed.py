"""Packed layers, with int8 weights: what a bundle stores, what torch rebuilds from it, and what is exported.

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
from .fake_quant import HIGH, LOW, FakeQuantProduct, along, fake_layers, join_bos, split_bos, traits, weight_scale


class Packed(nn.Module):
    """Base of packed modules: scales, and int8 weights if there are weights."""

    def quantized(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            q = torch.clamp(x.float() / scale.float(), LOW, HIGH).round_()
            return q.mul_(scale.float()).to(x.dtype)
        zero = torch.zeros((), dtype=torch.int8)
        q = _onnx("QuantizeLinear", (x, scale, zero), torch.int8, x.shape)
        return _onnx("DequantizeLinear", (q, scale, zero), x.dtype, x.shape)

    def dequantized(self, axis: int) -> torch.Tensor:
        weight, scale = self.weight, self.weight_scale
        if torch.compiler.is_exporting():
            return _onnx("DequantizeLinear", (weight, scale), scale.dtype, weight.shape, axis=axis)
        shape = [1] * weight.dim()
        shape[axis] = -1
        return (weight.float() * scale.float().view(shape)).to(scale.dtype)


def _onnx(op: str, inputs: tuple, dtype: torch.dtype, shape: Sequence[Any], **attrs: Any) -> torch.Tensor:
    return torch.onnx.ops.symbolic(op, inputs, attrs, dtype=dtype, shape=tuple(shape))


class Int8Conv2d(Packed):
    """weight int8 [out, in, kh, kw], weight_scale [out], input_scale [], output_scale [] if outputs are quantized.

    The canonical graph leaves outputs in float: TensorRT and OpenVINO do not need them quantized. `export.graph.uint8`
    quantizes them for ONNX Runtime, and `outputs = True` does the same here.
    """

    outputs = False

    def __init__(self, layer: nn.Conv2d, output: bool):
        super().__init__()
        self.stride, self.padding, self.dilation, self.groups = (
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
        )
        assert layer.padding_mode == "zeros"
        _empty(self, tuple(layer.weight.shape), layer.out_channels, layer.bias is not None)
        self.register_buffer("output_scale", torch.empty(()) if output else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, weight = self.quantized(x, self.input_scale), self.dequantized(0)
        y = F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return self.quantized(y, self.output_scale) if self.outputs and self.output_scale is not None else y


class Int8Linear(Packed):
    """weight int8 [in, out], transposed so that engines need not transpose it; the rest as in `Int8Conv2d`."""

    def __init__(self, layer: nn.Linear, bos: bool, smooth: bool):
        super().__init__()
        self.bos = bos
        _empty(self, (layer.in_features, layer.out_features), layer.out_features, layer.bias is not None)
        self.register_buffer("smooth", torch.empty(layer.in_features) if smooth else None)

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


class Int8Product(Packed):
    """A product of two activations; left_scale [], right_scale []."""

    active = True

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("left_scale", torch.empty(()))
        self.register_buffer("right_scale", torch.empty(()))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(self.quantized(left, self.left_scale), self.quantized(right, self.right_scale))


def _empty(layer: nn.Module, weight: tuple[int, ...], out: int, bias: bool) -> None:
    layer.register_buffer("weight", torch.empty(weight, dtype=torch.int8))
    layer.register_buffer("weight_scale", torch.empty(out))
    layer.register_buffer("input_scale", torch.empty(()))
    layer.register_buffer("bias", torch.empty(out) if bias else None)


def place(model: nn.Module, layers: Mapping[str, Sequence[str]]) -> None:
    """Put empty packed layers in a model built from its config, so that a stored state dict fits.

    Args:
        layers: {name: traits}, as `traits` gives them.
    """
    for name, own in layers.items():
        if is_product(name):
            put(model, name, Int8Product())
            continue
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Conv2d):
            packed: nn.Module = Int8Conv2d(layer, "output" in own)
        else:
            packed = Int8Linear(layer, "bos" in own, "smooth" in own)
        _replace(model, name, packed)


@torch.no_grad()
def pack(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Replace the fake-quantized layers of a model by packed ones, in place.

    Args:
        dtype: of scales and biases. Scales are rounded to it first, so that no error is added afterwards.
    """
    own = traits(model)
    for name, layer in list(fake_layers(model)):
        if isinstance(layer, FakeQuantProduct):
            product = Int8Product()
            product.left_scale = _rounded(layer.left_range.scale, dtype)
            product.right_scale = _rounded(layer.right_range.scale, dtype)
            _replace(model, name, product)
            continue
        weight = layer.effective_weight()
        scale = _rounded(weight_scale(weight), dtype)
        q = torch.clamp((weight / along(scale.float(), weight)).round(), LOW, HIGH).to(torch.int8)
        if isinstance(layer, nn.Conv2d):
            packed: nn.Module = Int8Conv2d(layer, "output" in own[name])
            packed.weight = q
            if packed.output_scale is not None:
                packed.output_scale = _rounded(layer.output_range.scale, dtype)
        else:
            packed = Int8Linear(layer, "bos" in own[name], "smooth" in own[name])
            packed.weight = q.T.contiguous()
            if packed.smooth is not None:
                packed.smooth = layer.smooth.to(dtype)
        packed.weight_scale, packed.input_scale = scale, _rounded(layer.input_range.scale, dtype)
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
        if isinstance(module, Int8Conv2d):
            module.outputs = on


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
