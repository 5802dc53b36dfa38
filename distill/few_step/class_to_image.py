"""EDM's ImageNet 64 x 64 as few-step distillation sees it: pictures of a class, in pixels, without text or autoencoder.

A model is a folder as diffusers would write it, with `unet/` (a `UNet2DModel`) and `scheduler/` (EDM's constants);
`python -m accel.distill.edm.weights FILE FOLDER` makes one of a published checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from accel.errors import UserError
from accel.files import read_json
from accel.models.source import Source
from accel.sampling.noise import normal
from accel.sheet import contact_sheet

from ..edm import preconditioning
from ..edm.sampler import pixels
from ..settings import DMD2 as Recipe
from ..training.pipelines import SAVE_DTYPES, write_network

PIPELINE = "EDMPipeline"


class EDMSource(Source):
    """A folder of an EDM model: unet/ and scheduler/."""

    family = "edm"

    def load(self, component: str) -> preconditioning.Preconditioned:
        constants = self.config("scheduler")
        return preconditioning.Preconditioned(super().load(component), constants.get("sigma_data", preconditioning.SIGMA_DATA))


def is_edm(path: str | Path) -> bool:
    index = Path(path) / "model_index.json"
    return index.is_file() and (read_json(index, "model_index.json") or {}).get("_class_name") == PIPELINE


def open_edm(path: str | Path) -> EDMSource:
    """Open a folder that `save_edm` wrote.

    Raises:
        UserError: when it is none.
    """
    path = Path(path)
    if not is_edm(path):
        raise UserError(
            f"{path} is no folder of an EDM model", "make one: python -m accel.distill.edm.weights FILE FOLDER"
        )
    return EDMSource(path, path.resolve().name, read_json(path / "model_index.json", "model_index.json"))


def save_edm(
    folder: Path, net: preconditioning.Preconditioned, *, dtype: str = "float32", sampler: Mapping[str, Any] | None = None
) -> None:
    """Write a network and its constants into a folder that exists."""
    if dtype not in SAVE_DTYPES:
        raise UserError(f"unknown save dtype {dtype!r}", f"one of: {', '.join(SAVE_DTYPES)}")
    write_network(net.unet, folder / "unet", SAVE_DTYPES[dtype])
    constants = {
        "_class_name": "EDMEulerScheduler", "sigma_min": preconditioning.SIGMA_MIN, "sigma_max": preconditioning.SIGMA_MAX, "rho": preconditioning.RHO,
        "sigma_data": net.sigma_data, "prediction_type": "epsilon",
    }  # fmt: skip
    parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "EDMEulerScheduler"]}
    (folder / "scheduler").mkdir()
    for name, content in (
        ("model_index.json", {"_class_name": PIPELINE} | parts),
        ("scheduler/scheduler_config.json", constants),
        ("sampler.json", sampler),
    ):
        if content:
            (folder / name).write_text(json.dumps(dict(content), indent=2) + "\n")


@dataclass
class ClassEncoders:
    """What `encode.Encoders` is for text to image: here a picture is its own latent, and a caption a class number."""

    source: EDMSource
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    text_learns: bool = False
    open: Callable[[str], EDMSource] = open_edm

    sdxl = False
    inpaints = False
    factor = 1
    uncached = "this model learns from pixels, and there is nothing to encode"

    @property
    def latent_channels(self) -> int:
        return self.source.config("unet")["in_channels"]

    @property
    def classes(self) -> int | None:
        return self.source.config("unet").get("num_class_embeds")

    def images(self, pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pictures [n, 3, h, w] in -1..1 as `latent_mean`; channels are averaged for a network of grey pictures."""
        if self.source.config("unet")["in_channels"] == 1:
            pictures = pictures.mean(1, keepdim=True)
        return {"latent_mean": pictures.float(), "latent_std": torch.zeros_like(pictures)}

    def prompts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Captions that are class numbers to `context`, int64 [n].

        Raises:
            UserError: for one that is no number; the network finds those that are no class.
        """
        wrong = next((text for text in texts if not text.strip().isdigit()), None)
        if wrong is not None:
            raise UserError(
                f"{wrong[:60]!r} is no class number, and {self.source.name} draws one of {self.classes} classes",
                "give pictures in one folder per class, or a column of class numbers: --caption-column label",
            )
        return {"context": torch.tensor([int(text) for text in texts], device=self.device)}


@dataclass(frozen=True)
class Karras:
    """EDM's forward process x_t = x_0 + sigma_t eps, at levels counted as DMD2 counts them: the larger, the noisier.

    Shapes: x0, eps, x_t, prediction [b, c, h, w]; t int64 [b]. Networks predict x_0.
    """

    sigmas: torch.Tensor
    sigma_data: float = preconditioning.SIGMA_DATA

    @property
    def levels(self) -> int:
        return len(self.sigmas)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """float64 [b]."""
        return self.sigmas.to(t.device)[t]

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

    guides = False  # there is no class for "none"

    def __init__(self, recipe: Recipe, encoders: ClassEncoders):
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
            rho=constants.get("rho", preconditioning.RHO), sigma_min=constants.get("sigma_min", preconditioning.SIGMA_MIN),
            sigma_max=constants.get("sigma_max", preconditioning.SIGMA_MAX),
        )  # fmt: skip
        self.process = Karras(torch.from_numpy(sigmas), constants.get("sigma_data", preconditioning.SIGMA_DATA))

    def load(self, source: EDMSource) -> nn.Module:
        return source.load("unet")

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
        """One picture of each of the first ten classes, as a PIL image."""
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
            folder, generator, dtype=self.recipe.save_dtype,
            sampler={"name": "dmd2", "timesteps": list(timesteps), "sigmas": sigmas},
        )  # fmt: skip
