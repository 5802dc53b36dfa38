"""Tables of the forward process are on a device once: a DMD2 micro-batch uploaded them two dozen times."""

from __future__ import annotations

import torch

from accel.distill.diffusion import process
from accel.distill.diffusion.process import Diffusion
from accel.sampling.noise_schedule import NoiseSchedule

CONFIG = {"num_train_timesteps": 50, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def test_a_table_is_uploaded_once_for_each_schedule_device_and_dtype(monkeypatch):
    uploads, tensor = [], torch.tensor
    monkeypatch.setattr(process.torch, "tensor", lambda *a, **k: uploads.append(k) or tensor(*a, **k))
    first = Diffusion(NoiseSchedule.of_training(CONFIG))
    t, x = tensor([0, 49]), torch.randn(2, 4, 8, 8)
    for _ in range(3):
        first.add_noise(x, x, t)
        first.x0(x, x, t)
        first.denoising_loss(x, x, x, t)
    assert len(uploads) == 1
    assert (
        torch.equal(first.alpha_bar(t), tensor(first.schedule.alphas_cumprod)[t])
        and first.alpha_bar(t).dtype == torch.float64
    )
    other = Diffusion(NoiseSchedule.of_training(CONFIG | {"beta_end": 0.02}))
    assert not torch.equal(other.alpha_bar(t), first.alpha_bar(t)) and len(uploads) == 2
