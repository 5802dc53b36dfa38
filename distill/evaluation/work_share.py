"""A folder of numbered images that several processes generate together, and that a restarted run completes.

    out/run.json               the settings that every image in it was made with
    out/pictures/00000.png     written whole or not at all; image i is made by the process of rank i % world

Nothing else is shared: a process that finds its images made has nothing to do.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from accel.errors import UserError
from accel.files import read_bytes, read_json, write_bytes, write_json
from accel.images import decoded

from ..data.distributed import wait_for_files

IMAGES, RUN = "pictures", "run.json"
SUFFIX = {"png": ".png", "jpeg": ".jpg"}


@dataclass(frozen=True)
class Shard:
    """Which part of the images a process makes: those whose number leaves `rank` when divided by `world`."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def indices(self, count: int) -> range:
        return range(self.rank, count, self.world)


# How launchers tell a process its number, how many there are, and its number on its machine: torchrun and accelerate,
# Open MPI, and MPICH with Intel MPI.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


def shard_of(environment: Mapping[str, str]) -> Shard:
    """The shard that torchrun, accelerate or mpirun gave to this process; all of it where none of them did.

    Raises:
        UserError: for numbers that do not fit each other.
    """
    names = next((n for n in _LAUNCHERS if n[0] in environment or n[1] in environment), _LAUNCHERS[0])
    found = []
    for name, default in zip(names, ("0", "1", environment.get(names[0], "0")), strict=True):
        text = environment.get(name, default)
        if not text.isdecimal():
            raise UserError(f"{name} = {text!r} is not a whole number", f"unset {name}, or set it as torchrun does")
        found.append(int(text))
    rank, world, local = found
    if rank >= world:
        fix = f"set both: {names[0]} counts from 0 to {names[1]} - 1; or unset both"
        raise UserError(f"{names[0]} = {rank} with {names[1]} = {world}", fix)
    return Shard(rank, world, local)


def image_file(out: Path, index: int, kind: str) -> Path:
    """Where image `index` is; `kind` is "png" or "jpeg"."""
    return out / IMAGES / f"{index:05d}{SUFFIX[kind]}"


def save(image: np.ndarray, path: Path, kind: str) -> None:
    """Write an image, uint8 [h, w, 3], whole or not at all."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind.upper())
    try:
        write_bytes(path, data.getvalue())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}", "free some space, or another --out"
        ) from None


def is_whole(path: Path, size: int) -> bool:
    """Whether an image is there, can be read to its end and has the size."""
    try:
        return decoded(read_bytes(path, "the image", 1 << 28), str(path)).size == (size, size)
    except UserError:
        return False


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder one of these settings, or see that it is. A folder without an image takes new settings.

    Raises:
        UserError: when it holds images of other settings, naming the difference, or cannot be written.
    """
    images, run = out / IMAGES, out / RUN
    try:
        there = {entry.name for entry in out.iterdir() if entry.name[0] != "."} if out.exists() else set()
        made = _any_images(images)
        if RUN not in there and (there - {IMAGES} or made):
            raise UserError(f"{out} holds files that are not of an evaluation", "choose another --out")
        images.mkdir(parents=True, exist_ok=True)
        if not run.exists():
            _write_first(run, settings)
        elif not made and read_json(run, "the record of an earlier run") != dict(settings):
            write_json(run, dict(settings))
    except OSError as error:
        raise UserError(f"{out} cannot be used: {error.strerror}", "choose another --out") from None
    confirm(out, settings)


def confirm(out: Path, settings: Mapping[str, Any]) -> None:
    """See that the folder is still one of these settings: processes of two different runs may have met in it.

    Raises:
        UserError: when it is not, naming the differences.
    """
    there = read_json(out / RUN, "the record of an earlier run")
    if not isinstance(there, dict):
        raise UserError(f"{out / RUN} is not a JSON object", "choose another --out")
    differences = [
        f"{key} was {_short(there.get(key))} and is {_short(settings.get(key))} now"
        for key in [*settings, *(key for key in there if key not in settings)]
        if there.get(key) != settings.get(key)
    ]
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"{out} holds images of another run: {'; '.join(differences[:3])}{more}",
            "choose another --out, or ask for the same as before",
        )


def _any_images(folder: Path) -> bool:
    return folder.is_dir() and any(entry.name[0] != "." for entry in folder.iterdir())


def _write_first(run: Path, settings: Mapping[str, Any]) -> None:
    """Write the record unless another process is first: a link, since the last rename would win and not the first."""
    handle, name = tempfile.mkstemp(dir=run.parent, prefix=f".{run.name}.")
    os.close(handle)
    own = Path(name)
    try:
        write_json(own, dict(settings))
        os.link(own, run)
    except OSError:
        if not run.exists():
            os.replace(own, run)  # a file system without links
    finally:
        own.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def wait_for_images(
    out: Path, count: int, kind: str, world: int, patience: float, progress: Callable[[int], None] = lambda _: None
) -> list[Path]:
    """The files of all images, once they are all there.

    Args:
        patience: seconds without a new image after which it is an error.
        progress: called with the number of images that are there.

    Raises:
        UserError: naming the images that did not come and whose they are.
    """
    files = [image_file(out, index, kind) for index in range(count)]
    if missing := wait_for_files(files, patience, progress):
        late = set(missing)
        names = ", ".join(file.name for file in missing[:5]) + (" ..." if len(missing) > 5 else "")
        ranks = ", ".join(str(rank) for rank in range(world) if late & set(files[rank::world]))
        raise UserError(
            f"{len(missing)} of {count} images did not come within {patience:g} s: {names} (of rank {ranks})",
            "start those processes again, or run this one alone with WORLD_SIZE=1: finished images are kept",
        )
    return files
