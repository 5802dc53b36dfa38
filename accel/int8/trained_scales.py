"""The scales that quantization-aware training learned, in a file beside the student's weights.

`int8.safetensors` in a pipeline folder holds a scale per quantized tensor of the UNet and, in its metadata, the int8
config. The weights stay float and are diffusers' own: the pipeline loads anywhere, and only an export rounds it.
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
from ..files import parse_json
from .config import Int8Config

FILE = "int8.safetensors"


@dataclass(frozen=True)
class Trained:
    """An int8 config, and the scales that were learned with it (`fake_quant.scales`)."""

    config: Int8Config
    scales: Mapping[str, torch.Tensor]


def write(folder: Path, trained: Trained) -> None:
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in trained.scales.items()}
    save_file(tensors, folder / FILE, metadata={"config": json.dumps(trained.config.as_dict())})


def find(folder: Path) -> Trained | None:
    """The learned scales of a pipeline folder, or None.

    Raises:
        UserError: for a damaged file, or a scale that is zero, negative or not finite.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            config = Int8Config.from_dict(parse_json(metadata.get("config") or metadata["recipe"]))  # as 0.1 called it
            scales = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error})", "train the student again, or delete the file") from None
    for name, value in scales.items():
        if not (torch.isfinite(value).all() and (value > 0).all()):
            raise UserError(f"{path}: invalid scale {name}: {value.min().item():g}", "train the student again")
    return Trained(config, scales)
