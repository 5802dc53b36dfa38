"""The formula of every kind, against torch in float64 and against peft."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from accel.errors import UserError
from accel.models.lora import LoraFile, fuse, lora_file
from accel.models.lora.names import parsed, place, places

SCALE = 0.7


class Net(nn.Module):
    """A linear layer, a convolution and a norm, with the config that a UNet would have."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"cross_attention_dim": 8}
        self.linear = nn.Linear(8, 12)
        self.conv = nn.Conv2d(6, 4, 3)
        self.point = nn.Conv2d(6, 4, 1)
        self.norm = nn.LayerNorm(8)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * 0.3


def low_rank(out: int, into: int, *sides: int, rank: int = 3) -> dict[str, torch.Tensor]:
    ones = [1] * len(sides)
    return {"lora_down.weight": randn(rank, into, *sides), "lora_up.weight": randn(out, rank, *ones)}


# Layer, tensors, and the update in torch by the definition, of float64 tensors.
def cases():
    torch.manual_seed(1)
    product = lambda t: t["lora_up.weight"].flatten(1) @ t["lora_down.weight"].flatten(1)  # noqa: E731
    yield "linear", "linear", low_rank(12, 8) | {"alpha": torch.tensor(2.0)}, lambda t: product(t) * 2 / 3
    yield "no alpha", "linear", low_rank(12, 8), product
    yield "convolution", "conv", low_rank(4, 6, 3, 3), lambda t: product(t).view(4, 6, 3, 3)
    yield "1 x 1 as linear", "point", low_rank(4, 6), lambda t: product(t).view(4, 6, 1, 1)
    core = {
        "lora_down.weight": randn(3, 6, 1, 1),
        "lora_up.weight": randn(4, 3, 1, 1),
        "lora_mid.weight": randn(3, 3, 3, 3),
    }
    yield (
        "core",
        "conv",
        core | {"alpha": torch.tensor(1.0)},
        lambda t: (
            nn.functional.conv2d(  # up after mid after down, applied to every unit image: the kernel itself
                nn.functional.conv2d(
                    nn.functional.conv2d(torch.eye(6).double().view(6, 6, 1, 1), t["lora_down.weight"]),
                    t["lora_mid.weight"].flip(2, 3),
                    padding=2,
                ),
                t["lora_up.weight"],
            ).transpose(0, 1)
            / 3
        ),
    )
    hada = {f"hada_w{i}_{x}": randn(*shape) for i in (1, 2) for x, shape in (("a", (12, 3)), ("b", (3, 8)))}
    both = lambda t: (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])  # noqa: E731
    yield "LoHa", "linear", hada | {"alpha": torch.tensor(6.0)}, lambda t: both(t) * 2
    hada = {f"hada_w{i}_{x}": randn(*shape) for i in (1, 2) for x, shape in (("a", (4, 2)), ("b", (2, 54)))}
    yield "LoHa, convolution", "conv", hada, lambda t: both(t).view(4, 6, 3, 3)
    cores = {f"hada_t{i}": randn(2, 2, 3, 3) for i in (1, 2)}
    cores |= {f"hada_w{i}_{x}": randn(2, size) for i in (1, 2) for x, size in (("a", 4), ("b", 6))}
    side = lambda t, i: torch.einsum("ijkl,ip,jr->prkl", t[f"hada_t{i}"], t[f"hada_w{i}_a"], t[f"hada_w{i}_b"])  # noqa: E731
    yield "LoHa with cores", "conv", cores, lambda t: side(t, 1) * side(t, 2)
    whole = {"lokr_w1": randn(3, 2), "lokr_w2": randn(4, 4), "alpha": torch.tensor(7.0)}
    yield "LoKr, whole", "linear", whole, lambda t: torch.kron(t["lokr_w1"], t["lokr_w2"])
    half = {"lokr_w1": randn(3, 2), "lokr_w2_a": randn(4, 2), "lokr_w2_b": randn(2, 4), "alpha": torch.tensor(1.0)}
    yield "LoKr", "linear", half, lambda t: torch.kron(t["lokr_w1"], t["lokr_w2_a"] @ t["lokr_w2_b"]) / 2
    small = {"lokr_w1_a": randn(2, 2), "lokr_w1_b": randn(2, 3), "lokr_w2": randn(2, 2, 3, 3)}
    yield (
        "LoKr, convolution",
        "conv",
        small,
        lambda t: torch.kron((t["lokr_w1_a"] @ t["lokr_w1_b"])[..., None, None], t["lokr_w2"]),
    )
    flat = {"lokr_w1": randn(2, 3), "lokr_w2_a": randn(2, 2), "lokr_w2_b": randn(2, 18)}
    yield (
        "LoKr, flat convolution",
        "conv",
        flat,
        lambda t: torch.kron(t["lokr_w1"][..., None, None], (t["lokr_w2_a"] @ t["lokr_w2_b"]).view(2, 2, 3, 3)),
    )
    yield "whole difference", "linear", {"diff": randn(12, 8)}, lambda t: t["diff"]
    yield "norm", "norm", {"w_norm": randn(8)}, lambda t: t["w_norm"]


CASES = list(cases())


def fused(tensors: dict[str, torch.Tensor], layer: str, tmp_path, scale: float = SCALE) -> torch.Tensor:
    save_file({f"lora_unet_{layer}.{key}": value for key, value in tensors.items()}, tmp_path / "it.safetensors")
    net = fuse(Net(), "unet", [LoraFile(tmp_path / "it.safetensors", scale)])
    return net.get_submodule(layer).weight.detach()


@pytest.mark.parametrize("layer, tensors, delta", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_an_update_is_what_its_formula_says(layer, tensors, delta, tmp_path):
    own = Net().get_submodule(layer).weight.detach().double()
    change = delta({key: value.double() for key, value in tensors.items()})
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(fused(tensors, layer, tmp_path).double(), own + SCALE * change, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize("of", ["outputs", "outputs, flat", "inputs"])
def test_dora_keeps_the_norms_that_it_learnt(layer, of, tmp_path):
    own = Net().get_submodule(layer).weight.detach().double()
    out, into, *sides = own.shape
    tensors = low_rank(out, into, *sides)
    shape = {"outputs": (out, *[1] * (own.dim() - 1)), "outputs, flat": (out,), "inputs": (1, into, *[1] * len(sides))}[
        of
    ]
    tensors["dora_scale"] = torch.rand(shape) + 0.5
    changed = own + SCALE * (tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)).view_as(own)
    axis = 1 if of == "inputs" else 0
    norm = changed.pow(2).sum([i for i in range(own.dim()) if i != axis], keepdim=True).sqrt()
    wanted = tensors["dora_scale"].double().view_as(norm) / norm * changed
    torch.testing.assert_close(fused(tensors, layer, tmp_path).double(), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(fused(tensors, layer, tmp_path, scale=0), own.float())


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize("layer, more", [("linear", {}), ("conv", {}), ("conv", {"use_effective_conv2d": True})])
def test_lycoris_files_are_merged_as_peft_merges_them(kind, layer, more, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.inject_adapter_in_model(
        getattr(peft, kind)(r=1, alpha=3, target_modules=[layer], init_weights=False, **more), Net()
    )
    tuner = adapted.get_submodule(layer)
    mark = {"LoHaConfig": "hada_", "LoKrConfig": "lokr_"}[kind]
    tensors = {name.split(".")[0]: value.detach().clone() for name, value in tuner.named_parameters() if mark in name}
    tensors["alpha"] = torch.tensor(3.0)
    tuner.merge()
    wanted = tuner.get_base_layer().weight.detach()
    torch.testing.assert_close(fused(tensors, layer, tmp_path, scale=1.0), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "tensors, text",
    [
        ({"linear.lora_down.weight": randn(3, 8), "linear.lora_up.weight": randn(12, 2)}, "do not fit each other"),
        ({"linear.hada_w1_a": randn(12, 2), "linear.hada_w1_b": randn(2, 8)}, "incomplete"),
        ({"linear.lokr_w1": randn(3, 2), "linear.lokr_w2": randn(4, 5)}, "no place"),
        ({"linear.diff": randn(8, 12)}, "no place"),
        ({"elsewhere.diff": randn(8, 12)}, "no such layer"),
        ({"linear.lora_down.weight": randn(3), "linear.lora_up.weight": randn(12, 3)}, "incomplete"),
        ({"linear.diff": randn(12, 8), "linear.dora_scale": randn(7)}, "norms"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(tensors, text, tmp_path):
    save_file({f"lora_unet_{key}": value for key, value in tensors.items()}, tmp_path / "it.safetensors")
    net = Net()
    with pytest.raises(UserError, match=text):
        fuse(net, "unet", [LoraFile(tmp_path / "it.safetensors")])
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), Net().state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "key, component, layer, part",
    [
        ("lora_unet_down_blocks_0_attn1_to_q.lora_down.weight", "unet", "down_blocks_0_attn1_to_q", "down"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1.hada_w1_a", "text_encoder_2", None, "hada_w1_a"),
        ("lora_te_text_model_encoder_layers_0_mlp_fc1.alpha", "text_encoder", None, "alpha"),
        ("unet.mid_block.attn1.processor.to_q_lora.down.weight", "unet", "mid_block.attn1.processor.to_q", "down"),
        ("mid_block.attn1.processor.to_out_lora.up.weight", "unet", "mid_block.attn1.processor.to_out", "up"),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight",
            "text_encoder",
            None,
            "up",
        ),
        ("unet.conv_in.lora_A.default.weight", "unet", "conv_in", "down"),
        ("unet.conv_in.lora_magnitude_vector", "unet", "conv_in", "magnitude"),
        ("diffusion_model.input_blocks.1.1.proj_in.lora_up.weight", "unet", "input_blocks.1.1.proj_in", "up"),
        ("lycoris_mid_block_conv1.lokr_w2_b", "unet", "mid_block_conv1", "lokr_w2_b"),
    ],
)
def test_names_of_every_program(key, component, layer, part):
    found = parsed(key)
    assert (found.component, found.part) == (component, part) and layer in (None, found.layer)
    modules = ["mid_block.attn1.to_q", "mid_block.attn1.to_out.0", "encoder.layers.0.self_attn.q_proj"]
    modules += ["encoder.layers.0.mlp.fc1", "conv_in", "mid_block.conv1", "down_blocks.0.attn1.to_q"]
    modules += ["down_blocks.0.resnets.0.conv1", "down_blocks.0.attentions.0.proj_in"]
    assert place(found.layer, places(modules)) in modules


@pytest.mark.parametrize("name", ["sd15", "sd15-tiny", "sdxl", "ssd-1b"])
def test_block_numbers_of_the_original_code_are_those_of_diffusers(name):
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    from accel.models.lora.names import _original
    from accel.models.topology import topology

    with init_empty_weights():
        unet = UNet2DConditionModel(**topology(name).config)
    modules = [name for name, module in unet.named_modules() if getattr(module, "weight", None) is not None]
    pairs = dict(_original(modules))
    assert set(pairs.values()) == set(modules)
    state = {f"model.diffusion_model.{old}.weight": torch.tensor(float(i)) for i, old in enumerate(pairs)}
    state |= {key.replace("weight", "bias"): torch.tensor(-1.0) for key in list(state)}
    converted = convert_ldm_unet_checkpoint(state, dict(unet.config))
    made = {int(value): key for key, value in converted.items() if key.endswith("weight")}
    for i, new in enumerate(pairs.values()):
        assert made.get(i, f"{new}.weight") == f"{new}.weight"
    assert len(made) > 0.9 * len(pairs)


def test_a_name_that_no_lora_has():
    assert parsed("unet.conv_in.weight") is None and parsed("alpha") is None


@pytest.mark.parametrize(
    "spec, text",
    [
        ({"scale": 1}, "no path"),
        ({"path": "x", "weight": 1}, "'weight'"),
        (("x", 1, 2), "invalid LoRA"),
        (7, "invalid LoRA"),
        (("x", "much"), "invalid LoRA scale"),
        ({"path": __file__, "scale": {"unet": {"down": "much"}}}, "invalid LoRA scale"),
    ],
)
def test_what_is_no_lora_is_a_sentence(spec, text):
    with pytest.raises(UserError, match=text) as caught:
        lora_file(spec)
    assert caught.value.fix


def test_scales_by_block_in_diffusers_words_and_in_ours(tmp_path):
    (tmp_path / "it.safetensors").touch()
    words = {"text_encoder": 0.5, "unet": {"down": 0.9, "mid": 0, "up": {"block_0": 0.6, "block_1": [0.4, 0.8]}}}
    file = lora_file({"path": tmp_path / "it.safetensors", "scale": words, "blocks": {"down_blocks.1": -1}})
    assert dict(file.blocks) == {
        "text_encoder": 0.5,
        "unet.down_blocks": 0.9,
        "unet.mid_block": 0.0,
        "unet.up_blocks.0": 0.6,
        "unet.up_blocks.1.attentions.0": 0.4,
        "unet.up_blocks.1.attentions.1": 0.8,
        "unet.down_blocks.1": -1.0,
    }
    assert file.strength("unet", "down_blocks.0.conv") == 0.9 and file.strength("unet", "down_blocks.1.conv") == -1
    assert file.strength("unet", "conv_in") == 1 and file.strength("text_encoder", "encoder") == 0.5
    assert file.strength("unet", "down_blocks.10.conv") == 0.9 and np.isfinite(file.scale)
