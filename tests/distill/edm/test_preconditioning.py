"""EDM's preconditioning, noise levels and network, against diffusers' EDM scheduler and the paper's equations."""

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel

from accel.distill.edm import preconditioning
from accel.errors import UserError

SIGMAS = torch.tensor([0.002, 0.05, 0.5, 1.0, 7.0, 80.0], dtype=torch.float64)
SMALL = dict(size=16, width=32, multipliers=(1, 2), layers=1, attention=(8,), head_width=16, classes=10)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return preconditioning.Preconditioned(UNet2DModel(**preconditioning.unet_config(**SMALL))).eval()


def noisy(count: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    sigma = SIGMAS[:count].float()
    x = preconditioning.add_noise(0.5 * torch.randn(count, 3, 16, 16), torch.randn(count, 3, 16, 16), sigma)
    return x, sigma, torch.arange(count)


# Noise levels


@pytest.mark.parametrize("n", [2, 18, 1000])
def test_noise_levels_are_those_of_diffusers_turned_round(n):
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, rho=7.0)
    scheduler.set_timesteps(n)
    sigmas = preconditioning.edm_sigmas(n)
    assert sigmas.dtype == np.float64 and sigmas.shape == (n,)
    assert np.allclose(sigmas[::-1], scheduler.sigmas[:-1].numpy(), rtol=2e-5)


def test_noise_levels_rise_evenly_in_the_rho_th_root_between_exact_ends():
    sigmas = preconditioning.edm_sigmas()
    assert (sigmas[0], sigmas[-1]) == (0.002, 80.0)
    steps = np.diff(sigmas ** (1 / 7))
    assert (steps > 0).all() and np.allclose(steps, steps[0], rtol=1e-9)
    assert preconditioning.edm_sigmas(1).tolist() == [80.0]


@pytest.mark.parametrize("wrong", [dict(n=0), dict(rho=0), dict(sigma_min=0), dict(sigma_min=80.0)])
def test_noise_levels_that_are_none_are_refused(wrong):
    with pytest.raises(UserError, match="no noise levels"):
        preconditioning.edm_sigmas(**wrong)


# Preconditioning


def test_preconditioning_is_that_of_diffusers(net):
    """diffusers scales inputs, noise level and outputs in its scheduler; the network between is the same."""
    scheduler = EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    x, sigma, labels = noisy()
    with torch.no_grad():
        got = net(x, sigma, labels)
        for row in range(len(x)):
            level, one = sigma[row], x[row : row + 1]
            said = net.unet(
                scheduler.precondition_inputs(one, level), scheduler.precondition_noise(level), labels[row : row + 1]
            ).sample
            wanted = scheduler.precondition_outputs(one, said, level)
            assert torch.allclose(got[row : row + 1], wanted, atol=2e-5), float(level)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_inputs_and_targets_of_the_network_have_unit_variance_at_every_level(sigma_data):
    """Variances of c_in (x_0 + sigma eps) and of F's target (x_0 - c_skip x) / c_out, in closed form."""
    c_skip, c_out, c_in, c_noise = preconditioning.coefficients(SIGMAS, sigma_data)
    one = torch.ones_like(SIGMAS)
    assert torch.allclose(c_in**2 * (sigma_data**2 + SIGMAS**2), one, rtol=1e-12)
    assert torch.allclose(((1 - c_skip) ** 2 * sigma_data**2 + c_skip**2 * SIGMAS**2) / c_out**2, one, rtol=1e-9)
    assert torch.allclose(preconditioning.loss_weight(SIGMAS, sigma_data) * c_out**2, one, rtol=1e-12)
    assert torch.allclose((4 * c_noise).exp(), SIGMAS, rtol=1e-12)


def test_error_amplification_is_the_smallest_possible():
    """c_skip minimises c_out (arXiv 2206.00364, appendix B.6): any other makes F's errors count for more."""
    c_skip, c_out, _, _ = preconditioning.coefficients(SIGMAS)
    for other in (c_skip + 0.01, c_skip - 0.01):
        needed = ((1 - other) ** 2 * 0.25 + other**2 * SIGMAS**2).sqrt()
        assert (needed > c_out).all()


def test_a_silent_network_is_the_ideal_denoiser_of_a_gaussian():
    """With F = 0, D = c_skip x, the posterior mean of x_0 ~ N(0, sigma_data^2)."""
    silent = preconditioning.Preconditioned(UNet2DModel(**preconditioning.unet_config(**SMALL)))
    for parameter in silent.unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    x, sigma, labels = noisy()
    wanted = x.double() * (0.25 / (0.25 + sigma.double() ** 2)).view(-1, 1, 1, 1)
    assert torch.allclose(silent(x.double(), sigma.double(), labels), wanted, rtol=1e-12)


def test_without_noise_the_image_stays_and_with_all_of_it_nothing_is_kept(net):
    x, _, labels = noisy()
    small = torch.full((6,), 1e-7, dtype=torch.float64)
    assert (net(x.double(), small, labels) - x).abs().max() < 1e-6
    # At 80, x holds hardly anything: D is the network's own image in units of sigma_data.
    eps = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        out = net(80 * eps, 80.0, labels)
        said = net.unet(80 * eps / 6400.25**0.5, torch.full((6,), 80.0).log() / 4, labels).sample
    kept = 0.25 / 6400.25 * 80 * eps
    assert kept.abs().max() < 0.02
    assert torch.allclose(out, 0.5 * said + kept, atol=1e-4)


def test_result_is_float32_whatever_the_network_is_in_and_float64_only_where_x_is(net):
    x, sigma, labels = noisy()
    assert net(x, sigma, labels).dtype == torch.float32
    assert net(x.double(), sigma, labels).dtype == torch.float64
    half = preconditioning.Preconditioned(UNet2DModel(**preconditioning.unet_config(**SMALL)).to(torch.bfloat16)).eval()
    half.unet.load_state_dict(net.unet.state_dict())
    with torch.no_grad():
        out = half(x.to(torch.bfloat16), sigma, labels)
        low, high = half(x, sigma, labels), net(x, sigma, labels)
    assert out.dtype == low.dtype == torch.float32
    # At sigma = 0.002 the network counts for nothing, so rounding in it cannot show; the rest is computed in float32.
    assert torch.allclose(low[0], high[0], atol=1e-4)
    assert 0 < (low[-1] - high[-1]).abs().max() < 0.1


def test_one_level_stands_for_all_rows(net):
    x, _, labels = noisy()
    with torch.no_grad():
        each = net(x, torch.full((6,), 2.0), labels)
        assert torch.equal(net(x, 2.0, labels), each)
        assert torch.equal(net(x, torch.tensor(2.0), labels), each)
        assert torch.equal(net(x, torch.full((6, 1, 1, 1), 2.0), labels), each)


# Classes


def test_one_hot_rows_and_indices_are_the_same_class(net):
    x, sigma, labels = noisy()
    with torch.no_grad():
        by_index = net(x, sigma, labels)
        assert torch.equal(net(x, sigma, torch.eye(10)[labels]), by_index)
        assert not torch.allclose(net(x, sigma, labels + 1)[-1], by_index[-1], atol=1e-4)


@pytest.mark.parametrize(
    "labels, said",
    [
        (torch.tensor([0, 10]), "label 1 is not a class of 0 to 9: 10"),
        (torch.tensor([-1, 0]), "label 0 is not a class of 0 to 9: -1"),
        (torch.tensor([0.0, 1.0]), "are not classes"),
        (torch.eye(9)[:2], "are not classes"),
        (torch.zeros(2, 10), "a row with 0 entries"),
        (torch.full((2, 10), 0.1), "a row with 10 entries"),
        (2 * torch.eye(10)[:2], "label 0 is not a class"),
        (None, "one of 10 classes, and no labels were given"),
    ],
)
def test_labels_that_are_no_classes_are_refused(net, labels, said):
    with pytest.raises(UserError, match=said):
        net(torch.zeros(2, 3, 16, 16), 1.0, labels)


def test_a_network_without_classes_takes_none():
    free = preconditioning.Preconditioned(UNet2DModel(**preconditioning.unet_config(**SMALL | {"classes": None})))
    x = torch.randn(2, 3, 16, 16)
    assert free(x, 1.0).shape == x.shape
    assert free(x, 1.0, bottleneck=True).shape == (2, 64, 8, 8)
    with pytest.raises(UserError, match="no classes, but labels"):
        free(x, 1.0, torch.tensor([0, 1]))


# The network


def test_full_size_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        unet = UNet2DModel(**preconditioning.unet_config())
    count = sum(parameter.numel() for parameter in unet.parameters())
    assert count == preconditioning.IMAGENET64_PARAMETERS == 295_899_267
    # ADM predicts variances too: three output channels more, of 192 x 3 x 3 weights and a bias each.
    assert count + 3 * (192 * 9 + 1) == 295_904_454


def test_full_size_network_is_that_of_the_published_consistency_models():
    """Their ImageNet 64 x 64 config (openai/diffusers-cd_imagenet64_l2), field by field as diffusers fills it up."""
    published = dict(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        layers_per_block=3,
        num_class_embeds=1000,
        block_out_channels=[192, 384, 576, 768],
        attention_head_dim=64,
        down_block_types=["ResnetDownsampleBlock2D", *["AttnDownBlock2D"] * 3],
        up_block_types=[*["AttnUpBlock2D"] * 3, "ResnetUpsampleBlock2D"],
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
        upsample_type="resnet",
        downsample_type="resnet",
    )
    with torch.device("meta"):
        ours, theirs = (dict(UNet2DModel(**config).config) for config in (preconditioning.unet_config(), published))
    hidden = "_use_default_values"
    assert {k: v for k, v in ours.items() if k != hidden} == {k: v for k, v in theirs.items() if k != hidden}


def test_a_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(UserError, match="96 channels, which do not divide into heads of 64"):
        preconditioning.unet_config(width=96, multipliers=(1, 1), size=16)
    preconditioning.unet_config(width=96, multipliers=(1, 2), size=16, attention=())  # only the middle attends


def test_saved_and_loaded_by_diffusers_it_says_the_same(net, tmp_path):
    net.unet.save_pretrained(tmp_path)
    again = preconditioning.Preconditioned(UNet2DModel.from_pretrained(tmp_path)).eval()
    x, sigma, labels = noisy()
    with torch.no_grad():
        assert torch.equal(again(x, sigma, labels), net(x, sigma, labels))


# The bottleneck


def test_bottleneck_is_the_encoders_last_state_of_the_full_pass(net):
    seen = []
    hook = net.unet.down_blocks[-1].register_forward_hook(lambda module, given, out: seen.append(out[0]))
    x, sigma, labels = noisy()
    with torch.no_grad():
        net(x, sigma, labels)
        hook.remove()
        assert torch.equal(preconditioning.bottleneck(net, x, sigma, labels), seen[0])
        assert torch.equal(preconditioning.bottleneck(net, x, sigma, torch.eye(10)[labels]), seen[0])
    assert seen[0].shape == (6, 64, 8, 8)


def test_bottleneck_runs_neither_middle_nor_decoder_and_its_gradient_stays_in_the_encoder(net):
    unet, calls = net.unet, []
    rest = {
        "mid_block": unet.mid_block,
        "up_blocks": unet.up_blocks,
        "conv_norm_out": unet.conv_norm_out,
        "conv_out": unet.conv_out,
    }
    inner = [module for part in rest.values() for module in part.modules()]
    hooks = [module.register_forward_hook(lambda *_: calls.append(1)) for module in inner]
    x, sigma, labels = noisy()
    x.requires_grad_(True)
    preconditioning.bottleneck(net, x, sigma, labels).square().mean().backward()
    assert not calls
    net(x, sigma, labels)
    assert calls  # the hooks do see a full pass
    for hook in hooks:
        hook.remove()
    assert x.grad.abs().max() > 0
    for name, parameter in unet.named_parameters():
        # A class that was not drawn has a zero row, but the table as a whole has a gradient.
        assert (parameter.grad is None) == name.startswith(tuple(rest)), name
    net.zero_grad()


@pytest.mark.parametrize("width", [64, pytest.param(192, marks=pytest.mark.slow)])
def test_bottleneck_of_64_pixels_is_8_x_8_at_four_times_the_width(width):
    """768 x 8 x 8 at full size, which is what DMD2's head of 18,879,745 parameters reads."""
    with torch.device("meta"):
        unet = UNet2DModel(**preconditioning.unet_config(width=width))
    net = preconditioning.Preconditioned(unet.to_empty(device="cpu"))
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        out = preconditioning.bottleneck(net, torch.zeros(1, 3, 64, 64), 1.0, torch.tensor([7]))
    assert out.shape == (1, 4 * width, 8, 8)
