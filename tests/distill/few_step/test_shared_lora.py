"""One frozen network under several adapters, and the passes that DMD2 makes through them."""

import copy

import pytest
import torch

from accel.distill.few_step import shared_lora
from accel.models.source import open_source

TARGETS = ("to_q", "conv1")


def inputs(unet, size=2):
    torch.manual_seed(1)
    width = unet.config.cross_attention_dim
    return torch.randn(size, 4, 16, 16), torch.tensor([5, 700]), torch.randn(size, 7, width)


def trained(adapted):
    """B is zero at the start: an adapter that does something."""
    torch.manual_seed(len(adapted._name))
    for parameter in adapted.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return adapted


def shared(sd15):
    made = shared_lora.Shared(open_source(sd15).load("unet"))
    return made, *(trained(made.add(name, TARGETS, 2, 2.0, seed=0)) for name in ("one", "other"))


def test_each_adapter_is_its_own_network(sd15):
    base, one, other = shared(sd15)
    plain = open_source(sd15).load("unet")
    given = inputs(plain)
    with torch.no_grad():
        untouched = plain(*given).sample
        first, second, without = (network(*given).sample for network in (one, other, base.plain()))
        assert torch.equal(without, untouched)
        assert not torch.allclose(first, untouched, atol=1e-3) and not torch.allclose(first, second, atol=1e-3)
        # The same as peft merged into the weights.
        with base.using("one") as network:
            merged = copy.deepcopy(network)
        merged.fuse_lora(adapter_names=["one"])
        assert torch.allclose(merged(*given).sample, first, atol=1e-4)


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_one_pass_through_the_other(sd15, recompute):
    """What the generator's turn does: G's adapter, then the critic's, one backward pass when neither is on."""
    base, one, other = shared(sd15)
    base.network.train()
    x, t, context = inputs(base.network)
    if recompute:
        one.enable_gradient_checkpointing()
    for parameter in other.parameters():
        parameter.requires_grad_(False)
    other(one(x, t, context).sample, t, context).sample.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in one.parameters())
    assert all(parameter.grad is None for parameter in other.parameters())
    ours = {name: parameter.grad.clone() for name, parameter in one.named_parameters()}

    reference = [copy.deepcopy(base.network) for _ in range(2)]
    for network, name in zip(reference, ("one", "other"), strict=True):
        network.disable_gradient_checkpointing()
        network.enable_adapters()
        network.set_adapter(name)
        network.zero_grad(set_to_none=True)
    reference[1](reference[0](x, t, context).sample, t, context).sample.square().sum().backward()
    for name, parameter in reference[0].named_parameters():
        if ".one." in name:
            wanted = parameter.grad
            assert torch.allclose(ours[name.replace(".", "/")], wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max()), name


def test_the_published_lora_has_its_published_size():
    """788 layers and 196,751,360 parameters at rank 64 (DMD2's SDXL LoRA)."""
    from diffusers import UNet2DConditionModel

    from accel.distill import recipes
    from accel.distill.methods.lora import adapt, names_of

    config = dict(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        layers_per_block=2,
        cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        given = recipes.dmd2_sdxl_lora()
        adapt(unet, names_of(given.targets), given.rank, given.alpha, seed=0)
    learns = [(name, parameter) for name, parameter in unet.named_parameters() if parameter.requires_grad]
    assert len(learns) == 2 * 788 and sum(parameter.numel() for _, parameter in learns) == 196_751_360
