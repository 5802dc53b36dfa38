"""Bundles of diffusers pipelines in accel's cache: exported once for the files, options and versions they are of."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle import Bundle, is_bundle
from ..bundle.kinds import kind_of
from ..bundle.shape_profiles import native_sides
from ..errors import Notice
from ..files import cache_dir, digest_of, exclusive
from ..progress import progress
from .digests import sha256_once

if TYPE_CHECKING:
    from ..models.pipeline_bundle import PipelineBundle

_NAME = 60  # letters of a model's name in that of its folder
_PATIENCE = 7200.0  # seconds that a second process waits for the one that is compiling
_IMAGES, _SMALLER, _LARGER = 4, 2, 2  # what such a bundle accepts by default, around the model's own size


def profile_around(bundle: PipelineBundle) -> str:
    """The shape profile of a bundle that is made on the way: one to four images of half to twice the model's size."""
    pipeline = bundle.manifest.pipeline
    step, sides = pipeline["vae_scale"] * pipeline["latent_multiple"], []
    for name, native in zip(("height", "width"), native_sides(pipeline["native_size"]), strict=True):
        sides.append(f"{name}={max(step, native // _SMALLER // step * step)}-{native * _LARGER}")
    return ",".join([f"batch=1-{_IMAGES}", *sides, f"tokens={bundle.manifest.profile.tokens}"])


def compiled(model: PipelineBundle, export: Mapping[str, Any]) -> Bundle:
    """The bundle of a pipeline, exported into the cache where it is not there yet.

    Args:
        export: options of `accel.export.export_pipeline`.

    Raises:
        UserError: for a pipeline that cannot be exported so.
    """
    name = re.sub(r"[^\w.-]+", "_", str(model.manifest.source["name"]), flags=re.ASCII).strip("._")[:_NAME] or "model"
    place = cache_dir() / "compiled" / f"{name}-{_key(model, export)[:16]}"
    if not is_bundle(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(place, patience=_PATIENCE):
            if not is_bundle(place):
                _export(model, place, export)
    return Bundle.open(place)


def _export(model: PipelineBundle, place: Path, export: Mapping[str, Any]) -> None:
    from ..export.pipeline import export_pipeline

    with progress("compiling, first time only") as report:
        export_pipeline(model.source, place, progress=report, **export)
    size = sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) / 1e6
    warnings.warn(Notice(f"compiled into {place} ({size:,.0f} MB), where the next call finds it"), stacklevel=4)


def _key(bundle: PipelineBundle, export: Mapping[str, Any]) -> str:
    """Digest of all that decides what is exported: files and constants of the pipeline, options, and versions."""
    digests = {path.relative_to(bundle.path).as_posix(): sha256_once(path) for path in _files(bundle)}
    versions = {name: version(name) for name in ("accel-diffusion", "torch", "onnx", "diffusers", "transformers")}
    manifest = {name: value for name, value in bundle.manifest.as_dict().items() if name != "profile"}
    return digest_of([digests, manifest, {name: str(value) for name, value in export.items()}, versions])


def _files(bundle: PipelineBundle) -> list[Path]:
    """The files of a pipeline folder that its networks, tokenizers and scheduler are read from."""
    source = bundle.source
    parts = [name for name in source.index if source.has(name)]
    small = {path for name in parts for path in source.folder(name).glob("*") if path.suffix in (".json", ".txt")}
    networks = {kind_of(name).part or name for name in bundle.manifest.components}
    return sorted(small | {path for name in networks for path in source.weight_files(name)})
