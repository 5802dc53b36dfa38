"""diffusers' layers with operations of `accel.kernels` inside: the same weights, and the same names of weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from accel.kernels import geglu, group_norm_silu, quant_rowwise, w8a8_linear


def _norm(layer: nn.GroupNorm, x: torch.Tensor, shift: torch.Tensor | None = None) -> torch.Tensor:
    return group_norm_silu(x, layer.weight, layer.bias, layer.num_groups, eps=layer.eps, shift=shift)


class FusedResnetBlock2D(ResnetBlock2D):
    """A residual block whose norms, activations and time embedding are one operation each."""

    def forward(self, input_tensor: torch.Tensor, temb: torch.Tensor | None, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = self.conv1(_norm(self.norm1, input_tensor))
        shift = None
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(temb if self.skip_time_act else nn.functional.silu(temb))
        x = self.conv2(self.dropout(_norm(self.norm2, x, shift)))
        skip = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return (skip + x) / self.output_scale_factor


class FusedGEGLU(GEGLU):
    """A feed-forward gate in one operation."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return geglu(self.proj(hidden_states))


class NormAndActivation(nn.GroupNorm):
    """The last norm of a network, with the activation that follows it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _norm(self, input)


class ActivatedBefore(nn.SiLU):
    """The activation that a `NormAndActivation` has done."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input


class W8A8Linear(nn.Linear):
    """A linear layer that rounds its inputs row by row and multiplies them with a copy of its weight in eight bits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            raise ValueError("a W8A8 linear layer trains no weights: use torch.no_grad(), or requires_grad_(False)")
        stored, scale = self.weight_in_8_bits, self.scale_bits.view(torch.float32)
        weight = stored.view(torch.float8_e4m3fn) if stored.dtype == torch.uint8 else stored
        return w8a8_linear(input, weight, scale, self.bias)


ROUNDED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_COPIES = ("weight_in_8_bits", "scale_bits")
_MULTIPLE = 16  # of rows and columns, which `torch._scaled_mm` and `torch._int_mm` take


def round_weight(layer: nn.Linear, dtype: torch.dtype) -> None:
    """Give a layer a rounded copy of its weight, which moves with it and is not saved."""
    q, scale = quant_rowwise(layer.weight.detach(), dtype)
    # fp8 and scales as bits: a cast of the model to half precision passes integers over.
    bits = q.view(torch.uint8) if q.is_floating_point() else q, scale.view(torch.int32)
    for name, value in zip(_COPIES, bits, strict=True):
        layer.register_buffer(name, value, persistent=False)


def forget(layer: nn.Module) -> None:
    """Take the rounded copy away again."""
    for name in _COPIES:
        if name in layer._buffers:
            delattr(layer, name)


def linears(model: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """The linear layers of a model's transformer blocks that can be multiplied in eight bits: where its time goes."""
    found = {
        layer: W8A8Linear
        for block in model.modules()
        if isinstance(block, BasicTransformerBlock)
        for layer in block.modules()
        if type(layer) is nn.Linear and not (layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE)
    }
    return dict(found)


def replacements(model: nn.Module) -> dict[nn.Module, type[nn.Module]]:
    """The layers of a model that an operation of ours can take over, and what they become."""
    found: dict[nn.Module, type[nn.Module]] = {}
    for layer in model.modules():
        if type(layer) is ResnetBlock2D and _plain(layer):
            found[layer] = FusedResnetBlock2D
        elif type(layer) is GEGLU:
            found[layer] = FusedGEGLU
        last, activation = getattr(layer, "conv_norm_out", None), getattr(layer, "conv_act", None)
        if _is_norm(last) and type(activation) is nn.SiLU and _used_once(model, activation):
            found |= {last: NormAndActivation, activation: ActivatedBefore}
    return found


def _plain(block: ResnetBlock2D) -> bool:
    """Whether a block is a plain one: no sampling inside, time embedding added, SiLU, affine norms."""
    return (
        block.upsample is None
        and block.downsample is None
        and (block.time_emb_proj is None or block.time_embedding_norm == "default")
        and type(block.nonlinearity) is nn.SiLU
        and _is_norm(block.norm1)
        and _is_norm(block.norm2)
    )


def _is_norm(layer: Any) -> bool:
    return type(layer) is nn.GroupNorm and layer.affine


def _used_once(model: nn.Module, layer: nn.Module) -> bool:
    """Whether one place alone has this layer; activations may be shared."""
    return sum(child is layer for parent in model.modules() for child in parent._modules.values()) == 1
