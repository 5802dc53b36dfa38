"""The folder of an EDM model: `unet/` (a `UNet2DModel`), `scheduler/` (EDM's constants) and maybe `sampler.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...bundle.kinds import DENOISER
from ...errors import UserError
from ...files import read_json
from ..config_files import network_class
from ..source import Source
from .folder import is_edm

_MAKE = "make one: python -m accel.distill.edm.weights FILE FOLDER"


class EDMSource(Source):
    """A folder of an EDM model. Its network is the `unet` of the folder, and the `denoiser` of a bundle."""

    @property
    def family(self) -> str:
        return "edm"

    @property
    def topology(self) -> str:
        return "adm" if self.config("unet").get("resnet_time_scale_shift") == "scale_shift" else "custom"

    def network_class(self, component: str) -> Any:
        return network_class(component, *self.index[component], more=("UNet2DModel",))

    def sampler(self) -> dict[str, Any] | None:
        """What a student carries along, `sampler.json`; None for a teacher."""
        path = self.path / "sampler.json"
        found = read_json(path, "sampler.json") if path.is_file() else None
        if found is not None and not isinstance(found, dict):
            raise UserError(f"{path} is not a JSON object", "get the folder again")
        return found


def open_edm(path: str | Path) -> EDMSource:
    """Open a folder that `accel.distill.edm.source.save_edm` wrote.

    Raises:
        UserError: when it is not one.
    """
    return EDMSource(**fields_of(path))


def fields_of(path: str | Path) -> Mapping[str, Any]:
    """What an `EDMSource` is made of.

    Raises:
        UserError: as `open_edm`.
    """
    path = Path(path)
    if not is_edm(path):
        raise UserError(f"{path} is not a folder of an EDM model", _MAKE)
    index = read_json(path / "model_index.json", "model_index.json")
    for part in ("unet", "scheduler"):
        if not isinstance(index.get(part), list) or not (path / part).is_dir():
            raise UserError(f"{path} is an EDM model without {part}", _MAKE)
    index |= {DENOISER: index["unet"]}
    return {"path": path, "name": path.resolve().name, "index": index, "folders": {DENOISER: path / "unet"}}
