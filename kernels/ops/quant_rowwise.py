"""Rounding to eight bits with one scale for each row, and the linear layer that runs on it (W8A8, arXiv 2208.07339).

    s = max(|row|) / m        m = 127 for int8, 448 for fp8 (E4M3, arXiv 2209.05433)
    q = round(row / s)        to the nearest, ties to even
    y = (q_x q_w^T) * s_x * s_w^T + bias        products summed in int32, or in float32 for fp8

Shapes: x [..., K] of float16, bfloat16, float32 -> q [..., K], s [...] float32. A row of zeros has scale 1.
Roofline: one pass over memory, 2 K bytes read and K written for each row in half precision: bound by memory. Eager
torch moves 17 bytes for each element (abs, max, quotient, rounding, conversion) instead of 3.
Contract: computed in float32. The linear layer's backward is straight-through: d loss / d x = d loss / d y W, with the
rounded W; its weights do not train. `torch._int_mm` takes K and N that are multiples of 8 on a GPU, `torch._scaled_mm`
multiples of 16, on compute capability 8.9 and later.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._triton import jit, tl, triton

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LEAST_ROWS = 32  # `torch._int_mm` takes more than 16 on a GPU

Rounded = tuple[torch.Tensor, torch.Tensor]


def reference(x: torch.Tensor, dtype: torch.dtype) -> Rounded:
    """The same in plain torch."""
    rows = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = rows.abs().amax(-1)
    scale = torch.where(largest > 0, largest / LIMITS[dtype], 1.0)
    scaled = rows / scale[..., None]
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.clamp(-LIMITS[dtype], LIMITS[dtype]).to(dtype), scale.float()


@jit
def _round_int8(x, q, scale, channels, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < channels
    value = tl.load(x + row * channels + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    s = tl.where(largest > 0, largest / 127.0, 1.0)
    # 1.5 * 2^23: what is left of a float32 beside it is rounded to an integer, ties to even.
    rounded = (value / s + 12582912.0) - 12582912.0
    tl.store(q + row * channels + at, rounded.to(tl.int8), mask=inside)
    tl.store(scale + row, s)


@jit
def _round_fp8(x, q, scale, channels, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = at < channels
    value = tl.load(x + row * channels + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    s = tl.where(largest > 0, largest / 448.0, 1.0)
    scaled = value / s
    # To the three bits behind the first, ties to even, as the conversion of a GPU rounds (the interpreter's does not).
    power = (scaled.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    unit = tl.maximum(power, 0.015625) * 1572864.0
    tl.store(q + row * channels + at, ((scaled + unit) - unit).to(tl.float8e4nv), mask=inside)
    tl.store(scale + row, s)


def warps_of(block: int) -> int:
    """Warps of a program: 16 elements for each thread, and at most 16 warps."""
    return max(1, min(16, block // 512))


def launch(x: torch.Tensor, dtype: torch.dtype) -> Rounded:
    """The kernel, on a GPU or in Triton's interpreter."""
    x = x.contiguous()
    q = torch.empty_like(x, dtype=dtype)
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    block = triton.next_power_of_2(x.shape[-1])
    kernel = _round_int8 if dtype == torch.int8 else _round_fp8
    kernel[(scale.numel(),)](x, q, scale, x.shape[-1], BLOCK=block, num_warps=warps_of(block))
    return q, scale


def _fake(x: torch.Tensor, dtype: torch.dtype) -> Rounded:
    return torch.empty_like(x, dtype=dtype).contiguous(), x.new_empty(x.shape[:-1], dtype=torch.float32)


_op = torch.library.custom_op("accel::quant_rowwise", launch, mutates_args=(), device_types="cuda")
_op.register_kernel("cpu")(reference)
_op.register_fake(_fake)


def _product(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    q, scale = _op(rows, weight.dtype)
    if weight.dtype == torch.int8:
        missing = max(0, _LEAST_ROWS - len(q)) if x.is_cuda else 0
        sums = torch._int_mm(F.pad(q, (0, 0, 0, missing)) if missing else q, weight.t())[: len(q)]
        y = sums.float() * scale[:, None] * weight_scale
    else:
        y = torch._scaled_mm(
            q, weight.t(), scale_a=scale[:, None], scale_b=weight_scale[None], out_dtype=torch.bfloat16
        ).float()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype).reshape(*x.shape[:-1], len(weight))


def _product_backward(grad: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    return grad @ (weight.float() * weight_scale[:, None]).to(grad.dtype)


_linear = torch.library.custom_op("accel::w8a8_linear", _product, mutates_args=(), device_types=("cuda", "cpu"))
_linear.register_fake(lambda x, weight, weight_scale, bias: x.new_empty(*x.shape[:-1], weight.shape[0]))


def _setup(ctx, inputs, output) -> None:
    _, weight, scale, bias = inputs
    ctx.save_for_backward(weight, scale)
    ctx.biased = bias is not None


def _differentiate(ctx, grad):
    dbias = grad.flatten(0, -2).sum(0) if ctx.biased else None
    return _product_backward(grad, *ctx.saved_tensors), None, None, dbias


_linear.register_autograd(_differentiate, setup_context=_setup)


def quant_rowwise(x: torch.Tensor, dtype: torch.dtype = torch.int8) -> Rounded:
    """x in eight bits, with one scale for each row; not differentiable.

    Args:
        x: [..., K].
        dtype: torch.int8 or torch.float8_e4m3fn.

    Returns:
        q [..., K] of that dtype, and float32 s [...]: q * s is x, rounded.

    Raises:
        ValueError: for another dtype, or a number.
    """
    if dtype not in LIMITS or not x.ndim:
        names = " or ".join(str(one) for one in LIMITS)
        raise ValueError(f"quant_rowwise takes x [..., K] and {names}, not {tuple(x.shape)} and {dtype}")
    return _op(x, dtype)


def w8a8_linear(
    x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x W^T + bias in eight bits: x is rounded row by row, as the weight was.

    Args:
        x: [..., K].
        weight, weight_scale: [N, K] and [N], from `quant_rowwise`.
        bias: [N].

    Returns:
        [..., N] of x's dtype.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or weight_scale.shape != weight.shape[:1]:
        shapes = [tuple(value.shape) for value in (x, weight, weight_scale)]
        raise ValueError(f"w8a8_linear takes x [..., K], a weight [N, K] and its scales [N], not {shapes}")
    return _linear(x, weight, weight_scale, bias)
