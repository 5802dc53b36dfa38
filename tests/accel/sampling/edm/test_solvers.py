"""One solver for numpy and torch: both follow the same steps."""

import numpy as np
import torch

from accel.sampling.edm.levels import sampling_sigmas
from accel.sampling.edm.solvers import Churn, heun, renoised


def shrunk(x, sigma):
    """E[x_0 | x] for x_0 ~ N(0, 1)."""
    return x / (1 + sigma**2)


def test_numpy_and_torch_get_the_same():
    z = np.random.default_rng(0).standard_normal((8, 3))
    fresh = np.random.default_rng(1).standard_normal((9, 8, 3))
    for run, sigmas, more in ((heun, sampling_sigmas(9), (Churn(5.0),)), (renoised, [80.0, 3.0, 0.5], ())):
        ours = run(shrunk, sigmas[0] * z, sigmas, lambda step: fresh[step], *more)
        theirs = run(shrunk, sigmas[0] * torch.from_numpy(z), sigmas, lambda step: torch.from_numpy(fresh[step]), *more)
        assert np.allclose(ours, theirs.numpy(), rtol=1e-13, atol=1e-13)


def test_a_student_sees_every_level_once_and_ends_with_what_it_says():
    seen = []

    def denoise(x, sigma):
        seen.append((x, sigma))
        return np.full_like(x, 7.0)

    noise = [np.full(2, 1.0), np.full(2, 10.0)]
    assert renoised(denoise, np.zeros(2), [80.0, 3.0, 0.5], lambda step: noise[step]).tolist() == [7, 7]
    assert [sigma for _, sigma in seen] == [80, 3, 0.5]
    assert seen[1][0].tolist() == [10, 10] and seen[2][0].tolist() == [12, 12]
