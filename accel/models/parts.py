"""Parts of a pipeline that lie elsewhere: another VAE, a T2I-Adapter, ControlNets.

Every function takes a source (`accel.models.source.Source`) and returns it with that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..bundle.kinds import KINDS
from ..errors import UserError
from .config_files import read_config

S = TypeVar("S", bound=Any)


def with_vae(source: S, path: Path) -> S:
    """The source with the VAE of a folder (its own, or a pipeline's), or of a weight file in its own VAE's shape."""
    if path.is_file():
        return replace(source, files={**source.files, "vae": path})
    return with_part(source, "vae", path, ("AutoencoderKL", "AutoencoderTiny"))


def with_controlnets(source: S, folders: Sequence[str | Path]) -> S:
    """The source with these ControlNets, instead of any of its own."""
    names = KINDS["controlnet"].names
    if len(folders) > len(names):
        raise UserError(f"{len(folders)} ControlNets at once are too many", f"give at most {len(names)}")
    source = replace(source, index={name: entry for name, entry in source.index.items() if name not in names})
    for name, folder in zip(names, folders, strict=False):
        source = with_part(source, name, Path(folder), ("ControlNetModel",), inner="controlnet")
    return source


def with_part(source: S, name: str, path: Path, kinds: tuple[str, ...], inner: str = "") -> S:
    """The source with one part out of a folder: the part's own, or a pipeline's that has one, called `inner`."""
    inner = inner or name
    folder = path / inner if (path / inner / "config.json").is_file() else path
    kind = read_config(folder / "config.json", f"the config of the {name}").get("_class_name")
    if kind not in kinds:
        raise UserError(f"{folder} is a {kind}", f"give a folder with one of: {', '.join(kinds)}")
    files = {part: file for part, file in source.files.items() if part != name}
    index = dict(source.index) | {name: ["diffusers", kind]}
    return replace(source, index=index, files=files, folders={**source.folders, name: folder})


def each_controlnet(index: dict[str, Any], path: Path) -> dict[str, Any]:
    """The index with an entry for each network of a MultiControlNetModel: diffusers lists them as one part."""
    if list(index.get("controlnet") or ())[-1:] != ["MultiControlNetModel"]:
        return index
    names = KINDS["controlnet"].names
    found = [name for i in range(99) if (path / (name := f"controlnet{f'_{i}' * bool(i)}")).is_dir()]
    if not found or len(found) > len(names):
        raise UserError(f"{path} has {len(found)} ControlNets at once", f"save it with 1 to {len(names)} of them")
    return index | {name: ["diffusers", "ControlNetModel"] for name in names[: len(found)]}
