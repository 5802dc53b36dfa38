"""The files of a bundle under the names that they have on the hub.

optimum's pipelines open `unet/model.onnx`, and download every kind of file but `.safetensors`, where our weights are.
So a repository has two graphs of a network, which differ in the name of the file of weights alone:

    unet/graph.onnx           accel's: reads model.safetensors
    unet/model.onnx           optimum's: reads weights.onnx_data
    unet/model.safetensors    the weights
    unet/weights.onnx_data    the same object of the hub's storage, which has it once

The manifest lists the first and the third alone: accel never downloads the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bundle import Bundle
from ..bundle.manifest import MANIFEST
from ..errors import UserError
from ..trt import engine_files

# With these, `ModularPipeline.from_pretrained(repo, trust_remote_code=True)` of diffusers draws with the accel that is
# installed: the code of the repository is one import.
_BLOCKS = "AccelBlocks"
MODULAR = {
    "block.py": f"from accel.loading.modular import {_BLOCKS} as {_BLOCKS}\n".encode(),
    "modular_config.json": json.dumps(
        {"_class_name": _BLOCKS, "auto_map": {"ModularPipelineBlocks": f"block.{_BLOCKS}"}}
    ).encode(),
    "modular_model_index.json": json.dumps({"_class_name": "ModularPipeline", "_blocks_class_name": _BLOCKS}).encode(),
}
GRAPH, OURS = "model.onnx", "graph.onnx"
# Of one length, so that the name is exchanged within an ONNX file without any other byte changing.
WEIGHTS, SECOND_NAME = "model.safetensors", "weights.onnx_data"
_OPTIMUM = ("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class Repository:
    """What a repository is to hold.

    Attributes:
        manifest: its accel.json.
        files: name there -> a file here, or what it holds.
        again: name there -> name of a file above that it is another name of.
    """

    manifest: Mapping[str, Any]
    files: Mapping[str, Path | bytes]
    again: Mapping[str, str]

    def names(self) -> set[str]:
        return {MANIFEST, *self.files, *self.again}


def repository(bundle: Bundle, *, with_engine_files: bool = False) -> Repository:
    """A bundle as a repository.

    Args:
        with_engine_files: TensorRT's engine files too, which run on few machines and are trusted on none but this one.

    Raises:
        UserError: for engine files that are asked for and are not there.
    """
    files: dict[str, Any] = {entry: bundle.file(entry) for entry in bundle.manifest.files}
    listed, components, again = dict(bundle.manifest.files), dict(bundle.manifest.components), {}
    for name, record in bundle.manifest.components.items():
        graph, ours = f"{record.folder}/{GRAPH}", f"{record.folder}/{OURS}"
        if name not in _OPTIMUM or record.graph not in (graph, ours) or record.weights != f"{record.folder}/{WEIGHTS}":
            continue
        files[ours], listed[ours] = bundle.file(record.graph), listed.pop(record.graph)
        components[name] = replace(record, graph=ours)
        files[graph] = with_second_name(files[ours].read_bytes())
        again[f"{record.folder}/{SECOND_NAME}"] = record.weights
    if with_engine_files:
        files |= _engine_files(bundle)
    manifest = replace(bundle.manifest, components=components, files=listed)
    return Repository(manifest.as_dict(), files, again)


def with_second_name(graph: bytes) -> bytes:
    """An ONNX file that reads the same weights under their second name."""
    made = graph.replace(WEIGHTS.encode(), SECOND_NAME.encode())
    if made.replace(SECOND_NAME.encode(), WEIGHTS.encode()) != graph:
        raise UserError(f"a graph mentions {SECOND_NAME} itself", "export the model again")
    return made


def _engine_files(bundle: Bundle) -> dict[str, Path]:
    folder = bundle.path / engine_files.FOLDER
    found = {path.relative_to(bundle.path).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = {name: path for name, path in found.items() if path.suffix in (".plan", ".json")}
    if not found:
        raise UserError(f"{bundle.name} has no engine files", "leave --engine-files out, or accel build BUNDLE first")
    return found
