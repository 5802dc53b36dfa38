"""Few-step distillation of EDM's ImageNet 64 x 64: images of a class, in pixels, without text or autoencoder.

A model is a folder of `edm.source`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from accel.bench.contact_sheet import contact_sheet
from accel.errors import UserError
from accel.sampling.noise import normal

from ..edm import preconditioning
from ..edm.sampler import pixels
from ..edm.source import ClassEncoders, EDMSource, save_edm
from ..settings import DMD2Recipe


@dataclass(frozen=True)
class Karras:
    """EDM's forward process x_t = x_0 + sigma_t eps, at levels counted as DMD2 counts them: the larger, the noisier.

    Shapes: x0, eps, x_t, prediction [b, c, h, w]; t int64 [b]. Networks predict x_0.
    """

    sigmas: torch.Tensor
    sigma_data: float = preconditioning.SIGMA_DATA
    _uploaded: dict[torch.device, torch.Tensor] = field(default_factory=dict, compare=False)

    @property
    def levels(self) -> int:
        return len(self.sigmas)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """float64 [b]."""
        if t.device not in self._uploaded:
            self._uploaded[t.device] = self.sigmas.to(t.device)
        return self._uploaded[t.device][t]

    def start(self, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return preconditioning.add_noise(torch.zeros_like(noise), noise, self.sigma(t))

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return preconditioning.add_noise(x0.double(), eps.double(), self.sigma(t)).to(x0.dtype)

    def x0(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return prediction.double()

    def denoising_loss(
        self, prediction: torch.Tensor, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        error = (prediction.float() - x0.float()).square().flatten(1).mean(1)
        return (preconditioning.loss_weight(self.sigma(t), self.sigma_data).float() * error).mean()


class ClassToImage:
    """Networks are `edm.Preconditioned`, conditions are class numbers [b]."""

    guides = False  # no class stands for "no class"

    def __init__(self, recipe: DMD2Recipe, encoders: ClassEncoders):
        self.recipe, self.encoders = recipe, encoders
        self.teacher = encoders.open(recipe.teacher) if recipe.teacher else encoders.source
        constants, theirs = encoders.source.config("scheduler"), self.teacher.config("scheduler")
        for name in ("sigma_min", "sigma_max", "rho", "sigma_data"):
            if constants.get(name) != theirs.get(name):
                raise UserError(
                    f"{name} is {constants.get(name)} in {encoders.source.name} and {theirs.get(name)} in the teacher",
                    "give the model that the student was made of as --teacher",
                )
        sigmas = preconditioning.edm_sigmas(
            rho=constants.get("rho", preconditioning.RHO),
            sigma_min=constants.get("sigma_min", preconditioning.SIGMA_MIN),
            sigma_max=constants.get("sigma_max", preconditioning.SIGMA_MAX),
        )
        self.process = Karras(torch.from_numpy(sigmas), constants.get("sigma_data", preconditioning.SIGMA_DATA))

    def load(self, source: EDMSource) -> nn.Module:
        made = source.load("unet")
        made.known_labels = True  # by `ClassEncoders.prompts`
        return made

    def ready(self) -> None:
        pass

    def conditions(self, batch: Mapping[str, Any]) -> torch.Tensor:
        return batch["context"]

    def cast(
        self, x_t: torch.Tensor, conditions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x_t stays in float32: the preconditioning around F needs it, and hands F its own dtype."""
        return x_t, conditions

    def rows(self, conditions: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return conditions[rows]

    def call(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor) -> torch.Tensor:
        return network(x_t, self.process.sigma(t).to(x_t.dtype), conditions)

    def bottleneck(self, network: nn.Module, x_t: torch.Tensor, t: torch.Tensor, conditions: torch.Tensor):
        return preconditioning.bottleneck(network, x_t, self.process.sigma(t).to(x_t.dtype), conditions)

    def bottleneck_shape(self) -> tuple[int, int]:
        widths = self.teacher.config("unet")["block_out_channels"]
        return widths[-1], self.recipe.resolution // 2 ** (len(widths) - 1)

    @torch.no_grad()
    def samples(self, generator: nn.Module, timesteps: Sequence[int]) -> Any:
        """One image of each of the first ten classes, as a PIL image."""
        labels = torch.arange(min(10, self.encoders.classes or 1), device=self.encoders.device)
        config = generator.unet.config
        shape = (config.in_channels, self.recipe.resolution, self.recipe.resolution)
        at = [torch.full_like(labels, t) for t in timesteps]
        noise = [
            torch.from_numpy(normal(range(len(labels)), number, shape)).to(labels.device)
            for number in range(len(timesteps))
        ]
        x = self.process.start(noise[0], at[0])
        for number, t in enumerate(at):
            x = self.call(generator, self.process.add_noise(x, noise[number], t) if number else x, t, labels)
        made = pixels(x).cpu().numpy()
        made = np.repeat(made, 3, -1) if made.shape[-1] == 1 else made
        return contact_sheet({"": made}, [str(int(label)) for label in labels], cell=max(64, self.recipe.resolution))

    def save(self, folder: Path, generator: preconditioning.Preconditioned, timesteps: Sequence[int]) -> None:
        sigmas = [float(self.process.sigmas[t]) for t in timesteps]
        save_edm(
            folder,
            generator,
            dtype=self.recipe.save_dtype,
            sampler={"name": "dmd2", "timesteps": list(timesteps), "sigmas": sigmas},
        )
