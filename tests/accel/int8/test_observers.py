"""Collected ranges do not depend on how the data come, and each rule is what it says."""

import pytest
import torch
from torch import nn

from accel.errors import UserError
from accel.int8 import fake_quant
from accel.int8.config import OBSERVERS, Int8Config
from accel.int8.observers import BINS, HistogramObserver, histogram, observe


def collected(*batches: torch.Tensor) -> HistogramObserver:
    magnitudes = HistogramObserver("x")
    for batch in batches:
        magnitudes(batch)
    return magnitudes


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("count", [1, 2, 4, 16, 25])
def test_the_scale_depends_on_the_data_alone(observer, count):
    """Not on the number of batches, on repetition, on order: the field's usual observer fails all three."""
    torch.manual_seed(count)
    config = Int8Config(observer=observer)
    batches = [torch.randn(500) * 10 ** torch.randn(()) for _ in range(count)]
    scale = collected(*batches).scale(config)
    assert collected(*batches, *batches).scale(config) == scale
    assert collected(*reversed(batches)).scale(config) == scale
    assert collected(torch.cat(batches)).scale(config) == scale
    assert collected(*(part for batch in batches for part in batch.split(7))).scale(config) == scale


@pytest.mark.parametrize("observer", OBSERVERS)
def test_zeros_count_wherever_they_come(observer):
    x, zeros = torch.arange(1, 101).float(), torch.zeros(100)
    first, last = collected(zeros, zeros, x), collected(x, zeros, zeros)
    assert first.counts.tolist() == last.counts.tolist() and first.counts.sum() == 300
    config = Int8Config(observer=observer, percentile=90.0)
    assert first.scale(config) == last.scale(config)


def test_more_equal_elements_than_float32_can_count():
    count = (1 << 24) + 5
    assert collected(torch.ones(1).expand(count)).counts.sum().item() == count


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 40_000, 300_001])
def test_a_histogram_is_torchs_own(count, dtype):
    x = (torch.randn(count, generator=torch.Generator().manual_seed(count)) * 1.5).to(dtype)
    theirs = torch.histc(x.abs().double(), BINS, 0, 16.0)
    assert torch.equal(histogram(x, 4), theirs)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_scale_follows_the_unit(observer):
    x, config = torch.randn(2000), Int8Config(observer=observer)
    assert collected(x * 8).scale(config) == pytest.approx(8 * collected(x).scale(config), rel=1e-12)
    assert collected(x * 3).scale(config) == pytest.approx(3 * collected(x).scale(config), rel=0.02)


def test_max_is_the_largest_magnitude():
    assert collected(torch.tensor([0.5, -3.0]), torch.tensor([2.0])).scale(Int8Config(observer="max")) * 127 == 3


def test_percentile_covers_its_share():
    x = torch.randn(100_000)
    for percentile in (90.0, 99.0, 99.9):
        edge = collected(x).scale(Int8Config(observer="percentile", percentile=percentile)) * 127
        assert (x.abs() <= edge).double().mean().item() * 100 == pytest.approx(percentile, abs=0.1)
    assert collected(x).scale(Int8Config(observer="percentile", percentile=100.0)) * 127 == x.abs().max().item()


def test_mse_is_the_least_error_of_all_steps():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(50_000), torch.tensor([9.0])])  # one outlier must not cost every other element

    def error(scale: float) -> float:
        return (fake_quant.fake_quantize(x, torch.tensor(scale)) - x).square().mean().item()

    chosen = collected(x).scale(Int8Config(observer="mse"))
    peak = x.abs().max().item() / 127
    assert chosen < 0.9 * peak
    assert error(chosen) <= 1.01 * min(error(peak * share / 100) for share in range(5, 101))


def test_zeros_have_no_scale_and_nan_is_refused_by_name():
    assert collected(torch.zeros(5)).scale(Int8Config()) == 0
    assert collected(torch.zeros(5), torch.ones(1)).scale(Int8Config(observer="max")) * 127 == 1
    with pytest.raises(UserError, match="x is not finite"):
        collected(torch.tensor([1.0, float("nan")]))


def small() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3, padding=1), "ff": nn.Linear(8, 4), "never": nn.Linear(8, 4)})


def test_layers_without_a_range_are_taken_out():
    model, x = small(), torch.randn(2, 8)
    fake_quant.attach(model, Int8Config())

    def run() -> None:
        model["conv"](torch.zeros(1, 3, 4, 4))
        model["ff"](x)

    assert observe([model], Int8Config(observer="max"), run) == [["conv", "never"]]
    assert type(model["conv"]) is nn.Conv2d and type(model["never"]) is nn.Linear
    assert model["ff"].input_range.scale.item() == pytest.approx(x.abs().max().item() / 127)
    assert model["ff"].input_range.mode == "quantize"


def test_smoothquant_moves_outliers_into_the_weights():
    model = small()
    x = torch.randn(64, 8)
    x[:, 3] *= 100
    exact = model["ff"](x)

    def error(smooth: float) -> float:
        own = small()
        config = Int8Config(smooth=smooth, observer="max")
        fake_quant.attach(own, config, names=["ff"])
        observe([own], config, lambda: own["ff"](x))
        return (own["ff"](x) - exact)[:, :].norm().item() / exact.norm().item()

    assert error(0.5) < error(0.0) / 2


@pytest.mark.parametrize("observer", ["max", "percentile", "mse"])
def test_a_range_is_in_the_units_of_its_format(observer):
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
    int8, fp8 = (collected(x).scale(Int8Config(observer=observer, format=form)) for form in ("int8", "fp8"))
    if observer == "mse":  # fp8's steps shrink with the numbers, so it has nothing to gain by cutting the largest
        assert fp8 * 448 > int8 * 127
    else:
        assert fp8 * 448 == pytest.approx(int8 * 127)
