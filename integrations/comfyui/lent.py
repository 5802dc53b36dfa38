"""Engines that several nodes share: one copy of a bundle, with the LoRA files that the caller wants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import accel

_LORAS: dict[int, tuple[str, ...]] = {}  # pipeline -> the LoRA files that its engines have now


@cache
def _loaded(bundle: str, engine: str, device: str) -> Any:
    options = {} if device == "auto" else {"device": device}
    return accel.load(bundle, engine, **options)


@dataclass(frozen=True)
class Lent:
    """A bundle on an engine, with LoRA files.

    Attributes:
        bundle: folder or name of the hub.
        engine, device: as `accel.load` takes them.
        loras: FILE=SCALE of each, in order.
    """

    bundle: str
    engine: str = "auto"
    device: str = "auto"
    loras: tuple[str, ...] = ()

    @property
    def pipeline(self) -> Any:
        """The pipeline, with these LoRA files in its engines."""
        found = _loaded(self.bundle, self.engine, self.device)
        if _LORAS.get(id(found), ()) != self.loras:
            found.set_loras(self.loras)
            _LORAS[id(found)] = self.loras
        return found

    @property
    def manifest(self) -> Any:
        return self.pipeline.bundle.manifest

    def bytes_of(self, *components: str) -> int:
        """Bytes of the weights of some networks, as they are stored."""
        manifest = self.manifest
        found = (manifest.components[name] for name in components if name in manifest.components)
        return sum(manifest.files[record.weights]["bytes"] for record in found if record.weights)
