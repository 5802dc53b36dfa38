"""Regression warm-up of one-step students: G(z) learns to predict the teacher's image of the noise z.

    L = d(G(z, t), x_0),      d: squared error or pseudo-Huber of latents, or LPIPS of images (arXiv 1801.03924)

DMD2 needs it for SDXL in one step, where t = 399 (arXiv 2405.14867, section 4.5); DMD2 goes on from the result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from accel.errors import MissingPackage, UserError
from accel.progress import progress

from ..data.batches import Batches, data_of
from ..data.draws import Turn
from ..data.encoders import Encoders
from ..settings import RegressionRecipe
from ..training.method import OptimizerPhase, Terms, TrainedNetwork
from . import ode_pairs
from .text_to_image import TextToImage

HUBER = 0.00054  # times the square root of the latent's size (Song and Dhariwal 2023, arXiv 2310.14189, section 3.3)


class Regression:
    """The method: a UNet learns x_0 of one step from pairs.

    Args:
        recipe: its settings.
        encoders: the frozen half of its pipeline.
    """

    def __init__(self, recipe: RegressionRecipe, encoders: Encoders):
        if recipe.loss == "lpips" and importlib.util.find_spec("lpips") is None:
            raise MissingPackage("lpips", "--loss lpips")
        self.recipe, self.encoders, self.family = recipe, encoders, TextToImage(recipe, encoders)
        levels = self.family.process.levels
        if not 0 <= recipe.timestep < levels:
            raise UserError(
                f"invalid timestep: {recipe.timestep} (expected an integer >= 0 and <= {levels - 1})",
                "--timestep 999, or 399",
            )
        self.unet = encoders.source.load("unet").requires_grad_(True).train()
        self.networks = {"unet": TrainedNetwork(self.unet, self.unet)}
        self.phases = (OptimizerPhase("unet", ("unet",)),)
        self.perceptual: nn.Module | None = None

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.family.ready()
        if self.recipe.loss == "lpips":
            import lpips

            self.perceptual = lpips.LPIPS(net="vgg").to(device).requires_grad_(False).eval()

    def loss(self, phase: OptimizerPhase, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        z, wanted = batch["z"], batch["latent_mean"]
        t = torch.full((len(z),), self.recipe.timestep, device=z.device)
        process, module = self.family.process, self.networks["unet"].module
        x = process.x0(self.family.call(module, z, t, self.family.conditions(batch)), z, t).float()
        error = {"mse": F.mse_loss, "huber": pseudo_huber, "lpips": self.lpips}[self.recipe.loss](x, wanted)
        return error, {"regression": error}

    def lpips(self, x: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        vae = self.encoders.vae

        def decode(latents: torch.Tensor) -> torch.Tensor:
            scale, shift = self.encoders.latent_scale
            return vae.decode(latents / scale + shift).sample.clamp(-1, 1)

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
    recipe: RegressionRecipe,
    encoders: Encoders,
    run: Path,
    accelerator: Any,
    say: Callable[[str], None],
    turns: Sequence[Turn] = (),
) -> Batches:
    """The micro-batches of pairs, which hold their noise; missing pairs are made first, on the captions of the data."""
    folder = Path(recipe.pairs) if recipe.pairs else run / "pairs"
    with progress("pairs of noise and image", keep=True, shown=accelerator.is_main_process) as report:
        made = ode_pairs.make(
            recipe,
            data_of(recipe, encoders),
            encoders,
            folder,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            progress=lambda fraction: report("", fraction),
        )
    accelerator.wait_for_everyone()
    say(f"pairs: {made.count} in {folder}")

    rank, world = accelerator.process_index, accelerator.num_processes
    more = dict(size_conditioning=encoders.sdxl, rank=rank, world=world)
    return lambda step: ode_pairs.batches(made, recipe, step, **more)
