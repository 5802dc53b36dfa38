"""FLOP counts against published totals and hand counts; measured rates against each other."""

import subprocess
import sys
import time

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from accel.bench.roofline import Flops, count_flops, measure_bandwidth, measure_peak, roofline_seconds, weight_bytes
from accel.errors import UserError
from accel.models.topology import TOPOLOGIES


class Attention(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused

    def forward(self, q, k, v):
        if self.fused:
            return nn.functional.scaled_dot_product_attention(q, k, v)
        return ((q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5).softmax(-1) @ v


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DConditionModel(**TOPOLOGIES["sd15"].config).eval()


def test_sd15_unet(unet):
    found = count_flops(unet, (torch.empty(1, 4, 64, 64), torch.empty(1), torch.empty(1, 77, 768)))
    assert found.total == pytest.approx(0.803e12, rel=0.01)
    assert found.attention == pytest.approx(0.126e12, rel=0.01)
    assert found.conv == pytest.approx(0.444e12, rel=0.01)
    assert found.linear == pytest.approx(0.233e12, rel=0.01)
    assert found.other == 0


def test_flops_grow_with_the_batch_and_arguments_may_be_named(unet):
    one = count_flops(unet, (torch.empty(1, 4, 32, 32), 7, torch.empty(1, 77, 768)))
    two = count_flops(
        unet,
        dict(
            sample=torch.empty(2, 4, 32, 32),
            timestep=torch.tensor([7, 7]),
            encoder_hidden_states=torch.empty(2, 77, 768),
        ),
    )
    assert two.conv == 2 * one.conv and two.attention == 2 * one.attention
    # A single number as timestep is embedded for each image all the same.
    assert two.linear == 2 * one.linear


def test_sd_vae_decoder():
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ).eval()
    found = count_flops(vae.decoder, [torch.empty(1, 4, 64, 64)])
    assert found.total == pytest.approx(2.515e12, rel=0.01)
    assert found.attention == 2 * 2 * 4096**2 * 512


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_counted_fused_or_not_wherever_it_lives(device, fused, dtype):
    q = torch.empty(2, 3, 64, 40, device=device, dtype=dtype)
    k = torch.empty(2, 3, 77, 40, device=device, dtype=dtype)
    assert count_flops(Attention(fused), (q, k, k)) == Flops(attention=2 * (2 * 2 * 3 * 64 * 77 * 40))


def test_hand_counts():
    conv = nn.Conv2d(4, 8, 3, padding=1)
    assert count_flops(conv, (torch.empty(2, 4, 16, 16),)) == Flops(conv=2 * 2 * 16 * 16 * 9 * 4 * 8)
    for bias in (True, False):
        linear = nn.Linear(32, 48, bias=bias)
        assert count_flops(linear, (torch.empty(5, 7, 32),)) == Flops(linear=2 * 35 * 32 * 48)
    assert count_flops(nn.GroupNorm(2, 4), (torch.empty(1, 4, 8, 8),)) == Flops()
    parts = dict(conv=1, linear=2, attention=3, other=4)
    assert Flops(**parts).as_dict() == parts | {"total": 10}


def test_a_linear_layer_is_one_whatever_operator_it_ends_in():
    """Without gradients, a strided batch of rows goes through a batched product."""

    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.project = nn.Linear(16, 16)

        def forward(self, x):
            return self.project(x.transpose(1, 2)) @ self.project.weight

    assert count_flops(Strided(), (torch.empty(2, 16, 9),)) == Flops(linear=2 * (2 * 2 * 9 * 16 * 16))


def test_counting_leaves_the_module_and_its_weights_alone():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = count_flops(net, (torch.ones(1, 1, 8, 8),))
    assert found.conv == 2 * 36 * 9 * 2
    after = net.state_dict()
    assert all(after[k].device.type == "cpu" and torch.equal(after[k], v) for k, v in before.items())


def test_shared_weights_are_counted_in_flops_twice_and_in_bytes_once():
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    second.weight = first.weight
    net = nn.Sequential(first, second)
    assert count_flops(net, (torch.empty(1, 8),)).linear == 2 * 2 * 64
    assert weight_bytes(net) == 64 * 4


def test_weight_bytes(unet):
    assert weight_bytes(unet) == 4 * TOPOLOGIES["sd15"].parameters
    assert weight_bytes(nn.BatchNorm1d(4).half()) == 4 * 4 * 2 + 8  # weight, bias, mean, variance, and an int64 counter


def test_roofline_seconds_is_the_slower_of_the_two():
    assert roofline_seconds(1e12, 1e9, peak=1e12, bandwidth=1e10) == 1.0
    assert roofline_seconds(1e9, 1e10, peak=1e12, bandwidth=1e10) == 1.0
    with pytest.raises(UserError, match="peak"):
        roofline_seconds(1, 1, peak=0, bandwidth=1)


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
def test_peak_is_not_below_what_a_plain_product_reaches(dtype):
    peak = measure_peak(dtype, "cpu", seconds=0.3)
    real = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    a = torch.randn(256, 256).to(real)
    a @ a
    start = time.perf_counter()
    a @ a
    rate = 2 * 256**3 / (time.perf_counter() - start)
    # Loose, since the machine may be shared: a wrong unit or a forgotten factor is off by far more.
    assert 1e8 < peak < 1e16 and peak > 0.2 * rate


def test_the_peak_of_int8_is_that_of_exact_products():
    peak = measure_peak("int8", "cpu", seconds=0.3)
    a = torch.randint(-127, 128, (64, 64), dtype=torch.int8)
    assert torch.equal(torch._int_mm(a, a), a.int() @ a.int())  # what it times is a product of int8 in int32
    assert 1e8 < peak < 1e16


def test_bandwidth():
    assert 1e8 < measure_bandwidth("cpu", seconds=0.1, size=2**26) < 1e13


def test_rates_count_the_work_that_was_done(monkeypatch):
    """With a clock that ticks one second per look, the rate is work over ticks."""
    from accel.bench import roofline

    ticks = iter(range(1000))
    monkeypatch.setattr(roofline.time, "perf_counter", lambda: next(ticks))
    assert measure_bandwidth("cpu", seconds=1, size=1000) == 2000  # one call, one tick
    monkeypatch.setattr(roofline, "_CPU_SIZES", (100, 110, 1000))
    assert measure_peak("float32", "cpu", seconds=1) == 2 * 110**3  # one call each, and 1000 would take too long


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: measure_peak("int16"), "dtype"),
        (lambda: measure_peak("float33"), "dtype"),
        (lambda: measure_peak("float32", "tpu"), "tpu"),
        (lambda: measure_peak("float32", "meta"), "meta"),
        (lambda: measure_bandwidth("cpu", size=0), "size"),
    ],
)
def test_wrong_use(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_cuda():
    with pytest.raises(UserError, match="CUDA"):
        measure_peak("float32", "cuda")


@pytest.mark.gpu
def test_cuda_rates():
    assert measure_peak("bfloat16", "cuda", seconds=0.5) > measure_peak("float32", "cuda", seconds=0.5) > 1e11
    assert measure_bandwidth("cuda", seconds=0.2) > 1e10


def test_imports_no_torch():
    code = "import sys, accel.bench.roofline; assert not {'torch', 'diffusers', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from accel.errors import MissingPackage\n"
        "from accel.bench.roofline import measure_peak\n"
        "try: measure_peak()\n"
        "except MissingPackage as error: assert 'torch' in error.message\n"
        "else: raise SystemExit(1)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
