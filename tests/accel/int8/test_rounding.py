"""Every format rounds to its nearest number, ties to even, and stores what it rounded to."""

import numpy as np
import pytest
import torch

from accel.int8 import rounding
from accel.int8.formats import FORMATS, FP8, INT4_WEIGHTS, INT8

FORMS = list(FORMATS.values())


def numbers(form) -> torch.Tensor:
    """All numbers of a format, ascending."""
    if form.evenly:
        return torch.arange(form.low, form.high + 1, dtype=torch.float64)
    every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, form.stored)).double()
    return every[every.isfinite()].unique()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_number_is_rounded_to_the_nearest_and_what_is_beyond_to_the_largest(form):
    known, x = numbers(form), torch.linspace(1.3 * form.low, 1.3 * form.high, 40_001, dtype=torch.float64)
    rounded = rounding.nearest_(x.clone(), form)
    least = (x[:, None] - known).abs().amin(1)
    assert torch.equal((rounded - x).abs(), least) and torch.isin(rounded, known).all()
    ties = (known[1:] + known[:-1]) / 2
    up = rounding.nearest_(ties.clone(), form) == known[1:]
    # Neighbours alternate between odd and even, so ties go up and down in turn.
    assert torch.equal(up[1:], ~up[:-1])


def test_fp8_is_onnxs_e4m3fn():
    import ml_dtypes

    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) * 40
    theirs = np.clip(x.numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(rounding.nearest_(x.clone(), FP8).numpy(), theirs)


@pytest.mark.parametrize("shape", [(6, 64), (6, 64, 3, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_stored_weight_is_the_fake_quantized_one_to_the_bit(form, shape):
    block = 32 if form.blocked and len(shape) == 2 else 0
    form = INT8 if form.blocked and not block else form
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale = rounding.weight_scale(weight, form, block)
    fake = rounding.fake_quantize(weight, rounding.along(scale, weight), form)
    stored = rounding.quantized(weight, scale, form)
    assert stored.nbytes == weight.numel() * form.bits // 8
    back = rounding.unpacked(stored, form)
    back = back.T if back.dim() == 2 else back
    assert torch.equal(back * rounding.along(scale, weight), fake)
    largest = rounding.along(scale, weight) * (0.5 if form.evenly else 16)  # half of the widest step, 32 below 448
    assert ((fake - weight).abs() <= largest * 1.001).all()


def test_a_block_of_int4_has_a_scale_of_its_own():
    weight = torch.ones(2, 64)
    weight[0, 32:] = 100.0
    scale = rounding.weight_scale(weight, INT4_WEIGHTS, 32)
    assert torch.allclose(scale * 7, torch.tensor([[1.0, 100.0], [1.0, 1.0]]))
    assert torch.allclose(rounding.fake_quantize(weight, rounding.along(scale, weight), INT4_WEIGHTS), weight)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_gradients_go_straight_through_within_the_range(form):
    x = torch.tensor([0.3, 1.7, 2 * form.high], requires_grad=True)
    y = rounding.fake_quantize(x, torch.tensor(1.0), form)
    assert torch.equal(y.detach(), rounding.fake_quantize(x.detach(), torch.tensor(1.0), form))
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 0.0]
