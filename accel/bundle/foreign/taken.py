"""A folder of another exporter as a bundle in accel's cache."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...errors import Notice, UserError
from ...files import cache_dir, digest_of, exclusive, new_folder, require_space, sha256, write_json
from . import facts, onnx_networks, openvino_networks
from .specs import Network, described, strange

MANIFEST = "accel.json"
_NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")
_SMALL = ("model_index.json", "scheduler/*.json", "tokenizer*/*.json", "tokenizer*/*.txt", "*/config.json")
_PATIENCE = 3600.0  # seconds that a second process waits for the one that is reading the folder
_TORCH = ("*.safetensors", "diffusion_pytorch_model*")


@dataclass(frozen=True)
class Kind:
    """A layout of folders.

    Attributes:
        title: who writes it.
        graph: the file in unet/ that it is known by.
        take: puts a network into another folder.
        engines: names of the engines that run it; () for all that run graphs.
    """

    title: str
    graph: str
    take: Callable[[Path, Path], Network]
    engines: tuple[str, ...] = ()


KINDS: Mapping[str, Kind] = {
    "onnx": Kind("an ONNX pipeline of optimum", onnx_networks.GRAPH, onnx_networks.take),
    "openvino": Kind("OpenVINO IR", openvino_networks.GRAPH, openvino_networks.take, ("openvino",)),
}


def kind_of(folder: str | Path) -> str | None:
    """Which key of `KINDS` a folder is; None for anything else, such as a pipeline that has torch weights too."""
    folder = Path(folder)
    if not (folder / "model_index.json").is_file() or (folder / MANIFEST).is_file():
        return None
    if any(next((folder / "unet").glob(pattern), None) for pattern in _TORCH):
        return None
    return next((name for name, kind in KINDS.items() if (folder / "unet" / kind.graph).is_file()), None)


def taken(folder: str | Path) -> Path:
    """The bundle of such a folder in accel's cache, made where it is not there yet.

    Its digests are those of this reading, and it has no parity with torch. A note says what had to be assumed.

    Raises:
        UserError: for a folder that is damaged, or networks that our pipeline cannot run.
    """
    folder = Path(folder).resolve()
    name = kind_of(folder)
    assert name is not None
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.relative_to(folder).parts[0] != ".cache"
    )
    stamps = [[str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    place = cache_dir() / "foreign" / f"{folder.name[:60]}-{digest_of([__version__, str(folder), stamps])[:16]}"
    if not (place / MANIFEST).is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(place, patience=_PATIENCE):
            if not (place / MANIFEST).is_file():
                _take(folder, place, name)
    return place


def _take(folder: Path, place: Path, name: str) -> None:
    kind, known = KINDS[name], facts.read(folder)
    parts = [part for part in _NETWORKS if (folder / part / kind.graph).is_file()]
    if missing := {"text_encoder", "unet", "vae_decoder"} - set(parts):
        raise UserError(
            f"{folder} has no {missing.pop()}/{kind.graph}", "get the whole folder, or export the model with accel"
        )
    require_space(place.parent, sum(file.stat().st_size for part in parts for file in (folder / part).glob("*")))
    with new_folder(place) as out:
        components, opsets = {}, [0]
        for part in parts:
            (out / part).mkdir()
            network = kind.take(folder / part, out / part)
            if odd := strange(part, network):
                raise UserError(
                    f"{folder}: our pipeline cannot run its {part} ({', '.join(odd)})", "export it with accel"
                )
            components[part] = _component(part, network, known)
            opsets.append(network.opset)
        for pattern in _SMALL:
            for path in folder.glob(pattern):
                to = out / path.relative_to(folder)
                if path.is_file() and (
                    to.parent == out or to.parent.name in (*parts, "scheduler") or "tokenizer" in to.parent.name
                ):
                    to.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, to)
        assumed = list(known.assumed)
        write_json(out / MANIFEST, _manifest(folder, name, known, components, max(opsets), out))
    text = f"{folder} is {kind.title}, read into {place}: never compared with torch, and no digests came with it"
    warnings.warn(Notice(f"{text}; assumed: {'; '.join(assumed)}"), stacklevel=4)


def _component(part: str, network: Network, known: facts.Facts) -> dict[str, Any]:
    floats = [tensor.dtype for tensor in network.outputs if "float" in tensor.dtype]
    return {
        "kind": part.removesuffix("_2"),
        "graph": f"{part}/{network.graph}",
        "weights": f"{part}/{network.weights}",
        "dtype": floats[0] if floats else "float32",
        "parameters": network.parameters,
        **described(part, network, known.dims(part)),
    }


def _manifest(
    folder: Path, name: str, known: facts.Facts, components: Mapping[str, Any], opset: int, out: Path
) -> dict[str, Any]:
    dtype = components["unet"]["dtype"]
    files = {
        path.relative_to(out).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(out.rglob("*"))
        if path.is_file()
    }
    made = {
        "schema": 1,
        "accel": __version__,
        "family": known.family,
        "topology": "custom",
        "precision": {"float32": "fp32", "float16": "fp16"}.get(dtype, dtype),
        "pipeline": dict(known.pipeline),
        "sampler": dict(known.sampler),
        "profile": known.profile.as_dict(),
        "source": {"name": folder.name, "foreign": name, "assumed": list(known.assumed)},
        "exporter": {"opset": opset, "torch": "unknown"},
        "components": dict(components),
        "files": files,
    }
    return json.loads(json.dumps(made))
