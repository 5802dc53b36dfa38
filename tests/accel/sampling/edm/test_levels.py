"""The preconditioning in numpy is the one that training has in torch."""

import numpy as np
import torch

from accel.distill.edm import preconditioning
from accel.sampling.edm.levels import coefficients, edm_sigmas


def test_the_coefficients_are_those_of_training():
    sigmas = edm_sigmas(200)
    theirs = torch.stack(preconditioning.coefficients(torch.from_numpy(sigmas), 0.37)).numpy()
    ours = np.array([coefficients(float(sigma), 0.37) for sigma in sigmas]).T
    assert np.allclose(ours, theirs, rtol=1e-14, atol=0)
