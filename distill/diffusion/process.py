"""The forward process as few-step distillation needs it: per row, and back to x_0 in float64.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                                     (DDPM, arXiv 2006.11239)

float64, because 1 / sqrt(alpha_bar) is 15 at t = 999 and the gradient of DMD2 is a difference of two such x_0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from accel.sampling.noise_schedule import NoiseSchedule

from . import losses

# Uploaded once: a copy from pageable memory waits for everything that the device has queued. The schedule is held, so
# that no other one gets its id.
_uploaded: dict[tuple[int, torch.device, torch.dtype], tuple[NoiseSchedule, torch.Tensor]] = {}


def alphas_on(schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """alpha_bar of every timestep [T], on a device."""
    key = (id(schedule), device, dtype)
    if key not in _uploaded:
        _uploaded[key] = schedule, torch.tensor(schedule.alphas_cumprod, dtype=dtype, device=device)
    return _uploaded[key][1]


class Constants:
    """Lists of numbers that a run asks for again and again, each uploaded once."""

    def __init__(self) -> None:
        self._kept: dict[Any, torch.Tensor] = {}

    def __call__(self, values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Values as a tensor [n], int64 or float32 if no dtype is given."""
        key = tuple(values), device, dtype
        if key not in self._kept:
            self._kept[key] = torch.tensor(values, dtype=dtype, device=device)
        return self._kept[key]


@dataclass(frozen=True)
class Diffusion:
    """A variance-preserving forward process and what its networks predict.

    Shapes: x0, eps, x_t, prediction [b, c, h, w]; t int64 [b].
    """

    schedule: NoiseSchedule

    @property
    def levels(self) -> int:
        """Number of noise levels; t is one of 0 to levels - 1."""
        return self.schedule.T

    def start(self, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Input of a student's first step: noise alone, at whichever timestep (arXiv 2405.14867, section 4.3)."""
        return noise

    def alpha_bar(self, t: torch.Tensor) -> torch.Tensor:
        """float64 [b], on the device of t."""
        return alphas_on(self.schedule, t.device, torch.float64)[t]

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t, in the dtype of x0."""
        return losses.add_noise(x0.double(), eps.double(), self.alpha_bar(t)).to(x0.dtype)

    def target(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What a network should say about x_t."""
        return losses.target(self.schedule.prediction_type, x0, eps, self.alpha_bar(t).to(x0.dtype))

    def x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The clean image that a prediction means, float64."""
        said, seen = prediction.double(), x_t.double()
        a = losses.per_row(self.alpha_bar(t), seen)
        kind = self.schedule.prediction_type
        if kind == "epsilon":
            return (seen - (1 - a).sqrt() * said) / a.sqrt()
        if kind == "v_prediction":
            return a.sqrt() * seen - (1 - a).sqrt() * said
        return said

    def denoising_loss(
        self, prediction: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error of a prediction, in the network's own units."""
        return F.mse_loss(prediction.float(), self.target(x0, eps, t).float())
