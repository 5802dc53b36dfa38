"""The ranges that a student learned with fake quantisation, in a file beside its weights.

`int8.safetensors` in a pipeline folder holds a scale per quantised tensor of the UNet and, in its metadata, the recipe.
The weights themselves stay float and are diffusers' own: the pipeline loads anywhere, and rounds nowhere but in export.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import UserError
from .config import Int8Config

FILE = "int8.safetensors"


@dataclass(frozen=True)
class Trained:
    """A recipe, and the scales that were learned by it (`int8.scales`)."""

    recipe: Int8Config
    scales: Mapping[str, torch.Tensor]


def write(folder: Path, trained: Trained) -> None:
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in trained.scales.items()}
    save_file(tensors, folder / FILE, metadata={"recipe": json.dumps(trained.recipe.as_dict())})


def find(folder: Path) -> Trained | None:
    """What a pipeline folder learned, or None.

    Raises:
        UserError: for a damaged file, or a scale that is zero, negative or not finite.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            recipe = Int8Config.from_dict(json.loads(file.metadata()["recipe"]))
            scales = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error})", "train the student again, or delete the file") from None
    for name, value in scales.items():
        if not (torch.isfinite(value).all() and (value > 0).all()):
            raise UserError(f"{path}: {name} is no range ({value.min().item():g})", "train the student again")
    return Trained(recipe, scales)
