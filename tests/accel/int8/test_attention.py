"""The products of self-attention in int8: which they are, what they compute, and that they come out again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention

from accel.errors import UserError
from accel.int8 import attention as int8_attention
from accel.int8 import fake_quant, packed
from accel.int8.config import Int8Config, chosen


@pytest.fixture
def attention() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.ModuleDict({"attn1": Attention(query_dim=24, heads=3, dim_head=8)}).eval().requires_grad_(False)


X = torch.randn(2, 10, 24, generator=torch.Generator().manual_seed(1))


def attached(model: torch.nn.Module, config: Int8Config, scale: float = 0.01) -> torch.nn.Module:
    """Everything in int8 with this step; weights too fine to matter."""
    fake_quant.attach(model, config)
    for _, quantizer in fake_quant.ranges(model):
        quantizer.set_scale(scale)
    return model


def test_products_are_those_of_self_attention(attention):
    assert list(int8_attention.products_of(attention)) == ["attn1.scores", "attn1.mix"]
    cross = torch.nn.ModuleDict({"attn2": Attention(query_dim=24, cross_attention_dim=16, heads=3, dim_head=8)})
    assert list(int8_attention.products_of(cross)) == []
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)  # its attention has a norm and a residual inside
    assert any(isinstance(module, Attention) for module in vae.modules())
    assert list(int8_attention.products_of(vae)) == []


def test_the_levels_that_have_them(attention):
    layers = fake_quant.layers_of(attention)
    plain = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
    assert chosen(Int8Config(level="all"), layers) == plain
    assert chosen(Int8Config(level="scores"), layers) == [*plain, "attn1.scores"]
    assert chosen(Int8Config(level="attention"), layers) == [*plain, "attn1.scores", "attn1.mix"]
    assert "attn1.mix" not in chosen(Int8Config(level="attention", keep=("*.mix",)), layers)
    with pytest.raises(UserError, match="no layer is called 'attn2.scores'"):
        chosen(Int8Config(level="attention", keep=("attn2.scores",)), layers)


@pytest.mark.parametrize("level", ["scores", "attention"])
def test_they_are_torchs_attention_with_rounded_sides(attention, level):
    model = attached(copy.deepcopy(attention), Int8Config(level=level))
    fake_quant.set_mode(model, "quantize", ["attn1.scores", "attn1.mix"])
    plain = attention["attn1"].double()
    query, key, value = (
        layer(X.double()).unflatten(-1, (3, -1)).transpose(1, 2) for layer in (plain.to_q, plain.to_k, plain.to_v)
    )

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return (x / 0.01).round().clamp(-128, 127) * 0.01

    weights = (rounded(query / 8**0.5) @ rounded(key).mT).softmax(-1)
    mixed = rounded(weights) @ rounded(value) if level == "attention" else weights @ value
    expected = plain.to_out[0](mixed.transpose(1, 2).flatten(2))
    found = model["attn1"](X).double()
    # A float32 that falls on the other side of a tie is one step away.
    assert ((found - expected).abs() < 1e-5).double().mean() > 0.9
    torch.testing.assert_close(found, expected, atol=0.01, rtol=0)
    assert (found - plain(X.double())).abs().max() > 1e-3


def test_watched_they_change_nothing_but_the_order_of_sums(attention):
    expected = F.scaled_dot_product_attention  # what the plain one calls, which stays what it is
    plain = attention["attn1"](X)
    model = attached(copy.deepcopy(attention), Int8Config(level="attention"))
    assert torch.equal(model["attn1"](X), plain) and F.scaled_dot_product_attention is expected
    seen = {}
    for name, quantizer in fake_quant.ranges(model):
        quantizer.observer = lambda x, name=name: seen.setdefault(name, x)
    fake_quant.set_mode(model, "observe")
    torch.testing.assert_close(model["attn1"](X), plain)
    assert seen["attn1.scores.left"].shape == (2, 3, 10, 8) and seen["attn1.scores.right"].shape == (2, 3, 8, 10)
    torch.testing.assert_close(seen["attn1.mix.left"].sum(-1), torch.ones(2, 3, 10))
    assert seen["attn1.mix.right"].shape == (2, 3, 10, 8)


def test_one_comes_out_and_then_the_other(attention):
    plain = attention["attn1"](X)
    model = attached(copy.deepcopy(attention), Int8Config(level="attention"))
    fake_quant.set_mode(model, "quantize")
    both = model["attn1"](X)
    found = fake_quant.detach(model, ["attn1.mix"])
    assert {"attn1.mix.left_scale", "attn1.mix.right_scale", "attn1.scores.left_scale"} <= set(found)
    assert not torch.equal(model["attn1"](X), both) and not torch.equal(model["attn1"](X), plain)
    fake_quant.detach(model)
    assert type(model["attn1"]) is Attention and torch.equal(model["attn1"](X), plain)
    assert list(model.state_dict()) == list(attention.state_dict())


def test_whatever_processor_a_training_sets_the_products_stay(attention):
    """Attention by name (flash-attn, xformers) is set after the products."""
    from diffusers.models.attention_processor import AttnProcessor

    model = attached(copy.deepcopy(attention), Int8Config(level="attention"))
    fake_quant.set_mode(model, "quantize")
    before = model["attn1"](X)
    model["attn1"].set_processor(AttnProcessor())
    assert torch.equal(model["attn1"](X), before)
    fake_quant.detach(model)
    assert isinstance(model["attn1"].processor, AttnProcessor)


def test_packed_products_equal_fake_quantized_ones_bit_for_bit(attention):
    model = attached(copy.deepcopy(attention), Int8Config(level="attention"))
    fake_quant.set_mode(model, "quantize")
    expected, layers = model["attn1"](X), fake_quant.traits(model)
    packed.pack(model)
    assert torch.equal(model["attn1"](X), expected)
    again = copy.deepcopy(attention)
    packed.place(again, layers)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again["attn1"](X), expected)


def test_a_mask_is_refused_while_they_round(attention):
    model = attached(copy.deepcopy(attention), Int8Config(level="attention"))
    mask = torch.zeros(2, 1, 10)
    model["attn1"](X, attention_mask=mask)  # in float as ever
    fake_quant.set_mode(model, "quantize")
    with pytest.raises(UserError, match="does not support a mask"):
        model["attn1"](X, attention_mask=mask)


def test_what_is_computed_otherwise_is_not_taken():
    unusual = dict(scale_qk=False, kv_heads=1, residual_connection=True, rescale_output_factor=2.0)
    for odd in ({name: value} for name, value in unusual.items()):
        model = torch.nn.ModuleDict({"attn1": Attention(query_dim=24, heads=3, dim_head=8, **odd)})
        assert list(int8_attention.products_of(model)) == [], odd


def test_autocast_does_not_round_the_products(attention):
    """The exported graph sums integers; half precision would round the scores before the softmax."""
    model = attached(copy.deepcopy(attention), Int8Config(level="attention"))
    scores = model["attn1"].scores
    fake_quant.set_mode(model, "quantize")
    left, right = torch.randn(2, 3, 10, 8), torch.randn(2, 3, 8, 10)
    exact = scores(left, right)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scores(left, right), exact)
