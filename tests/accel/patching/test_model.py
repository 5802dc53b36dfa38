"""`accel.patch`: the same image, the same gradients and weights, and nothing left afterwards."""

from __future__ import annotations

import diffusers
import pytest
import torch

import accel
from accel.errors import UserError


@pytest.fixture
def unet(sd15):
    return diffusers.UNet2DConditionModel.from_pretrained(sd15 / "unet").eval()


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(2, 4, 16, 16), torch.tensor(7), torch.randn(2, 5, 32)


@torch.no_grad()
def test_a_unet_gives_the_same_and_afterwards_the_same_bits(unet, inputs):
    before, names = unet(*inputs)[0], list(unet.state_dict())
    with accel.patch(unet) as patched:
        assert patched.layers["ResnetBlock2D"] == 22 and patched.layers["GEGLU"] == 16
        assert torch.allclose(unet(*inputs)[0], before, atol=1e-5) and list(unet.state_dict()) == names
        assert "22 ResnetBlock2D" in repr(patched)
        with pytest.raises(UserError, match="no layer that a kernel could take over"):
            accel.patch(unet)
    assert torch.equal(unet(*inputs)[0], before) and "undone" in repr(patched)


@torch.no_grad()
def test_the_unet_of_sdxl_and_a_vae(sdxl):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipeline.set_progress_bar_config(disable=True)

    def draw():
        return pipeline("the cat", num_inference_steps=2, generator=torch.manual_seed(0), output_type="pt").images

    before = draw()
    patched = accel.patch(pipeline)
    kinds = {type(layer).__name__ for part in (pipeline.unet, pipeline.vae) for layer in part.modules()}
    assert {"FusedResnetBlock2D", "FusedGEGLU", "NormAndActivation"} <= kinds and "ResnetBlock2D" not in kinds
    assert (draw() - before).abs().max() < 1 / 255
    patched.undo()
    assert torch.equal(draw(), before)


def test_training_has_the_same_gradients_also_under_autocast(unet, inputs):
    def gradients(dtype):
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            unet(*inputs)[0].float().square().mean().backward()
        return {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}

    exact, half = gradients("fp32"), gradients("bf16")
    with accel.patch(unet):
        ours, ours_half = gradients("fp32"), gradients("bf16")
    assert exact.keys() == ours.keys() == ours_half.keys()
    for name, value in exact.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name

    def error(made):
        return sum((made[name] - value).norm() / (value.norm() + 1e-6) for name, value in exact.items())

    assert error(ours_half) < 1.5 * error(half)


@torch.no_grad()
def test_it_compiles_as_one_graph(unet, inputs):
    before = unet(*inputs)[0]
    with accel.patch(unet):
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(*inputs)[0], before, atol=1e-5)


@pytest.mark.parametrize(("linear", "dtype"), [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
@torch.no_grad()
def test_linear_layers_in_eight_bits(unet, inputs, linear, dtype):
    before, names = unet(*inputs)[0], list(unet.state_dict())
    with accel.patch(unet, linear=linear) as patched:
        after = unet(*inputs)[0]
        layer = next(one for one in unet.modules() if type(one).__name__ == "W8A8Linear")
        assert patched.layers["Linear"] > 100 and list(unet.state_dict()) == names
        stored = layer.weight_in_8_bits
        assert stored.dtype == {torch.int8: torch.int8, torch.float8_e4m3fn: torch.uint8}[dtype]
        assert 1e-5 < (after - before).norm() / before.norm() < 0.1
        x = torch.randn(2, 5, layer.in_features)
        assert torch.allclose(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), atol=1e-5)
        with torch.enable_grad(), pytest.raises(ValueError, match="trains no weights"):
            unet(*inputs)
        unet.half().float()  # scales are as exact as before
        assert (unet(*inputs)[0] - after).norm() < 0.02 * after.norm()
    assert "weight_in_8_bits" not in dict(layer.named_buffers()) and type(layer) is torch.nn.Linear


def test_an_unknown_precision_of_linear_layers_is_refused(unet, monkeypatch):
    with pytest.raises(UserError, match="unknown linear 'int4'"):
        accel.patch(unet, linear="int4")
    with pytest.raises(UserError, match="no linear layer"):
        accel.patch(torch.nn.Sequential(torch.nn.Linear(2, 2)), linear="int8")


def test_an_activation_that_others_share_stays(unet):
    unet.conv_act = unet.down_blocks[0].resnets[0].nonlinearity
    with accel.patch(unet) as patched:
        assert "GroupNorm" not in patched.layers and type(unet.conv_act) is torch.nn.SiLU


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(UserError, match="Linear has no layer"):
        accel.patch(torch.nn.Linear(2, 2))
