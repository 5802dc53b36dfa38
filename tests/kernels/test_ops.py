"""Operations: against float64, in Triton's interpreter, for torch's own machinery, and as programs of real GPUs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from accel import kernels

OPS = ("group_norm_silu", "geglu", "quant_rowwise")


def test_every_operation_is_tried_here():
    assert set(kernels.__all__) == {*OPS, "w8a8_linear"}


def norm_inputs(dtype=torch.float64, shift=True):
    torch.manual_seed(0)
    shapes = [(2, 12, 3, 5), (12,), (12,), (2, 12)]
    made = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    return made if shift else [*made[:3], None]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shift", [True, False])
def test_group_norm_silu_is_its_formula_and_its_gradient_is_right(silu, shift):
    x, weight, bias, s = norm_inputs(shift=shift)

    def op(x, weight, bias, s=None):
        return kernels.group_norm_silu(x, weight, bias, 4, shift=s, silu=silu)

    h = (x if s is None else x + s[:, :, None, None]).reshape(2, 4, -1)
    normal = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    z = normal.reshape(x.shape) * weight[:, None, None] + bias[:, None, None]
    expected = z * torch.sigmoid(z) if silu else z
    given = [value for value in (x, weight, bias, s) if value is not None]
    assert torch.allclose(op(*given), expected, atol=1e-12)
    assert torch.autograd.gradcheck(op, given)


def test_geglu_is_its_formula_and_its_gradient_is_right():
    x = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
    value, gate = x.chunk(2, -1)
    expected = value * gate * (1 + torch.erf(gate / 2**0.5)) / 2
    assert torch.allclose(kernels.geglu(x), expected, atol=1e-12)
    assert torch.autograd.gradcheck(kernels.geglu, (x,))


def test_torch_accepts_what_is_registered(module):
    norm, gate = module("group_norm_silu"), module("geglu")
    x, weight, bias, shift = norm_inputs(torch.float32)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for given in ((x, weight, bias, shift), (last, weight, bias, None)):
        torch.library.opcheck(norm._op, (*given, 4, 1e-5, True))
    torch.library.opcheck(gate._op, (torch.randn(3, 14, requires_grad=True),))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_rows_are_rounded_with_a_scale_each(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 24, dtype=torch.float64) * 10 ** torch.arange(-2, 3)[:, None]
    x[1, 2] = 0
    q, scale = kernels.quant_rowwise(x, dtype)
    limit = {torch.int8: 127, torch.float8_e4m3fn: 448}[dtype]
    assert q.dtype == dtype and scale.shape == x.shape[:-1] and float(q.float().abs().max()) == limit
    assert scale[1, 2] == 1 and not q[1, 2].float().any()
    error = (q.double() * scale.double()[..., None] - x).abs().amax(-1)
    assert (error <= scale * {torch.int8: 0.5, torch.float8_e4m3fn: 16}[dtype] * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("biased", [True, False])
def test_a_linear_layer_in_eight_bits_is_the_product_of_what_was_rounded(dtype, biased):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 7, 64, requires_grad=True), torch.randn(48, 64)
    bias = torch.randn(48) if biased else None
    q, scale = kernels.quant_rowwise(weight, dtype)
    qx, sx = kernels.quant_rowwise(x.detach(), dtype)
    exact = (qx.double() * sx[..., None]) @ (q.double() * scale[:, None]).t() + (0 if bias is None else bias)
    y = kernels.w8a8_linear(x, q, scale, bias)
    assert (y - exact).abs().max() <= (1e-5 if dtype == torch.int8 else 2**-8) * exact.abs().max()
    assert (y - torch.nn.functional.linear(x, weight, bias)).norm() < 0.06 * y.norm()
    y.backward(grad := torch.randn_like(y))
    assert torch.allclose(x.grad, grad @ (q.float() * scale[:, None]), atol=1e-4)


def test_torch_accepts_the_rounding_and_its_product(module):
    op = module("quant_rowwise")
    x, weight = torch.randn(5, 32, requires_grad=True), torch.randn(16, 32)
    for dtype in op.LIMITS:
        q, scale = kernels.quant_rowwise(weight, dtype)
        # torch compares no fp8 tensors
        checks = {} if dtype == torch.int8 else {"test_utils": ("test_autograd_registration", "test_faketensor")}
        torch.library.opcheck(op._op, (weight, dtype), **checks)
        torch.library.opcheck(op._linear, (x, q, scale, None), **checks)
    compiled = torch.compile(kernels.w8a8_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x, q, scale), kernels.w8a8_linear(x, q, scale))


def test_the_memory_format_of_the_input_is_kept():
    x, weight, bias, shift = norm_inputs(torch.float32)
    last = x.contiguous(memory_format=torch.channels_last)
    made = kernels.group_norm_silu(last, weight, bias, 4, shift=shift)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(made, kernels.group_norm_silu(x, weight, bias, 4, shift=shift), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    x, weight, bias, shift = (value.detach().to(dtype) for value in norm_inputs())
    exact = F.silu(F.group_norm(x.double() + shift.double()[:, :, None, None], 4, weight.double(), bias.double()))
    assert torch.equal(kernels.group_norm_silu(x, weight, bias, 4, shift=shift), exact.to(dtype))


@pytest.mark.parametrize(
    "call",
    [
        lambda: kernels.quant_rowwise(torch.ones(2, 3), torch.int16),
        lambda: kernels.w8a8_linear(torch.ones(2, 3), torch.ones(4, 5), torch.ones(4)),
        lambda: kernels.geglu(torch.ones(2, 3)),
        lambda: kernels.group_norm_silu(torch.ones(1, 6, 2), torch.ones(6), torch.ones(6), 2),
        lambda: kernels.group_norm_silu(torch.ones(1, 6, 2, 2), torch.ones(6), torch.ones(6), 4),
        lambda: kernels.group_norm_silu(torch.ones(1, 6, 2, 2), torch.ones(5), torch.ones(6), 2),
        lambda: kernels.group_norm_silu(torch.ones(1, 6, 2, 2), torch.ones(6), torch.ones(6), 2, shift=torch.ones(6)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match="takes"):
        call()


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_are_as_near_to_float64_as_torch_is(figures, op):
    """In Triton's interpreter, on awkward shapes: at most twice torch's own error in the same dtype."""
    rows = [row for row in figures("errors") if row["op"] == op]
    outputs = {"y", "scale"} if op == "quant_rowwise" else {"y", "dx"}
    assert {row["output"] for row in rows} >= outputs and {row["dtype"] for row in rows} == {"float16", "float32"}
    for row in rows:
        floor = {"float16": 1e-3, "float32": 1e-5}[row["dtype"]] * max(row["largest"], 1)
        assert row["ours"] <= 2 * row["torch"] + floor / 2, row


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_compile_for_every_architecture_without_spills(figures, op):
    rows = [row for row in figures("cubins") if row["op"] == op]
    assert {row["sm"] for row in rows} == {80, 86, 89, 90, 120}
    for row in rows:
        assert row["stack"] == row["local"] == 0 and row["registers"] <= 128, row
        assert row["load_bits"] == 128 or row["kernel"] == "_statistics", row  # which reads what was summed: little
