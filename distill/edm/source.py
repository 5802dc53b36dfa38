"""EDM models as folders: `unet/` (a `UNet2DModel`) and `scheduler/` (EDM's constants), as diffusers would write them.

`python -m accel.distill.edm.weights FILE FOLDER` makes one of a published checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel.dtypes import torch_dtype
from accel.errors import UserError
from accel.models.edm import source
from accel.models.edm.folder import PIPELINE, is_edm
from accel.models.source import open_source

from ..data.encoders import Encoders, sent
from ..training.pipelines import SAVE_DTYPES, write_network
from .preconditioning import RHO, SIGMA_DATA, SIGMA_MAX, SIGMA_MIN, Preconditioned

__all__ = [
    "PIPELINE",
    "ClassEncoders",
    "EDMSource",
    "is_edm",
    "open_edm",
    "open_encoders",
    "open_text_encoders",
    "save_edm",
]


class EDMSource(source.EDMSource):
    """A folder of an EDM model, whose network comes with its preconditioning."""

    def load(self, component: str) -> Preconditioned:
        constants = self.config("scheduler")
        return Preconditioned(super().load(component), constants.get("sigma_data", SIGMA_DATA))


def open_edm(path: str | Path) -> EDMSource:
    """Open a folder that `save_edm` wrote.

    Raises:
        UserError: when it is not one.
    """
    return EDMSource(**source.fields_of(path))


def save_edm(
    folder: Path, net: Preconditioned, *, dtype: str = "float32", sampler: Mapping[str, Any] | None = None
) -> None:
    """Write a network and its constants into a folder that exists."""
    write_network(net.unet, folder / "unet", torch_dtype(dtype, SAVE_DTYPES, "save dtype"))
    constants = {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": SIGMA_MIN,
        "sigma_max": SIGMA_MAX,
        "rho": RHO,
        "sigma_data": net.sigma_data,
        "prediction_type": "epsilon",
    }
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
    """`data.encoders.Encoders` of an EDM model: an image is its own latent, a caption is a class number."""

    source: EDMSource
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    text_learns: bool = False
    open: Callable[[str], EDMSource] = open_edm

    by_class = True
    sdxl = False
    inpaints = False
    factor = 1
    uncached = "this model learns from pixels, and there is nothing to encode"

    def encode_in(self, dtype: str) -> None:
        """Raises UserError for anything but float32: nothing is encoded here."""
        if dtype != "float32":
            raise UserError(f"{self.source.name} has no VAE that could encode in {dtype}", "leave out --vae-dtype")

    @property
    def latent_channels(self) -> int:
        return self.source.config("unet")["in_channels"]

    @property
    def classes(self) -> int | None:
        return self.source.config("unet").get("num_class_embeds")

    def images(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [n, 3, h, w] in -1..1 as `latent_mean`; channels are averaged for a network of grey images."""
        if self.source.config("unet")["in_channels"] == 1:
            images = images.mean(1, keepdim=True)
        return {"latent_mean": images.float(), "latent_std": torch.zeros_like(images)}

    def prompts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Captions that are class numbers to `context`, int64 [n].

        Raises:
            UserError: for one that is not a number, or not that of a class.
        """
        count = self.classes or 1
        wrong = next((text for text in texts if not text.strip().isdigit() or int(text) >= count), None)
        if wrong is not None:
            raise UserError(
                f"{wrong[:60]!r} is not a class number, and {self.source.name} draws one of {self.classes} classes "
                f"(0 to {count - 1})",
                "give images in one folder per class, or a column of class numbers: --caption-column label",
            )
        return {"context": sent(torch.tensor([int(text) for text in texts]), self.device)}


def open_encoders(model: str | Path, **options: Any) -> Encoders | ClassEncoders:
    """The encoders of a text-to-image pipeline, or of an EDM folder."""
    if is_edm(model):
        return ClassEncoders(open_edm(model), **options)
    return Encoders(open_source(model), **options)


def open_text_encoders(model: str | Path, **options: Any) -> Encoders:
    """The encoders of a text-to-image pipeline.

    Raises:
        UserError: for an EDM folder.
    """
    if is_edm(model):
        raise UserError(f"{model} is an EDM model, which is trained by DMD2 alone", "accel distill dmd2")
    return Encoders(open_source(model), **options)
