"""Which layers are quantized, what fake quantisation computes, and that it goes in and out without a trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accel.errors import UserError
from accel.int8 import fake_quant, packed
from accel.int8.config import LEVELS, Int8Config, chosen
from accel.models.topology import narrowed


@pytest.fixture(scope="module")
def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        **narrowed(
            "sd15-tiny", (8, 16, 32), sample_size=16, cross_attention_dim=32, norm_num_groups=4, attention_head_dim=4
        )
    ).eval()


@pytest.fixture
def feeds():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 16, 16, generator=generator),
        torch.tensor(499.0),
        torch.randn(2, 7, 32, generator=generator),
    )


def quantized(model: nn.Module, feeds: tuple, config: Int8Config | None = None, **options) -> nn.Module:
    """A copy of the model, fake-quantized with the largest magnitudes of one call."""
    model = copy.deepcopy(model)
    fake_quant.attach(model, config or Int8Config(), **options)
    for _, quantizer in fake_quant.ranges(model):
        quantizer.observer = lambda x, q=quantizer: q.set_scale(x.abs().max() / 127)
    fake_quant.set_mode(model, "observe")
    with torch.no_grad():
        model(*feeds)
    fake_quant.set_mode(model, "quantize")
    return model


# ------------------------------------------------------------------------------------------------------------- configs


def test_levels_only_add(unet):
    layers = fake_quant.layers_of(unet)
    sets = [set(chosen(Int8Config(level=level), layers)) for level in LEVELS]
    assert all(low < high for low, high in zip(sets[:-1], sets[1:], strict=True))
    assert all(layers[name] for name in sets[0])
    assert any(".ff.net." in name for name in sets[1]) and not any("to_q" in name for name in sets[1])
    assert any(name.endswith("attn2.to_v") for name in sets[2]) and not any("to_out" in name for name in sets[2])


def test_what_stays_higher_by_default(unet):
    names = chosen(Int8Config(), fake_quant.layers_of(unet))
    for part in ("time_embedding", "time_emb_proj", "conv_in", "conv_out", "conv_shortcut"):
        assert any(part in name.split(".") for name in fake_quant.layers_of(unet))
        assert not any(part in name.split(".") for name in names)


def test_keep_takes_names_beginnings_and_patterns(unet):
    layers = fake_quant.layers_of(unet)
    names = chosen(Int8Config(keep=("down_blocks.0", "up_blocks.*.ff.net.2")), layers)
    assert names and not any(name.startswith("down_blocks.0.") for name in names)
    assert not any(name.startswith("up_blocks") and name.endswith("ff.net.2") for name in names)
    assert any(name.startswith("up_blocks") and "ff.net.0" in name for name in names)


def test_a_config_that_names_no_layer_lists_the_names(unet):
    layers = fake_quant.layers_of(unet)
    with pytest.raises(UserError, match="no layer is called 'up_block'.*\n.*conv_in"):
        chosen(Int8Config(keep=("up_block",)), layers)
    with pytest.raises(UserError, match="quantizes no layer.*conv_in"):
        chosen(Int8Config(keep=("*",)), layers)
    with pytest.raises(UserError, match="unknown int8 level 'convs'\n.*conv, ff, qkv, all, scores, attention"):
        Int8Config(level="convs")
    for wrong in (dict(observer="mean"), dict(percentile=0.0), dict(smooth=2.0)):
        with pytest.raises(UserError):
            Int8Config(**wrong)


def test_a_config_survives_json():
    config = Int8Config(level="ff", keep=("a", "b"), smooth=0.5)
    assert Int8Config.from_dict(config.as_dict()) == config


# ---------------------------------------------------------------------------------------------------------- arithmetic


def test_fake_quantize_is_quantize_then_dequantize_of_onnx():
    x, scale = torch.tensor([-20.0, -1.25, -0.25, 0.0, 0.25, 0.75, 1.3, 20.0]), torch.tensor(0.5)
    # Ties go to the even neighbour: -2.5 -> -2, -0.5 and 0.5 -> 0, 1.5 -> 2.
    tenths = [-12.8, -1.2, -0.2, 0, 0.2, 0.8, 1.3, 12.7]
    assert fake_quant.fake_quantize(x, torch.tensor(0.1)).tolist() == pytest.approx(tenths)
    assert fake_quant.fake_quantize(x, scale).tolist() == [-20, -1, 0, 0, 0, 1, 1.5, 20]
    random = torch.randn(10_000)
    expected = torch.fake_quantize_per_tensor_affine(random, 0.0078125, 0, -128, 127)  # a power of two: no ties differ
    assert torch.equal(fake_quant.fake_quantize(random, torch.tensor(0.0078125)), expected)


def test_gradients_go_straight_through_inside_the_range_and_stop_outside():
    x = torch.tensor([-30.0, -0.4, 0.33, 30.0], requires_grad=True)
    fake_quant.fake_quantize(x, torch.tensor(0.1)).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_the_learned_scale_has_the_gradient_of_lsq():
    """Esser et al. 2019, equation 3: round(v) - v inside, the bound outside, v = x / s."""
    x, scale = torch.tensor([-30.0, -0.42, 0.33, 30.0]), torch.tensor(0.1, requires_grad=True)
    fake_quant.fake_quantize(x, scale).sum().backward()
    inside = sum(round(v) - v for v in (-4.2, 3.3))
    assert scale.grad.item() == pytest.approx(inside - 128 + 127, abs=1e-4)


def test_a_channel_of_zeros_has_a_scale():
    weight = torch.zeros(2, 3, 1, 1)
    weight[1] = 2
    assert fake_quant.weight_scale(weight).tolist() == pytest.approx([1, 2 / 127])


# --------------------------------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("level", ["all", "attention"])
def test_attached_and_disabled_changes_nothing_and_detached_nothing_is_left(unet, feeds, level):
    with torch.no_grad():
        plain = unet(*feeds, return_dict=False)[0]
    model = copy.deepcopy(unet)
    keys, classes = list(model.state_dict()), [type(part) for part in model.modules()]
    names = fake_quant.attach(model, Int8Config(level=level))
    assert len(names) == sum(1 for _ in fake_quant.fake_layers(model)) > 50
    with torch.no_grad():
        assert torch.equal(model(*feeds, return_dict=False)[0], plain)
    fake_quant.set_mode(model, "quantize")
    with torch.no_grad():
        assert not torch.equal(model(*feeds, return_dict=False)[0], plain)
    found = fake_quant.detach(model)
    assert {name.rpartition(".")[0] for name in found} == set(names)
    assert list(model.state_dict()) == keys and [type(part) for part in model.modules()] == classes
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(unet.modules(), model.modules(), strict=True))
    with torch.no_grad():
        assert torch.equal(model(*feeds, return_dict=False)[0], plain)


@pytest.mark.parametrize("level", ["all", "attention"])
def test_every_parameter_gets_a_gradient(unet, feeds, level):
    model = quantized(unet, feeds, Int8Config(level=level), learned=True).requires_grad_(True)
    model(*feeds, return_dict=False)[0].square().mean().backward()
    without = [n for n, value in model.named_parameters() if value.grad is None or not value.grad.isfinite().all()]
    assert without == []
    learned = [name for name, _ in model.named_parameters() if name.endswith("_range.log_scale")]
    assert len(learned) == sum(1 for _ in fake_quant.ranges(model)) > 130
    assert len(list(model.parameters())) - len(learned) == 358  # SD-Tiny's, narrow


@pytest.mark.parametrize("smooth", [0.0, 0.5])
def test_packed_layers_equal_fake_quantized_ones(smooth):
    """But for the last bit: some processors fuse a bias into the product, which one of them adds after it."""
    close = dict(rtol=0, atol=1e-6)  # a step is 0.02
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(6, 5, 3, stride=2, padding=1),
            "ff": nn.Linear(7, 4),
            "attn2": nn.ModuleDict({"to_k": nn.Linear(7, 4, bias=False)}),
        }
    )
    fake_quant.attach(model, Int8Config(smooth=smooth))
    inputs = {"conv": torch.randn(2, 6, 9, 8), "ff": torch.randn(2, 5, 7), "attn2.to_k": torch.randn(2, 154, 7)}
    for name, quantizer in fake_quant.ranges(model):
        quantizer.set_scale(0.02 if name.endswith("input") else 0.03)
    if smooth:
        model["ff"].smooth = torch.rand(7) + 0.5
    fake_quant.set_mode(model, "quantize")
    with torch.no_grad():
        expected = {name: model.get_submodule(name)(x) for name, x in inputs.items()}
    layers = fake_quant.traits(model)
    assert layers["conv"] == ["output"] and layers["attn2.to_k"] == ["bos"]
    state, own = None, copy.deepcopy(model)
    packed.pack(own)
    packed.set_outputs(own, True)
    state = own.state_dict()
    assert all(state[f"{name}.weight"].dtype == torch.int8 for name in inputs)
    for name, x in inputs.items():
        torch.testing.assert_close(own.get_submodule(name)(x), expected[name], **close)
    # The way back from a file: placed empty in a plain model, then loaded.
    again = nn.ModuleDict(
        {
            "conv": nn.Conv2d(6, 5, 3, stride=2, padding=1),
            "ff": nn.Linear(7, 4),
            "attn2": nn.ModuleDict({"to_k": nn.Linear(7, 4, bias=False)}),
        }
    )
    packed.place(again, layers)
    again.load_state_dict(state)
    packed.set_outputs(again, True)
    for name, x in inputs.items():
        torch.testing.assert_close(again.get_submodule(name)(x), expected[name], **close)


def test_what_float16_rounds_to_nothing_is_no_division_by_zero():
    model = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 1), "ff": nn.Linear(4, 3)}).requires_grad_(False)
    for layer in model.values():
        layer.weight.mul_(1e-9)
    fake_quant.attach(model, Int8Config())
    for _, quantizer in fake_quant.ranges(model):
        quantizer.set_scale(1e-9)
    packed.pack(model, torch.float16)
    packed.set_outputs(model, True)
    assert all((value > 0).all() for name, value in model.state_dict().items() if name.endswith("_scale"))
    x = torch.tensor([0, 1e-7, 6e-8, 0], dtype=torch.float16)
    assert model["ff"](x).isfinite().all() and model["conv"](x.view(1, 2, 2, 1)).isfinite().all()


@pytest.mark.parametrize("tokens", [6, 77, 3 * 77])
def test_begin_of_text_tokens_are_not_rounded(tokens):
    """One at the beginning, and one at that of each further text of a longer context."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn2": nn.ModuleDict({"to_v": nn.Linear(16, 16)})})
    x = torch.randn(2, tokens, 16)
    first = torch.arange(tokens) % 77 == 0
    x[:, first] *= 80  # MixDQ, section 3: 828 against 10 to 15
    exact = model["attn2"]["to_v"](x)

    def error(apart: bool) -> float:
        own = copy.deepcopy(model)
        fake_quant.attach(own, Int8Config(exclude_bos=apart))
        layer = own["attn2"]["to_v"]
        layer.input_range.set_scale((x[:, ~first] if apart else x).abs().max() / 127)
        fake_quant.set_mode(own, "quantize")
        said = layer(x)
        if apart:
            weight = fake_quant.fake_quantize(layer.weight, fake_quant.weight_scale(layer.weight)[:, None])
            torch.testing.assert_close(said[:, first], F.linear(x[:, first], weight, layer.bias))
        return (said - exact)[:, ~first].norm().item() / exact[:, ~first].norm().item()

    assert error(apart=True) < 0.02 < 0.2 < error(apart=False)


def test_observed_ranges_follow_in_training_and_rest_in_evaluation():
    layer = nn.ModuleDict({"ff": nn.Linear(4, 4)})
    fake_quant.attach(layer, Int8Config())
    fake_quant.set_mode(layer, "quantize")
    quantizer = layer["ff"].input_range
    quantizer.set_scale(1.0)
    layer.eval()
    layer["ff"](torch.ones(1, 4))
    assert quantizer.scale.item() == pytest.approx(1)
    layer.train()
    for _ in range(1000):
        layer["ff"](torch.ones(1, 4))
    assert quantizer.scale.item() == pytest.approx(1 / 127, rel=1e-3)
    assert [name for name, _ in layer.named_parameters()] == ["ff.weight", "ff.bias"]


def test_scales_come_back(unet, feeds):
    model = quantized(unet, feeds)
    again = copy.deepcopy(unet)
    fake_quant.attach(again, Int8Config())
    fake_quant.set_scales(again, fake_quant.scales(model))
    fake_quant.set_mode(again, "quantize")
    with torch.no_grad():
        torch.testing.assert_close(again(*feeds)[0], model(*feeds)[0])


# -------------------------------------------------------------------------------------------------------- other formats


@pytest.mark.parametrize("form", ["fp8", "int8-weight-only", "int4-weight-only"])
def test_a_packed_network_of_any_format_computes_what_the_fake_quantized_one_does(unet, feeds, form):
    config = Int8Config(format=form, block=32)
    model = quantized(unet, feeds, config)
    assert bool(dict(fake_quant.ranges(model))) == (form == "fp8"), "weights alone have no ranges to calibrate"
    with torch.no_grad():
        expected, plain = model(*feeds).sample, unet(*feeds).sample
        layers = fake_quant.traits(model)
        packed.pack(model)
        found = model(*feeds).sample
    assert all(form in own or "int8-weight-only" in own for own in layers.values())
    assert torch.allclose(found, expected, atol=1e-5)
    assert 1e-3 < (found - plain).norm() / plain.norm() < 0.2
    again = copy.deepcopy(unet)
    packed.place(again, layers)
    again.load_state_dict(model.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        assert torch.equal(again(*feeds).sample, found)


def test_fp8_needs_no_begin_of_text_token_and_no_quantized_output(unet):
    model = copy.deepcopy(unet)
    fake_quant.attach(model, Int8Config(format="fp8"))
    assert {trait for own in fake_quant.traits(model).values() for trait in own} == {"fp8"}


def test_options_that_a_format_has_no_use_for_are_refused():
    for wrong in (dict(smooth=0.5), dict(level="attention"), dict(format="fp9"), dict(block=48)):
        with pytest.raises(UserError):
            Int8Config(**{"format": "int4-weight-only"} | wrong)
    assert "format" not in Int8Config().as_dict(), "as int8 was written before"
    config = Int8Config(format="int4-weight-only", block=128)
    assert Int8Config.from_dict(config.as_dict()) == config
