"""Noise levels of EDM, and the preconditioning around its network.

x_sigma = x_0 + sigma eps
D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)              (Karras et al. 2022, arXiv 2206.00364, equation 7)
"""

from __future__ import annotations

import math

import numpy as np

from ...errors import UserError

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0
SIGMA_DATA = 0.5


def edm_sigmas(
    n: int = 1000, rho: float = RHO, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> np.ndarray:
    """Noise levels, rising: index 0 is sigma_min, index n - 1 is sigma_max. float64 [n].

    Equation 5 of arXiv 2206.00364 counts from the noisiest, as a sampler walks. Here it is turned round, as DMD2 does,
    so that an index means what a timestep of DDPM means: the larger, the noisier, and DMD2's range of 2 % to 98 % of
    the timesteps leaves out both ends. A single level is sigma_max.

    Raises:
        UserError: for no levels, or bounds that are not 0 < sigma_min < sigma_max.
    """
    if n < 1 or rho <= 0 or not 0 < sigma_min < sigma_max:
        raise UserError(
            f"no noise levels for n = {n}, rho = {rho}, sigma_min = {sigma_min}, sigma_max = {sigma_max}",
            "use n of at least 1, rho above 0, and 0 < sigma_min < sigma_max",
        )
    ramp = np.linspace(0.0, 1.0, n) if n > 1 else np.ones(1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (low + ramp * (high - low)) ** rho
    sigmas[-1] = sigma_max  # a sampler starts at exactly 80, not at the rounding error beside it
    if n > 1:
        sigmas[0] = sigma_min
    return sigmas


def sampling_sigmas(
    steps: int, rho: float = RHO, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX
) -> list[float]:
    """The levels of `steps` steps, falling from sigma_max to sigma_min, then 0: steps + 1 numbers."""
    return [*edm_sigmas(steps, rho, sigma_min, sigma_max)[::-1].tolist(), 0.0]


def coefficients(sigma: float, sigma_data: float = SIGMA_DATA) -> tuple[float, float, float, float]:
    """c_skip, c_out, c_in, c_noise of a noise level above 0 (arXiv 2206.00364, table 1)."""
    total = sigma**2 + sigma_data**2
    root = math.sqrt(total)
    return sigma_data**2 / total, sigma * sigma_data / root, 1 / root, math.log(sigma) / 4
