"""Losses of training and distillation, as pure functions, always computed in float32.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps                                     (DDPM, arXiv 2006.11239)
    L   = w_task L_task + w_output L_output + w_feature sum_l L_feature,l                     (BK-SDM, arXiv 2305.15798)

Shapes: x_0, eps, predictions [b, c, h, w]; alpha_bar [b].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from accel.errors import UserError, unknown


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values [b] in the dtype of `like` [b, ...] and in a shape that broadcasts over it, such as [b, 1, 1, 1]."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def add_noise(x0: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """x_t, each row at its own noise level."""
    return per_row(alpha_bar.sqrt(), x0) * x0 + per_row((1 - alpha_bar).sqrt(), x0) * eps


def target(prediction_type: str, x0: torch.Tensor, eps: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """What a network of a prediction type should say: eps, v (Salimans and Ho 2022, arXiv 2202.00512) or x_0."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return per_row(alpha_bar.sqrt(), x0) * eps - per_row((1 - alpha_bar).sqrt(), x0) * x0
    if prediction_type == "sample":
        return x0
    raise unknown("prediction type", prediction_type, ("epsilon", "v_prediction", "sample"))


def min_snr_weight(alpha_bar: torch.Tensor, gamma: float, prediction_type: str) -> torch.Tensor:
    """Min-SNR weights [b] (Hang et al. 2023, arXiv 2303.09556): min(SNR, gamma) on the error of x_0, in other units.

    Written without dividing by the SNR of pure noise, which is zero.
    """
    snr = alpha_bar / (1 - alpha_bar)
    if prediction_type == "epsilon":
        return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return snr.clamp(max=gamma)


def offset_noise(eps: torch.Tensor, offset: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise with a random mean per channel, offset [b, c], so that very dark and bright images can be learnt.

    (Guttenberg 2023, crosslabs.org/blog/diffusion-with-offset-noise.)
    """
    return eps + strength * offset[..., None, None]


def perturbed(eps: torch.Tensor, perturbation: torch.Tensor, strength: float) -> torch.Tensor:
    """Noise the input is made with, while `eps` stays what is asked for (Ning et al. 2023, arXiv 2301.11706)."""
    return eps + strength * perturbation


def task_loss(prediction: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error of the denoising task; weight [b] or None for ones."""
    error = F.mse_loss(prediction.float(), wanted.float(), reduction="none").flatten(1).mean(1)
    return error.mean() if weight is None else (error * weight).mean()


def output_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error between the two predictions."""
    return F.mse_loss(student.float(), teacher.float())


def feature_loss(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum over pairs of mean squared errors.

    In float32 whatever the activations are in: squares of float16 overflow beyond differences of 255.
    """
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape != theirs.shape:
            raise UserError(
                f"features of shape {tuple(ours.shape)} (student) and {tuple(theirs.shape)} (teacher) do not pair",
                "choose another feature set: nota, segmind or layers",
            )
    return sum(F.mse_loss(ours.float(), theirs.float()) for ours, theirs in zip(student, teacher, strict=True))
