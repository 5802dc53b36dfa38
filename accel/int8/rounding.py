"""The arithmetic of number formats in torch: what fake-quantized, packed and exported layers have in common.

    q = nearest(clamp(x / s, low, high)),    x' = q s

Weights have one scale per output channel, or per output channel and block of inputs, s = max|w| / high; activations
have one per tensor. Rounding goes to the even neighbour, as ONNX's QuantizeLinear does.
"""

from __future__ import annotations

import torch

from .formats import INT8, Format


def nearest_(q: torch.Tensor, form: Format) -> torch.Tensor:
    """Numbers in units of the scale, rounded in place to those of a format."""
    q.clamp_(form.low, form.high)
    return q.round_() if form.evenly else q.copy_(q.to(getattr(torch, form.stored)))


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, form: Format = INT8) -> torch.Tensor:
    """x rounded to the numbers of a format times `scale`, in x's dtype; differentiable by both, straight through."""
    q = torch.clamp(x.float() / scale, form.low, form.high)
    if not q.requires_grad:  # the same, in place: attention's weights are half a gigabyte at 512 px
        return nearest_(q, form).mul_(scale).to(x.dtype)
    # q + (round(q) - q) is round(q) exactly: the difference of two floats this close has no rounding error.
    return ((q + (nearest_(q.detach().clone(), form) - q).detach()) * scale).to(x.dtype)


def weight_scale(weight: torch.Tensor, form: Format = INT8, block: int = 0) -> torch.Tensor:
    """max|w| / high per output channel, [out], or per block of inputs too, [out, in / block]; 1 where all are zero."""
    groups = weight.unflatten(1, (-1, block)) if block else weight.flatten(1)
    peak = groups.detach().abs().amax(-1).float()
    return torch.where(peak > 0, peak / form.high, torch.ones_like(peak))


def along(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A weight's scales, shaped to multiply the weight [out, in, ...]."""
    if scale.dim() == 2:
        return scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    return scale.view(-1, *[1] * (weight.dim() - 1))


def quantized(weight: torch.Tensor, scale: torch.Tensor, form: Format) -> torch.Tensor:
    """A weight [out, in, ...] as it is stored: a linear one transposed, [in, out], and int4 in pairs, [in, out / 2]."""
    q = nearest_(weight.float() / along(scale.float(), weight), form)
    q = q.T if q.dim() == 2 else q
    if form.bits == 8:
        return q.to(getattr(torch, form.stored)).contiguous()
    pairs = (q.to(torch.int16) & 15).to(torch.uint8)
    return (pairs[:, ::2] | pairs[:, 1::2] << 4).contiguous()


def unpacked(stored: torch.Tensor, form: Format) -> torch.Tensor:
    """Stored numbers in float32, in the layout that they are stored in."""
    if form.bits == 8:
        return stored.float()
    pairs = torch.stack([stored & 15, stored >> 4], -1).flatten(-2).to(torch.int8)
    return ((pairs ^ 8) - 8).float()
