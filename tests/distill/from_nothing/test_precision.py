"""bfloat16 for products, float32 for what is slower in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from accel.distill.from_nothing import precision


def _values(how, dtypes=None):
    """Output and gradients of a convolution, a group norm and an attention, computed as `how` says."""
    generator = torch.Generator().manual_seed(0)
    image, weight = (torch.randn(shape, generator=generator) for shape in ((2, 32, 8, 8), (32, 32, 3, 3)))
    image.requires_grad_(), weight.requires_grad_()
    with precision.products_in(how):
        made = F.conv2d(image, weight, padding=1)
        normed = F.group_norm(made, 4)
        tokens = normed.flatten(2).transpose(1, 2)
        seen = F.scaled_dot_product_attention(tokens, tokens, tokens)
    if dtypes is not None:
        dtypes.extend(value.dtype for value in (made, normed, seen))
    seen.square().mean().backward()
    return [seen.detach().float(), image.grad, weight.grad]


def test_products_are_in_bfloat16_and_what_is_slower_there_is_not():
    dtypes = []
    _values("bf16", dtypes)
    assert dtypes == [torch.bfloat16, torch.float32, torch.float32]


def test_it_rounds_and_computes_the_same():
    for rounded, exact in zip(_values("bf16"), _values("fp32"), strict=True):
        error = (rounded - exact).norm() / exact.norm()
        assert 0 < error < 0.02 and rounded.dtype == torch.float32


@pytest.mark.parametrize("amx", [True, False])
def test_auto_takes_it_where_the_processor_has_tiles_for_it(amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx, "avx512_bf16": True})
    for made, expected in zip(_values("auto"), _values("bf16" if amx else "fp32"), strict=True):
        assert torch.equal(made, expected)


def test_a_function_is_decorated_for_every_call():
    @precision.products_in("bf16")
    def product(value):
        return value @ value

    assert [product(torch.eye(4)).dtype for _ in range(2)] == [torch.bfloat16] * 2
    assert (torch.eye(4) @ torch.eye(4)).dtype == torch.float32
