"""Shift, group norm (arXiv 1803.08494) and SiLU in one: what stands between the convolutions of every UNet and VAE.

    h = x + shift
    y = silu((h - mean_g(h)) / sqrt(var_g(h) + eps) * weight + bias)        silu(z) = z * sigmoid(z)

Means and variances are over the pixels and the C / groups channels of a group of one image; `shift` is the time
embedding of a residual block (and may take the bias of the convolution before it).

Shapes: x [n, C, h, w], shift [n, C], weight and bias [C]; float16, bfloat16, float32. In channels-last memory format;
another one is converted, and back.
Roofline: two passes over memory, 3 |x| elements (2 read, 1 written) where x is larger than the L2 cache, else 2 |x|;
about 15 operations for each: bound by memory. Eager torch moves 7 |x|: norm, activation and shift each on their own.
Contract: statistics in float32 as E[h^2] - E[h]^2, clamped at 0: good to |mean| / std of about 100. Rounded once. No
atomics: the same bits each time. The backward keeps x and two numbers for each group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ._triton import jit, tl, triton

TILE = 4096  # elements of one program
MOST_CHANNELS = 256  # of one tile

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Outputs:
    """The same in plain torch: y, and mean and 1 / std [n, groups] of every group, float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) if shift is None else x.to(wide) + shift.to(wide)[:, :, None, None]
    with torch.autocast(x.device.type, enabled=False):
        y = F.group_norm(h, groups, weight.to(wide), bias.to(wide), eps)
    variance, mean = torch.var_mean(h.reshape(len(h), groups, -1), dim=-1, correction=0)
    return _like((F.silu(y) if silu else y).to(x.dtype), x), mean, (variance + eps).rsqrt()


def reference_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """d loss / d (x, weight, bias, shift), from d loss / d y; the last one is [n, C] in any case."""
    n, c = x.shape[:2]
    each = c // mean.shape[1]
    wide = mean.dtype
    h = x.to(wide) if shift is None else x.to(wide) + shift.to(wide)[:, :, None, None]
    m, r = (value.repeat_interleave(each, 1)[:, :, None, None] for value in (mean, rstd))
    w = weight.to(wide)[None, :, None, None]
    xhat = (h - m) * r
    d = grad.to(wide)
    if silu:
        z = xhat * w + bias.to(wide)[None, :, None, None]
        s = torch.sigmoid(z)
        d = d * s * (1 + z * (1 - s))
    sums, products = d.sum((2, 3)), (d * xhat).sum((2, 3))
    a, b = _group_means(sums * weight.to(wide), products * weight.to(wide), each, x[0, 0].numel())
    dx = r * (d * w - a[:, :, None, None] - xhat * b[:, :, None, None])
    return (
        _like(dx.to(x.dtype), x),
        products.sum(0).to(weight.dtype),
        sums.sum(0).to(bias.dtype),
        dx.sum((2, 3)).to(x.dtype),
    )


def _group_means(sums: torch.Tensor, products: torch.Tensor, each: int, pixels: int) -> list[torch.Tensor]:
    """Means over the groups of sums [n, C] over the pixels, for every channel [n, C]."""
    grouped = [value.unflatten(1, (-1, each)).sum(2) / (each * pixels) for value in (sums, products)]
    return [value.repeat_interleave(each, 1) for value in grouped]


def _like(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y in the memory format of x."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@jit
def _sums(x, shift, partial, pixels, channels, SHIFT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partial[n, tile, 0 or 1, c]: sums of h and h^2 over the rows of a tile."""
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < pixels)[:, None] & (column < channels)[None, :]
    h = tl.load(x + n * pixels * channels + row[:, None] * channels + column[None, :], mask=inside, other=0.0)
    h = h.to(tl.float32)
    if SHIFT:
        h += tl.load(shift + n * channels + column).to(tl.float32)[None, :]
        h = tl.where(inside, h, 0.0)
    place = partial + (n * tl.num_programs(1) + tile) * 2 * channels + column
    tl.store(place, tl.sum(h, 0))
    tl.store(place + channels, tl.sum(h * h, 0))


@jit
def _statistics(partial, mean, rstd, tiles, pixels, channels, groups, eps, EACH: tl.constexpr):
    """mean and 1 / std of a group, from the partial sums of its channels."""
    n, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each = channels // groups
    column = tl.arange(0, EACH)
    first, second = tl.zeros([EACH], tl.float32), tl.zeros([EACH], tl.float32)
    for tile in range(tiles):
        place = partial + (n * tiles + tile) * 2 * channels + g * each + column
        first += tl.load(place, mask=column < each, other=0.0)
        second += tl.load(place + channels, mask=column < each, other=0.0)
    count = (each * pixels).to(tl.float32)
    m = tl.sum(first, 0) / count
    variance = tl.maximum(tl.sum(second, 0) / count - m * m, 0.0)
    tl.store(mean + n * groups + g, m)
    tl.store(rstd + n * groups + g, 1.0 / tl.sqrt(variance + eps))


@jit
def _apply(
    x,
    shift,
    weight,
    bias,
    mean,
    rstd,
    y,
    pixels,
    channels,
    groups,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < pixels)[:, None] & (column < channels)[None, :]
    place = n * pixels * channels + row[:, None] * channels + column[None, :]
    g = n * groups + column // (channels // groups)
    m = tl.load(mean + g)
    scale = tl.load(rstd + g) * tl.load(weight + column).to(tl.float32)
    if SHIFT:
        m -= tl.load(shift + n * channels + column).to(tl.float32)
    offset = tl.load(bias + column).to(tl.float32) - m * scale
    z = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y + place, z.to(y.dtype.element_ty), mask=inside)


@jit
def _sums_backward(
    grad,
    x,
    shift,
    weight,
    bias,
    mean,
    rstd,
    partial,
    pixels,
    channels,
    groups,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial[n, tile, 0 to 2, c]: sums of d, d * xhat and xhat over the rows of a tile; d is d loss / d z."""
    n, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < pixels)[:, None] & (column < channels)[None, :]
    place = n * pixels * channels + row[:, None] * channels + column[None, :]
    g = n * groups + column // (channels // groups)
    m, r = tl.load(mean + g), tl.load(rstd + g)
    if SHIFT:
        m -= tl.load(shift + n * channels + column).to(tl.float32)
    xhat = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
    xhat = tl.where(inside, xhat, 0.0)
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = xhat * tl.load(weight + column).to(tl.float32)[None, :] + tl.load(bias + column).to(tl.float32)[None, :]
        s = 1.0 / (1.0 + tl.exp(-z))
        d *= s * (1.0 + z * (1.0 - s))
    to = partial + (n * tl.num_programs(1) + tile) * 3 * channels + column
    tl.store(to, tl.sum(d, 0))
    tl.store(to + channels, tl.sum(d * xhat, 0))
    tl.store(to + 2 * channels, tl.sum(xhat, 0))


@jit
def _apply_backward(
    grad,
    x,
    shift,
    weight,
    bias,
    mean,
    rstd,
    a,
    b,
    dx,
    pixels,
    channels,
    groups,
    SHIFT: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx = rstd * (weight * d - a - xhat * b), with the group means a, b [n, C]."""
    n = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < pixels)[:, None] & (column < channels)[None, :]
    place = n * pixels * channels + row[:, None] * channels + column[None, :]
    g = n * groups + column // (channels // groups)
    m, r = tl.load(mean + g), tl.load(rstd + g)
    if SHIFT:
        m -= tl.load(shift + n * channels + column).to(tl.float32)
    w = tl.load(weight + column).to(tl.float32)
    xhat = (tl.load(x + place, mask=inside, other=0.0).to(tl.float32) - m[None, :]) * r[None, :]
    d = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        z = xhat * w[None, :] + tl.load(bias + column).to(tl.float32)[None, :]
        s = 1.0 / (1.0 + tl.exp(-z))
        d *= s * (1.0 + z * (1.0 - s))
    first, second = tl.load(a + n * channels + column), tl.load(b + n * channels + column)
    made = r[None, :] * (d * w[None, :] - first[None, :] - xhat * second[None, :])
    tl.store(dx + place, made.to(dx.dtype.element_ty), mask=inside)


def tile_of(channels: int) -> tuple[int, int]:
    """(rows, columns) of a tile: columns are the largest power of two that divides the channels."""
    columns = min(channels & -channels, MOST_CHANNELS)
    return max(1, TILE // columns), columns


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Outputs:
    """The kernels, on a GPU or in Triton's interpreter: three launches."""
    own, x = x, x.contiguous(memory_format=torch.channels_last)
    shift = None if shift is None else shift.contiguous()
    n, channels, pixels = x.shape[0], x.shape[1], x[0, 0].numel()
    rows, columns = tile_of(channels)
    grid = (n, triton.cdiv(pixels, rows), channels // columns)
    size = dict(ROWS=rows, COLUMNS=columns, SHIFT=shift is not None)
    partial = x.new_empty(n, grid[1], 2, channels, dtype=torch.float32)
    mean, rstd = (x.new_empty(n, groups, dtype=torch.float32) for _ in range(2))
    y = torch.empty_like(x)
    _sums[grid](x, shift, partial, pixels, channels, **size)
    each = triton.next_power_of_2(channels // groups)
    _statistics[(n, groups)](partial, mean, rstd, grid[1], pixels, channels, groups, eps, EACH=each)
    _apply[grid](x, shift, weight, bias, mean, rstd, y, pixels, channels, groups, SILU=silu, **size)
    return _like(y, own), mean, rstd


def launch_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    own = x
    grad, x = (value.contiguous(memory_format=torch.channels_last) for value in (grad, x))
    shift = None if shift is None else shift.contiguous()
    n, channels, pixels, groups = x.shape[0], x.shape[1], x[0, 0].numel(), mean.shape[1]
    rows, columns = tile_of(channels)
    grid = (n, triton.cdiv(pixels, rows), channels // columns)
    size = dict(ROWS=rows, COLUMNS=columns, SHIFT=shift is not None, SILU=silu)
    given = (grad, x, shift, weight, bias, mean, rstd)
    partial = x.new_empty(n, grid[1], 3, channels, dtype=torch.float32)
    _sums_backward[grid](*given, partial, pixels, channels, groups, **size)
    sums, products, normalized = partial.sum(1).unbind(1)
    w, each = weight.float(), channels // groups
    a, b = _group_means(sums * w, products * w, each, pixels)
    dx = torch.empty_like(x)
    _apply_backward[grid](*given, a.contiguous(), b.contiguous(), dx, pixels, channels, groups, **size)
    r = rstd.repeat_interleave(each, 1)
    dshift = r * (sums * w - pixels * a - normalized * b)
    made = products.sum(0).to(weight.dtype), sums.sum(0).to(bias.dtype), dshift.to(x.dtype)
    return _like(dx, own), *made


def _fake(x, weight, bias, shift, groups, eps, silu):
    wide = torch.promote_types(x.dtype, torch.float32)
    return _like(torch.empty_like(x), x), *(x.new_empty(x.shape[0], groups, dtype=wide) for _ in range(2))


def _fake_backward(grad, x, weight, bias, shift, mean, rstd, silu):
    return (
        _like(torch.empty_like(x), x),
        weight.new_empty(weight.shape),
        bias.new_empty(bias.shape),
        x.new_empty(x.shape[:2]),
    )


def _setup(ctx, inputs, output):
    x, weight, bias, shift, _, _, silu = inputs
    ctx.save_for_backward(x, weight, bias, shift, *output[1:])
    ctx.silu, ctx.shifted = silu, shift is not None
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad, *_):
    dx, dweight, dbias, dshift = _backward_op(grad, *ctx.saved_tensors, ctx.silu)
    return dx, dweight, dbias, dshift if ctx.shifted else None, None, None, None


_op = torch.library.custom_op("accel::group_norm_silu", launch, mutates_args=(), device_types="cuda")
_op.register_kernel("cpu")(reference)
_op.register_fake(_fake)
_backward_op = torch.library.custom_op(
    "accel::group_norm_silu_backward", launch_backward, mutates_args=(), device_types="cuda"
)
_backward_op.register_kernel("cpu")(reference_backward)
_backward_op.register_fake(_fake_backward)
_op.register_autograd(_differentiate, setup_context=_setup)


def group_norm_silu(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    shift: torch.Tensor | None = None,
    silu: bool = True,
) -> torch.Tensor:
    """silu(group_norm(x + shift)).

    Args:
        x: [n, C, h, w], best in channels-last memory format.
        weight, bias: [C].
        groups: of the channels.
        eps: added to the variance.
        shift: [n, C], added to x first; such as the time embedding of a residual block.
        silu: apply the activation.

    Returns:
        A tensor like x.

    Raises:
        ValueError: for shapes that do not fit each other.
    """
    if x.ndim != 4 or x.shape[1] % groups or weight.shape != x.shape[1:2] or bias.shape != x.shape[1:2]:
        shapes = [tuple(value.shape) for value in (x, weight, bias)]
        raise ValueError(f"group_norm_silu takes x [n, C, h, w], weight and bias [C] of {groups} groups, not {shapes}")
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(f"group_norm_silu takes a shift {tuple(x.shape[:2])}, not {tuple(shift.shape)}")
    return _op(x, weight, bias, shift, groups, eps, silu)[0]
