"""GEGLU's gate (arXiv 2002.05202): y = v * gelu(g), where x = [v, g] along the last dimension.

    gelu(g) = g * Phi(g) = g * (1 + erf(g / sqrt(2))) / 2

Shapes: x [..., 2 C] -> y [..., C]; float16, bfloat16, float32. x is made contiguous.
Roofline: one pass over memory, 3 |y| elements (2 read, 1 written), about 20 operations for each: bound by memory.
Eager torch moves 5 |y|: gelu writes what the product reads again.
Contract: computed in float32, rounded once; torch's own rounds twice. The backward recomputes gelu and keeps x alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ._triton import jit, tl, triton

BLOCK = 1024
_SQRT_HALF = math.sqrt(0.5)
_DENSITY = 1 / math.sqrt(2 * math.pi)


def reference(x: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    value, gate = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (value * F.gelu(gate)).to(x.dtype)


def reference_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """d loss / d x, from d loss / d y."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad, (value, gate) = grad.to(wide), x.to(wide).chunk(2, dim=-1)
    phi = 0.5 * (1 + torch.erf(gate * _SQRT_HALF))
    slope = phi + gate * torch.exp(-0.5 * gate * gate) * _DENSITY
    return torch.cat([grad * gate * phi, grad * value * slope], dim=-1).to(x.dtype)


@jit
def _forward(x, y, channels, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row, column = at // channels, at % channels
    value = tl.load(x + row * 2 * channels + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + row * 2 * channels + channels + column, mask=inside, other=0.0).to(tl.float32)
    made = value * gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    tl.store(y + at, made.to(y.dtype.element_ty), mask=inside)


@jit
def _backward(grad, x, dx, channels, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row, column = at // channels, at % channels
    place = row * 2 * channels + column
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + place + channels, mask=inside, other=0.0).to(tl.float32)
    phi = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
    slope = phi + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    tl.store(dx + place, (d * gate * phi).to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + place + channels, (d * value * slope).to(dx.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor) -> torch.Tensor:
    """The kernel, on a GPU or in Triton's interpreter."""
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _forward[(triton.cdiv(y.numel(), BLOCK),)](x, y, y.shape[-1], y.numel(), BLOCK=BLOCK)
    return y


def launch_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    _backward[(triton.cdiv(grad.numel(), BLOCK),)](grad, x, dx, grad.shape[-1], grad.numel(), BLOCK=BLOCK)
    return dx


_op = torch.library.custom_op("accel::geglu", launch, mutates_args=(), device_types="cuda")
_op.register_kernel("cpu")(reference)
_op.register_fake(lambda x: x.new_empty(*x.shape[:-1], x.shape[-1] // 2))
_backward_op = torch.library.custom_op("accel::geglu_backward", launch_backward, mutates_args=(), device_types="cuda")
_backward_op.register_kernel("cpu")(reference_backward)
_backward_op.register_fake(lambda grad, x: x.new_empty(x.shape))
_op.register_autograd(
    lambda ctx, grad: _backward_op(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """y = v * gelu(g) for x = [v, g].

    Args:
        x: [..., 2 C].

    Returns:
        [..., C], of x's dtype.

    Raises:
        ValueError: for an odd last dimension.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"geglu takes an even last dimension, not {x.shape[-1]}")
    return _op(x)
