"""EDM's sampler where the denoiser is known in closed form, and DMD2's one step."""

import math

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from scipy.integrate import solve_ivp

from accel.distill.edm import preconditioning
from accel.distill.edm.sampler import IMAGENET64_CHURN, Churn, heun, one_step, pixels, sample, sampling_sigmas
from accel.errors import UserError

MEAN = torch.tensor([0.3, -0.8], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.30, 0.12], [0.12, 0.10]], dtype=torch.float64)


def gaussian(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """E[x_0 | x] for x_0 ~ N(MEAN, COVARIANCE)."""
    total = COVARIANCE + sigma**2 * torch.eye(2, dtype=torch.float64)
    return MEAN + (x - MEAN) @ torch.linalg.solve(total, COVARIANCE)


def carried(x: torch.Tensor, sigma: float, after: float) -> torch.Tensor:
    """Exact solution: each principal axis of the data keeps its number of standard deviations."""
    variance, axes = torch.linalg.eigh(COVARIANCE)
    scale = ((variance + after**2) / (variance + sigma**2)).sqrt()
    return MEAN + ((x - MEAN) @ axes * scale) @ axes.T


def start(count: int, seed: int = 0) -> torch.Tensor:
    return 80 * torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_levels_fall_from_80_to_0():
    sigmas = sampling_sigmas(18)
    assert len(sigmas) == 19 and sigmas[0] == 80 and sigmas[-2:] == [0.002, 0]
    assert sorted(sigmas, reverse=True) == sigmas
    assert sampling_sigmas(1) == [80, 0]


def test_error_is_of_second_order_in_the_number_of_steps():
    x, errors = start(64), []
    for steps in (40, 80, 160, 320):
        sigmas = sampling_sigmas(steps)[:-1]  # the last step, to 0, is Euler's, and has an error of its own
        errors.append(float((heun(gaussian, x, sigmas) - carried(x, 80, 0.002)).abs().max()))
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(1.85 < order < 2.15 for order in orders[1:]), (errors, orders)


def test_eulers_method_would_be_seen():
    """The same measurement on first-order steps says one, so it can tell the two."""
    x, errors = start(64), []
    for steps in (160, 320):
        state, sigmas = x, sampling_sigmas(steps)[:-1]
        for sigma, after in zip(sigmas, sigmas[1:], strict=False):
            state = state + (after - sigma) * (state - gaussian(state, sigma)) / sigma
        errors.append(float((state - carried(x, 80, 0.002)).abs().max()))
    assert 0.85 < math.log2(errors[0] / errors[1]) < 1.15


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.mean(0), torch.cov(x.T)


@pytest.mark.parametrize("churn", [None, Churn(40), Churn(40, 0.05, 50, 1.0)])
def test_samples_have_the_distribution_of_the_data(churn):
    torch.manual_seed(0)
    count = 40_000
    mean, covariance = moments(heun(gaussian, start(count), sampling_sigmas(256), churn))
    # Five standard errors, and a little for the start: N(0, 80^2) is not quite the noised data.
    assert (mean - MEAN).abs().max() < 5 * (0.3 / count) ** 0.5 + 0.005
    assert (covariance - COVARIANCE).abs().max() < 5 * 0.3 * (2 / count) ** 0.5 + 0.003


def spread(steps: int, churn: Churn, variance: float = 0.3) -> float:
    """Variance of the samples of N(0, variance), without sampling: each step is linear, and its noise adds to it."""

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x * variance / (variance + sigma**2)

    sigmas, total = sampling_sigmas(steps), 80.0**2
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        raised = sigma * (1 + churn.gamma(sigma, steps))
        total += (raised**2 - sigma**2) * churn.noise**2
        total *= float(heun(denoise, torch.ones(1), [raised, after])[0]) ** 2
    return total


def test_churned_samples_too_converge_in_second_order():
    churn = Churn(40, 0.05, 50)
    excess = [spread(steps, churn) / 0.3 - 1 for steps in (128, 256, 512)]
    assert all(1.7 < math.log2(coarse / fine) < 2.2 for coarse, fine in zip(excess, excess[1:], strict=False)), excess
    # More noise than was there makes every sample wider, so a wrong scale of the noise would be seen here.
    assert 0.004 < spread(512, IMAGENET64_CHURN) / spread(512, churn) - 1 < 0.008


def test_churn_forgets_the_start_and_its_noise_can_be_given():
    x, sigmas = start(4000), sampling_sigmas(32)
    quiet = heun(gaussian, x, sigmas)

    def noise(step: int) -> torch.Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)

    loud = heun(gaussian, x, sigmas, Churn(13), noise)
    assert torch.equal(heun(gaussian, x, sigmas, Churn(13), noise), loud)
    assert torch.equal(heun(gaussian, x, sigmas, Churn(0)), quiet)
    kept = [float(torch.corrcoef(torch.stack((x[:, 0], made[:, 0])))[0, 1]) for made in (quiet, loud)]
    assert kept[0] > 0.8 and abs(kept[1]) < 0.1, kept


def test_churn_is_bounded_and_only_between_its_levels():
    assert Churn(40, 0.05, 50).gamma(1.0, 256) == 40 / 256
    assert Churn(40, 0.05, 50).gamma(1.0, 20) == math.sqrt(2) - 1
    assert Churn(40, 0.05, 50).gamma(0.049, 256) == Churn(40, 0.05, 50).gamma(50.1, 256) == 0
    assert IMAGENET64_CHURN == Churn(40, 0.05, 50, 1.003)
    calls = []
    heun(gaussian, start(2), [80, 1, 0.01, 0], Churn(40, 0.05, 50), lambda step: calls.append(step) or torch.zeros(2))
    assert calls == [1]


def test_equals_scipys_solution_where_the_equation_is_not_linear():
    """Two narrow modes: D is a steep sigmoid, and a start goes to one mode or the other."""
    modes, spread = np.array([-0.7, 0.5]), 0.1

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        total = spread**2 + sigma**2
        weight = torch.stack([-((x - mode) ** 2) / (2 * total) for mode in modes]).softmax(0)
        means = torch.stack([(spread**2 * x + sigma**2 * mode) / total for mode in modes])
        return (weight * means).sum(0)

    x = start(20)[:, :1]

    def slope(sigma: float, state: np.ndarray) -> np.ndarray:
        return (state - denoise(torch.from_numpy(state), sigma).numpy()) / sigma

    solved = solve_ivp(slope, (80, 0.002), x[:, 0].numpy(), rtol=1e-10, atol=1e-12, method="DOP853").y[:, -1]
    made = heun(denoise, x, sampling_sigmas(400)[:-1])[:, 0].numpy()
    assert len(set(np.sign(solved))) == 2
    assert np.abs(made - solved).max() < 1e-3


def test_network_is_called_twice_a_step_but_once_in_the_last():
    seen = []

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        seen.append(sigma)
        return gaussian(x, sigma)

    sigmas = sampling_sigmas(5)
    heun(denoise, start(3), sigmas)
    assert seen == [80, *(level for level in sigmas[1:-1] for _ in range(2))]


# With a network


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    config = preconditioning.unet_config(
        size=16, width=32, multipliers=(1, 2), layers=1, attention=(8,), head_width=16, classes=10
    )
    return preconditioning.Preconditioned(UNet2DModel(**config)).eval()


def test_one_step_is_the_denoiser_at_80_of_noise_of_80(net):
    z, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 9])
    made = one_step(net, z, labels)
    assert torch.equal(made, net(80 * z, torch.full((3,), 80.0), torch.eye(10)[labels]))
    made.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.zero_grad()
    # One Euler step of the teacher is the same image: what the student is before it has learnt anything.
    assert torch.allclose(sample(net, z, labels, steps=1), made, atol=1e-5)


def test_sampling_holds_its_state_in_float64_and_each_row_alone(net):
    z, labels = torch.randn(3, 3, 16, 16), torch.tensor([1, 2, 9])
    made = sample(net, z, labels, steps=4)
    assert made.dtype == torch.float32 and not made.requires_grad
    assert torch.allclose(sample(net, z[1:2], labels[1:2], steps=4), made[1:2], atol=1e-5)
    assert not torch.allclose(sample(net, z, labels - 1, steps=4), made, atol=1e-3)
    exact = heun(lambda x, sigma: net(x.float(), sigma, labels), 80 * z.double(), sampling_sigmas(4))
    assert torch.allclose(made, exact.float(), atol=1e-4)
    with pytest.raises(UserError, match="0 steps make no image"):
        sample(net, z, labels, steps=0)


def test_pixels_are_rounded_and_clipped():
    levels = torch.arange(256)
    exact = (levels / 127.5 - 1).view(1, 1, 16, 16)
    for shift in (-0.4, 0, 0.4):
        assert torch.equal(pixels(exact + shift / 127.5).flatten(), levels.to(torch.uint8))
    wide = pixels(torch.tensor([-1.5, 3.0]).view(1, 2, 1, 1))
    assert wide.shape == (1, 1, 1, 2) and wide.flatten().tolist() == [0, 255]
