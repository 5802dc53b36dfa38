"""EDM's sampler, and the one step that DMD2 makes of it.

    dx / dsigma = (x - D(x; sigma)) / sigma                           (Karras et al. 2022, arXiv 2206.00364, equation 3)

`heun` is algorithm 2 of that paper; without churn it is algorithm 1, the deterministic one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from accel.errors import UserError

from .preconditioning import RHO, SIGMA_MAX, SIGMA_MIN, edm_sigmas

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]


@dataclass(frozen=True)
class Churn:
    """Fresh noise before each step: how much in all, at which levels, and its standard deviation."""

    amount: float
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    noise: float = 1.0

    def gamma(self, sigma: float, steps: int) -> float:
        """The level rises by this part of itself; never by more than brings as much new noise as there is."""
        return min(self.amount / steps, math.sqrt(2) - 1) if self.sigma_min <= sigma <= self.sigma_max else 0.0


# What EDM's ImageNet 64 x 64 figure was made with, in 256 steps (arXiv 2206.00364, table 5).
IMAGENET64_CHURN = Churn(40, 0.05, 50, 1.003)


def sampling_sigmas(
    steps: int, rho: float = RHO, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> list[float]:
    """The levels of `steps` steps, falling from sigma_max to sigma_min, then 0: steps + 1 numbers."""
    return [*edm_sigmas(steps, rho, sigma_min, sigma_max)[::-1].tolist(), 0.0]


def heun(
    denoise: Denoiser,
    x: torch.Tensor,
    sigmas: Sequence[float],
    churn: Churn | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Follow the equation from sigmas[0] to the last one with Heun's steps, second order; the step to 0 is Euler's.

    Args:
        denoise: (x, sigma) -> D, called 2 (len(sigmas) - 1) - 1 times where the last level is 0.
        x: a draw of noise of standard deviation sigmas[0], [b, ...].
        sigmas: falling levels.
        churn: new noise on the way; None for none.
        noise: step -> standard normal noise of the shape of x. Default: torch's own generator.

    Returns:
        float64, as the whole recursion: the levels differ by a factor of 40,000.
    """
    x = x.double()
    noise = noise or (lambda step: torch.randn_like(x))
    steps = len(sigmas) - 1
    for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        gamma = churn.gamma(sigma, steps) if churn else 0.0
        if gamma:
            raised = sigma * (1 + gamma)
            x = x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise(step).to(x)
            sigma = raised
        slope = (x - denoise(x, sigma).double()) / sigma
        there = x + (after - sigma) * slope
        if after:
            slope = (slope + (there - denoise(there, after).double()) / after) / 2
            there = x + (after - sigma) * slope
        x = there
    return x


@torch.no_grad()
def sample(
    net: nn.Module,
    z: torch.Tensor,
    labels: torch.Tensor | None = None,
    *,
    steps: int = 40,
    churn: Churn | None = None,
    noise: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Images of a teacher, float32 [b, c, h, w].

    Args:
        net: a `Preconditioned`.
        z: standard normal [b, c, h, w], on the network's device.
        labels: classes [b]; None for a network without.
        steps: each costs two calls of the network, the last one.
        churn, noise: as `heun`.

    Raises:
        UserError: for less than one step, and labels that do not fit.
    """
    if steps < 1:
        raise UserError(f"{steps} steps make no image", "use at least 1; EDM's ImageNet figure took 256")
    sigmas = sampling_sigmas(steps)

    def denoise(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return net(x, sigma, labels)

    return heun(denoise, sigmas[0] * z.double(), sigmas, churn, noise).float()


def one_step(
    net: nn.Module, z: torch.Tensor, labels: torch.Tensor | None = None, sigma: float = SIGMA_MAX
) -> torch.Tensor:
    """DMD2's generator: D(sigma z; sigma), with gradients. float32 [b, c, h, w].

    Args:
        z: standard normal [b, c, h, w].
        sigma: the conditioning level the student was trained at; 80 for the published ones.
    """
    return net(sigma * z, sigma, labels)


def pixels(x: torch.Tensor) -> torch.Tensor:
    """Images in -1..1, [b, c, h, w], to uint8 [b, h, w, c], each value rounded to the nearest."""
    return ((x.double() + 1) * 127.5 + 0.5).floor().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
