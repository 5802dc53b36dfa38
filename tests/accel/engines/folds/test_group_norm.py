"""Group normalization is a scale and a shift per channel, as torch's own in float64 has it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from accel.engines.folds import group_norm
from accel.parity import relative_l2

openvino = pytest.importorskip("openvino")


class Normed(nn.Module):
    """A convolution, its norm with SiLU, and a second convolution, as a ResNet block begins."""

    def __init__(self, channels: int = 128, groups: int = 32):
        super().__init__()
        self.before = nn.Conv2d(4, channels, 3, padding=1)
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.after = nn.Conv2d(channels, 4, 3, padding=1)

    def forward(self, x):
        return self.after(nn.functional.silu(self.norm(self.before(x))))


def exported(module: nn.Module, x: torch.Tensor, *, fixed: bool) -> bytes:
    size = torch.export.Dim.AUTO
    shapes = None if fixed else ({0: size, 2: size, 3: size},)
    program = torch.onnx.export(
        module.eval(), (x,), opset_version=20, dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=["x"]
    )
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


def made(channels: int = 128, groups: int = 32) -> Normed:
    torch.manual_seed(0)
    module = Normed(channels, groups)
    with torch.no_grad():
        module.norm.weight.normal_()
        module.norm.bias.normal_()
    return module


def run(model, x):
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(model, "CPU", config)({0: x.numpy()})[0]


@pytest.mark.parametrize("fixed", [True, False])
def test_the_folded_graph_computes_what_torch_computes_in_float64(fixed):
    module, x = made(), torch.randn(2, 4, 12, 20)
    model = openvino.Core().read_model(exported(module, x, fixed=fixed))
    assert group_norm.fold(model) == 1
    for size in [(12, 20)] if fixed else [(12, 20), (7, 5)]:
        x = torch.randn(2, 4, *size)
        expected = made().double()(x.double()).detach().numpy()
        assert relative_l2(run(model, x), expected) < 1e-5


@pytest.mark.parametrize(("mean", "limit"), [(10, 1e-4), (0, 1e-6)])
def test_a_mean_far_from_zero_costs_no_more_than_it_says(mean, limit):
    module, x = made(), torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        module.before.weight /= module.before.weight.std() * 6  # values of about one
        module.before.bias.fill_(mean)
    model = openvino.Core().read_model(exported(module, x, fixed=True))
    group_norm.fold(model)
    assert relative_l2(run(model, x), module.double()(x.double()).detach().numpy()) < limit


def test_what_is_no_group_norm_or_too_small_is_left_alone():
    class Layered(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(128)

        def forward(self, x):
            return self.norm(x.permute(0, 2, 3, 1))

    small = exported(made(64), torch.randn(1, 4, 8, 8), fixed=True)
    layered = exported(Layered(), torch.randn(1, 128, 8, 8), fixed=True)
    for graph in (small, layered):
        assert group_norm.fold(openvino.Core().read_model(graph)) == 0


def test_one_group_and_a_group_of_each_channel_are_the_same_algebra():
    for groups in (1, 128):
        module, x = made(groups=groups), torch.randn(1, 4, 8, 8)
        model = openvino.Core().read_model(exported(module, x, fixed=True))
        assert group_norm.fold(model) == 1
        assert relative_l2(run(model, x), module.double()(x.double()).detach().numpy()) < 1e-5
        assert np.isfinite(run(model, torch.zeros_like(x))).all()  # no variance at all
