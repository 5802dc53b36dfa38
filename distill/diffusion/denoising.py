"""The denoising task: a batch of clean latents becomes noisy ones, and what the network should say about them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from accel.sampling.noise_schedule import NoiseSchedule

from ..data.draws import Draw, take
from ..settings import Recipe
from . import losses
from .process import alphas_on

POSTERIOR, NOISE = Draw("posterior"), Draw("noise")
OFFSET, PERTURBATION = Draw("offset", dims=1), Draw("perturbation")


@dataclass(frozen=True)
class Noised:
    """x_t [b, c, h, w] at timesteps t [b]; x0, eps and the wanted prediction of the same shape; weight [b] or None."""

    x_t: torch.Tensor
    t: torch.Tensor
    x0: torch.Tensor
    eps: torch.Tensor
    wanted: torch.Tensor
    weight: torch.Tensor | None


def clean(batch: Mapping[str, Any], seed: int) -> torch.Tensor:
    """x_0 [b, c, h, w]: a draw of the encoder's posterior."""
    return batch["latent_mean"] + batch["latent_std"] * take(batch, seed, POSTERIOR)


def timestep(schedule: NoiseSchedule) -> Draw:
    return Draw("timestep", high=schedule.T)


def draws(recipe: Recipe, schedule: NoiseSchedule) -> tuple[Draw, ...]:
    """What `noised` reads."""
    more = [OFFSET] if recipe.offset_noise else []
    more += [PERTURBATION] if recipe.input_perturbation else []
    return (POSTERIOR, timestep(schedule), NOISE, *more)


def noised(batch: Mapping[str, Any], recipe: Recipe, schedule: NoiseSchedule) -> Noised:
    """Noise a batch at random timesteps. All randomness depends on the recipe's seed and the example's index alone."""
    x0, seed = clean(batch, recipe.seed), recipe.seed
    t = take(batch, seed, timestep(schedule))
    alpha_bar = alphas_on(schedule, x0.device, torch.float32)[t]
    eps = take(batch, seed, NOISE)
    if recipe.offset_noise:
        eps = losses.offset_noise(eps, take(batch, seed, OFFSET), recipe.offset_noise)
    mixed = eps
    if recipe.input_perturbation:
        mixed = losses.perturbed(eps, take(batch, seed, PERTURBATION), recipe.input_perturbation)
    kind = schedule.prediction_type
    weight = losses.min_snr_weight(alpha_bar, recipe.snr_gamma, kind) if recipe.snr_gamma else None
    return Noised(
        x_t=losses.add_noise(x0, mixed, alpha_bar),
        t=t,
        x0=x0,
        eps=eps,
        wanted=losses.target(kind, x0, eps, alpha_bar),
        weight=weight,
    )


def task_terms(out: torch.Tensor, made: Noised, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """`task`, the error of a prediction; and `prior`, that of the class images, where `batch["prior"]` marks some.

    Args:
        out: the prediction [b, c, h, w].
        batch: `prior`, bool [b], for DreamBooth's prior preservation (arXiv 2208.12242, equation 2).
    """

    def error(rows: Any) -> torch.Tensor:
        return losses.task_loss(out[rows], made.wanted[rows], None if made.weight is None else made.weight[rows])

    prior = batch.get("prior")
    return {"task": error(slice(None))} if prior is None else {"task": error(~prior), "prior": error(prior)}


def added_conditions(batch: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """SDXL's pooled text embedding and sizes; None for the others."""
    return {"text_embeds": batch["pooled"], "time_ids": batch["time_ids"]} if "pooled" in batch else None
