"""EDM's sampler, and the one step that DMD2 makes of it.

    dx / dsigma = (x - D(x; sigma)) / sigma                           (Karras et al. 2022, arXiv 2206.00364, equation 3)

`heun` is algorithm 2 of that paper; without churn it is algorithm 1, the deterministic one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from accel.errors import UserError
from accel.sampling.edm import solvers
from accel.sampling.edm.levels import SIGMA_MAX, sampling_sigmas
from accel.sampling.edm.solvers import IMAGENET64_CHURN, Churn

__all__ = ["IMAGENET64_CHURN", "Churn", "heun", "one_step", "pixels", "sample", "sampling_sigmas"]

Denoiser = Callable[[torch.Tensor, float], torch.Tensor]


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
    return solvers.heun(lambda x, sigma: denoise(x, sigma).double(), x, sigmas, lambda step: noise(step).to(x), churn)


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
