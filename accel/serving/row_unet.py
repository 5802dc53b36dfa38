"""A bundle whose UNet takes one timestep for each row of its batch, so that images at different steps share a call.

Eager torch takes such timesteps as it is. For engines that read graphs, the graphs are edited (`accel.bundle.
row_timesteps`) into accel's cache, beside a hard link to the weights; nothing in the bundle changes. TensorRT's engine
files are built from the bundle's own graph and keep one timestep for the whole batch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..bundle.graph_file import graph
from ..engines import choose
from ..engines.select import engine_file_engines
from ..files import cache_dir, inside, waiting_for

_UNET = "unet"


@dataclass(frozen=True, repr=False)
class RowTimesteps(Bundle):
    """A bundle with other graphs of its UNet.

    Attributes:
        edited: folder with those graphs and the weights that they read.
        entries: names of these files, as the manifest lists them.
    """

    edited: Path
    entries: frozenset[str]

    def file(self, entry: str) -> Path:
        path = super().file(entry)
        return inside(self.edited, entry, "the manifest entry") if entry in self.entries else path


def with_row_timesteps(bundle: Bundle, engine: str = "auto", device: str = "auto") -> Bundle:
    """The bundle with one timestep for each row, where its UNet's engine can have that; else the bundle itself.

    Args:
        engine, device: as `accel.load` takes them.

    Raises:
        UserError: when the engine cannot run here, or the cache cannot be written.
    """
    record = bundle.component(_UNET)
    timestep = next(spec for spec in record.inputs if spec.name == "timestep")
    if timestep.shape or choose(engine, record, bundle, device) in engine_file_engines():
        return bundle
    batch = record.inputs[0].shape[0]
    inputs = tuple(replace(spec, shape=(batch,)) if spec is timestep else spec for spec in record.inputs)
    components = {**bundle.manifest.components, _UNET: replace(record, inputs=inputs)}
    manifest = replace(bundle.manifest, components=components)
    if not record.graph:
        return replace(bundle, manifest=manifest)
    names = sorted({record.graph, *record.int8.get("graphs", {}).values()})
    folder = inside(cache_dir(), f"row-timesteps/{bundle.digest[:32]}", "the cache folder")
    entries = frozenset([*names, record.weights])
    with waiting_for(folder):
        if not folder.is_dir() and not _write(bundle, folder, names):
            return bundle
    return RowTimesteps(bundle.path, manifest, origin=bundle.origin, edited=folder, entries=entries)


def _write(bundle: Bundle, folder: Path, names: list[str]) -> bool:
    """Write the edited graphs; False where the graphs are not as an export writes them."""
    from ..bundle.row_timesteps import with_row_timesteps as edited

    record = bundle.component(_UNET)
    engines = {record.graph_for(engine): engine for engine in ("", *record.int8.get("graphs", {}))}
    made: dict[str, Any] = {name: edited(graph(bundle, record, engines[name])) for name in names}
    if None in made.values():
        return False
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-", ignore_cleanup_errors=True) as temporary:
        new = Path(temporary) / folder.name
        for name, model in made.items():
            path = new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(model.SerializeToString())
        _link(bundle.file(record.weights), new / record.weights)
        os.replace(new, folder)
    return True


def _link(source: Path, to: Path) -> None:
    """The same file under another name; a copy where the file system cannot."""
    try:
        os.link(source, to)
    except OSError:
        shutil.copyfile(source, to)
