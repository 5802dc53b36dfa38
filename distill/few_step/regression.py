"""Regression warm-up of one-step students: G(z) learns to be what the teacher's ODE makes of z.

    L = d(G(z, t), x_0),      d: squared error or pseudo-Huber of latents, or LPIPS of images (arXiv 1801.03924)

DMD2 needs it for SDXL in one step, where t = 399 (arXiv 2405.14867, section 4.5); DMD2 goes on from the result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from accel.errors import MissingPackage, UserError
from accel.progress import progress

from ..data.encoders import Encoders
from ..settings import Regression as Recipe
from ..sources.item import Source
from ..training.method import Network, Terms, Turn
from . import ode_pairs
from .text_to_image import TextToImage

LOSSES = ("mse", "huber", "lpips")
HUBER = 0.00054  # times the square root of the latent's size (Song and Dhariwal 2023, arXiv 2310.14189, section 3.3)


class Regression:
    """The method: a UNet learns x_0 of one step from pairs.

    Args:
        recipe: its settings.
        encoders: the frozen half of its pipeline.
    """

    def __init__(self, recipe: Recipe, encoders: Encoders):
        if recipe.loss not in LOSSES:
            raise UserError(f"unknown loss {recipe.loss!r}", f"one of: {', '.join(LOSSES)}")
        if recipe.loss == "lpips" and importlib.util.find_spec("lpips") is None:
            raise MissingPackage("lpips", "--loss lpips")
        self.recipe, self.encoders, self.family = recipe, encoders, TextToImage(recipe, encoders)
        levels = self.family.process.levels
        if not 0 <= recipe.timestep < levels:
            raise UserError(f"timestep {recipe.timestep} is none of 0 to {levels - 1}", "--timestep 999, or 399")
        self.unet = encoders.source.load("unet").requires_grad_(True).train()
        self.networks = {"unet": Network(self.unet, self.unet)}
        self.turns = (Turn("unet", ("unet",)),)
        self.perceptual: nn.Module | None = None

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.family.ready()
        if self.recipe.loss == "lpips":
            import lpips

            self.perceptual = lpips.LPIPS(net="vgg").to(device).requires_grad_(False).eval()

    def loss(self, turn: Turn, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        z, wanted = batch["z"], batch["latent_mean"]
        t = torch.full((len(z),), self.recipe.timestep, device=z.device)
        process, module = self.family.process, self.networks["unet"].module
        x = process.x0(self.family.call(module, z, t, self.family.conditions(batch)), z, t).float()
        error = {"mse": F.mse_loss, "huber": pseudo_huber, "lpips": self.lpips}[self.recipe.loss](x, wanted)
        return error, {"regression": error}

    def lpips(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        vae = self.encoders.vae

        def decode(latents: torch.Tensor) -> torch.Tensor:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            return vae.decode(latents / vae.config.scaling_factor + shift).sample.clamp(-1, 1)

        with torch.autocast(x.device.type, enabled=False):
            return self.perceptual(decode(x), decode(wanted)).mean()

    def samples(self) -> Any:
        return self.family.samples(self.unet, [self.recipe.timestep])

    def save(self, folder: Path) -> None:
        self.family.save(folder, self.unet, [self.recipe.timestep])


def pseudo_huber(x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """mean over images of sqrt(|x - wanted|^2 + c^2) - c: outliers, of which the ODE has many, count less."""
    c = HUBER * x[0].numel() ** 0.5
    return ((x - wanted).square().flatten(1).sum(1) + c**2).sqrt().sub(c).mean()


def batches_of(
    recipe: Recipe, source: Source, encoders: Encoders, run: Path, accelerator: Any, say: Callable[[str], None]
) -> Callable[[int], Iterator[Mapping[str, Any]]]:
    """(first step) -> micro-batches, on pairs that are made first where they are missing."""
    folder = Path(recipe.pairs) if recipe.pairs else run / "pairs"
    with progress("pairs of noise and image", keep=True, shown=accelerator.is_main_process) as report:
        made = ode_pairs.make(
            recipe,
            source,
            encoders,
            folder,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            progress=lambda fraction: report("", fraction),
        )
    accelerator.wait_for_everyone()
    say(f"pairs: {made.count} in {folder}")

    def batches(step: int) -> Iterator[Mapping[str, Any]]:
        rank, world = accelerator.process_index, accelerator.num_processes
        return ode_pairs.batches(made, recipe, step, rank=rank, world=world)

    return batches
