"""EDM's sampler, and the recursion of a few-step student, as functions of float64 arrays of numpy or torch.

    dx / dsigma = (x - D(x; sigma)) / sigma                           (Karras et al. 2022, arXiv 2206.00364, equation 3)

A `Denoiser` is (x, sigma) -> D(x; sigma), of the kind and dtype of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Denoiser = Callable[[Any, float], Any]


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


def heun(
    denoise: Denoiser, x: Any, sigmas: Sequence[float], noise: Callable[[int], Any], churn: Churn | None = None
) -> Any:
    """Follow the equation from sigmas[0] to the last one with Heun's steps, second order; the step to 0 is Euler's.

    Algorithm 2 of arXiv 2206.00364; without churn it is algorithm 1, the deterministic one.

    Args:
        denoise: called 2 (len(sigmas) - 1) - 1 times where the last level is 0.
        x: a draw of noise of standard deviation sigmas[0], float64 [b, ...]: the levels differ by a factor of 40,000.
        sigmas: falling levels.
        noise: step -> standard normal noise like x; asked for where there is churn.
        churn: new noise on the way; None for none.
    """
    steps = len(sigmas) - 1
    for step, (sigma, after) in enumerate(zip(sigmas, sigmas[1:], strict=False)):
        gamma = churn.gamma(sigma, steps) if churn else 0.0
        if churn and gamma:
            raised = sigma * (1 + gamma)
            x = x + math.sqrt(raised**2 - sigma**2) * churn.noise * noise(step)
            sigma = raised
        slope = (x - denoise(x, sigma)) / sigma
        there = x + (after - sigma) * slope
        if after:
            slope = (slope + (there - denoise(there, after)) / after) / 2
            there = x + (after - sigma) * slope
        x = there
    return x


def renoised(denoise: Denoiser, x: Any, sigmas: Sequence[float], noise: Callable[[int], Any]) -> Any:
    """What a few-step student of DMD2 does (arXiv 2405.14867, section 4.4): denoise, add fresh noise of the next level.

    Args:
        denoise: called once for each level.
        x: a draw of noise of standard deviation sigmas[0], float64 [b, ...].
        sigmas: the levels that the student was trained at, falling.
        noise: step -> standard normal noise like x, which is added after that step; not after the last one.
    """
    for step, sigma in enumerate(sigmas):
        x = denoise(x + sigma * noise(step - 1) if step else x, sigma)
    return x
