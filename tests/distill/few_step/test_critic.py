"""The discriminator: published sizes, and a bottleneck that is the UNet's own."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from accel.distill.few_step import critic as gan
from accel.errors import UserError
from accel.models.topology import TOPOLOGIES, narrowed


def unet(name: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    if name == "sdxl":
        config = narrowed(
            name,
            (8, 16, 16),
            sample_size=8,
            cross_attention_dim=16,
            norm_num_groups=4,
            attention_head_dim=(2, 4, 4),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
            transformer_layers_per_block=(1, 1, 2),
        )
    else:
        channels = (8, 16, 16, 16)[: 3 if "tiny" in name else 4]
        config = narrowed(
            name, channels, sample_size=16, cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4
        )
    return UNet2DConditionModel(**config).eval()


def arguments(model: UNet2DConditionModel, size: int = 16) -> tuple:
    torch.manual_seed(1)
    added = None
    if model.config.addition_embed_type == "text_time":
        added = {"text_embeds": torch.randn(2, 16), "time_ids": torch.rand(2, 6)}
    return torch.randn(2, 4, size, size), torch.tensor([3, 700]), torch.randn(2, 5, 16), added


@pytest.mark.parametrize(
    ("channels", "size", "parameters"),
    [(1280, 32, 104_874_241), (1280, 8, 52_437_761), (768, 8, 18_879_745)],
    ids=["sdxl", "sd15", "edm"],
)
def test_head_has_the_published_size(channels, size, parameters):
    with torch.device("meta"):
        made = gan.head(channels, size)
        assert sum(parameter.numel() for parameter in made.parameters()) == parameters
        assert made(torch.zeros(3, channels, size, size)).shape == (3, 1, 1, 1)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16])
def test_head_takes_any_bottleneck_that_halves_to_four_or_less(size):
    assert gan.head(8, size)(torch.zeros(2, 8, size, size)).shape == (2, 1, 1, 1)


def test_a_bottleneck_that_does_not_halve_is_an_error_for_people():
    with pytest.raises(UserError, match="12 x 12|24 x 24|18 x 18"):
        gan.head(8, 18)


def test_bottleneck_of_the_real_sizes():
    assert gan.bottleneck_shape(TOPOLOGIES["sdxl"].config, 128) == (1280, 32)
    assert gan.bottleneck_shape(TOPOLOGIES["sd15"].config, 64) == (1280, 8)


@pytest.mark.parametrize("name", ["sd15", "sd15-tiny", "sd15-small", "sdxl", "vega"])
def test_bottleneck_is_the_unets_own_and_the_decoder_does_not_run(name):
    model = unet("sdxl") if name == "sdxl" else unet(name) if name != "vega" else None
    if model is None:
        from accel.distill.methods.students import make_student

        model = make_student(unet("sdxl"), "vega").eval()
    caught = {}
    last = model.mid_block if model.mid_block is not None else model.down_blocks[-1]
    hook = last.register_forward_hook(lambda module, given, out: caught.update(full=out))
    sample, t, context, added = arguments(model)
    with torch.no_grad():
        model(sample, t, context, added_cond_kwargs=added)
        hook.remove()
        model.up_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the decoder ran"))
        ours = gan.bottleneck(model, sample, t, context, added)
    full = caught["full"][0] if isinstance(caught["full"], tuple) else caught["full"]
    assert torch.equal(ours, full)


class Family:
    """What `gan.Critic` asks of a family, for the UNets of this file."""

    @staticmethod
    def call(network, x_t, t, conditions):
        context, added = conditions
        return network(x_t, t, context, added_cond_kwargs=added).sample

    @staticmethod
    def bottleneck(network, x_t, t, conditions):
        return gan.bottleneck(network, x_t, t, *conditions)

    @staticmethod
    def bottleneck_shape():
        return gan.bottleneck_shape(unet("sd15").config, 16)


def test_one_call_of_the_critic_is_its_parts():
    model = unet("sd15")
    critic = gan.Critic(model, Family, seed=3).eval()
    x, t, *conditions = arguments(model)
    given = (x, t, conditions)
    with torch.no_grad():
        prediction, fake, real = critic(given, given, None)
        assert torch.equal(prediction, critic.score(*given)) and torch.equal(fake, critic.logits(*given))
    assert real is None and fake.shape == (2,)


def test_a_narrow_head_has_a_slope():
    """Groups of two channels would be normalised to their order: no gradient would reach the generator."""
    torch.manual_seed(0)
    slopes = []
    for channels in (64, 1280):
        x = torch.randn(4, channels, 4, 4, requires_grad=True)
        gan.head(channels, 4)(x).sum().backward()
        slopes.append(float(x.grad.flatten(1).norm(dim=1).mean()))
    assert slopes[0] == pytest.approx(slopes[1], rel=0.8), slopes


def test_losses_are_those_of_goodfellow():
    fake, real = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    wanted = -torch.log(1 - torch.sigmoid(fake)).mean() - torch.log(torch.sigmoid(real)).mean()
    assert gan.discriminator_loss(fake, real).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert gan.generator_loss(fake).item() == pytest.approx(-torch.log(torch.sigmoid(fake)).mean().item(), rel=1e-6)
