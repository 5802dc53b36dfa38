"""Losses against their definitions in float64, and against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from accel.distill.diffusion import losses
from accel.errors import UserError

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
T = torch.tensor([0, 1, 200, 500, 998, 999])
ALPHA_BAR = SCHEDULER.alphas_cumprod[T]


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8)


def test_noise_and_velocity_are_those_of_diffusers():
    x0, eps = pair()
    assert torch.allclose(losses.add_noise(x0, eps, ALPHA_BAR), SCHEDULER.add_noise(x0, eps, T), atol=1e-6)
    velocity = losses.target("v_prediction", x0, eps, ALPHA_BAR)
    assert torch.allclose(velocity, SCHEDULER.get_velocity(x0, eps, T), atol=1e-6)
    assert losses.target("epsilon", x0, eps, ALPHA_BAR) is eps
    assert losses.target("sample", x0, eps, ALPHA_BAR) is x0
    with pytest.raises(UserError, match="unknown prediction type"):
        losses.target("flow", x0, eps, ALPHA_BAR)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_the_published_ones(gamma):
    snr = compute_snr(SCHEDULER, T)
    clipped = torch.minimum(snr, torch.full_like(snr, gamma))
    for kind, wanted in (("epsilon", clipped / snr), ("v_prediction", clipped / (snr + 1)), ("sample", clipped)):
        assert torch.allclose(losses.min_snr_weight(ALPHA_BAR, gamma, kind), wanted, rtol=1e-4), kind


def test_min_snr_weight_of_pure_noise_is_finite():
    for kind in ("epsilon", "v_prediction", "sample"):
        assert torch.isfinite(losses.min_snr_weight(torch.zeros(1), 5.0, kind)).all()


def test_weights_of_all_kinds_weigh_the_same_error_of_the_clean_image():
    """One weighted loss in three units: eps, v and x0 errors of one and the same mistake."""
    x0, eps = pair()
    wrong = x0 + 0.1
    a = ALPHA_BAR.view(-1, 1, 1, 1)
    x_t = losses.add_noise(x0, eps, ALPHA_BAR)
    said = {
        "sample": wrong,
        "epsilon": (x_t - a.sqrt() * wrong) / (1 - a).sqrt(),
        "v_prediction": (a.sqrt() * x_t - wrong) / (1 - a).sqrt(),
    }
    values = [
        losses.task_loss(
            prediction.double(), losses.target(kind, x0, eps, ALPHA_BAR), losses.min_snr_weight(ALPHA_BAR, 5.0, kind)
        )
        for kind, prediction in said.items()
    ]
    assert torch.allclose(torch.stack(values), values[0].expand(3), rtol=2e-3)


def test_task_loss_weighs_rows():
    prediction, wanted = pair()
    weight = torch.rand(6)
    rows = ((prediction.double() - wanted.double()) ** 2).mean((1, 2, 3))
    assert torch.allclose(losses.task_loss(prediction, wanted, weight).double(), (rows * weight).mean(), rtol=1e-6)
    assert torch.allclose(losses.task_loss(prediction, wanted).double(), rows.mean(), rtol=1e-6)


def test_feature_loss_sums_pairs_and_does_not_overflow_in_half_precision():
    big = torch.full((2, 3, 4, 4), 300.0, dtype=torch.float16)
    zero = torch.zeros_like(big)
    assert losses.feature_loss([big], [zero]) == 90_000
    assert losses.feature_loss([big, big], [zero, zero]) == 180_000
    assert losses.feature_loss([big], [zero]).dtype == torch.float32


def test_features_of_other_shapes_are_refused():
    with pytest.raises(UserError, match="do not pair"):
        losses.feature_loss([torch.zeros(1, 2, 4, 4)], [torch.zeros(1, 2, 2, 2)])


def test_offset_noise_moves_the_mean_of_a_channel_and_perturbation_leaves_the_target():
    x0, eps = pair()
    offset = torch.randn(6, 4)
    moved = losses.offset_noise(eps, offset, 0.1)
    assert torch.allclose((moved - eps).mean((2, 3)), 0.1 * offset, atol=1e-6)
    assert torch.allclose(losses.perturbed(eps, x0, 0.1), eps + 0.1 * x0)
