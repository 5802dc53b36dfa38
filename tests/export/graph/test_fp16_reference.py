"""float16 summed in float32 is what torch's own float16 is, in the time that float32 takes."""

import pytest
import torch
import torch.nn.functional as F

from accel.export.graph.fp16_reference import SummedInFloat32

X, W, B = torch.randn(2, 8, 12, 12), torch.randn(16, 8, 3, 3), torch.randn(16)
CALLS = {
    "convolution": (F.conv2d, (X, W, B)),
    "strided convolution without bias": (lambda x, w: F.conv2d(x, w, stride=2, padding=1), (X, W)),
    "linear": (F.linear, (torch.randn(2, 5, 8), torch.randn(16, 8), B)),
    "linear without bias": (F.linear, (torch.randn(2, 5, 8), torch.randn(16, 8))),
    "product": (torch.matmul, (torch.randn(2, 3, 5, 8), torch.randn(2, 3, 8, 5))),
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_the_float64_result_rounded_once(name):
    call, tensors = CALLS[name]
    low = [tensor.half() for tensor in tensors]
    truth = call(*(tensor.double() for tensor in low))
    with torch.no_grad(), SummedInFloat32():
        made = call(*low)
        own = [t.dtype for t in (made, call(*tensors))]
    assert own == [torch.float16, torch.float32]
    ulp = 2.0 ** (torch.frexp(truth)[1].clamp(min=-13) - 11).double()
    assert ((made.double() - truth).abs() <= 0.5 * ulp + 1e-5 * truth.abs().max()).all()
    torchs = call(*low)
    assert ((torchs.double() - truth).abs().max()) <= 4 * ((made.double() - truth).abs().max())


def test_nothing_else_changes():
    x = torch.randn(3, 8).half()
    with SummedInFloat32():
        assert torch.equal(F.silu(x), F.silu(x.clone())) and F.silu(x).dtype == torch.float16
    assert torch.equal(F.group_norm(x, 2), F.group_norm(x, 2))
