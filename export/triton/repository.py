"""Write a bundle as a model repository for NVIDIA Triton Inference Server.

    OUT/accel.json                                     the manifest, for the client
    OUT/<component>/config.pbtxt  1/model.onnx (+ model.safetensors) or 1/model.plan

Dynamic batching merges requests of several clients into one batch. Clients are at different steps, so on ONNX Runtime
the UNet gets one timestep per row. A TensorRT UNet has one timestep for the whole batch: there the batch is the
client's own, and concurrency comes from instances.

Triton's TensorRT backend deserializes an engine file and runs it (triton-inference-server/tensorrt_backend,
src/loader.cc). It never refits, so a stripped engine cannot be served; and it allows the runtime inside a
version-compatible engine only when the server is started with the option for that.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accel.bundle import MANIFEST, Bundle, Component
from accel.bundle.graph_file import graph
from accel.bundle.row_timesteps import with_row_timesteps
from accel.bundle.shape_profiles import Range
from accel.bundle.tensor_spec import TensorSpec
from accel.errors import UserError, unknown
from accel.files import inside, new_folder
from accel.trt.engine_files import EngineFile, rebuild
from accel.trt.preflight import Fit, choose

BACKENDS = ("onnxruntime", "tensorrt")
_HOST_CODE = "--backend-config=tensorrt,version-compatible=true"
_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}


class EnumValue(str):
    """A value of a protobuf enum, which the text format does not quote."""


@dataclass(frozen=True)
class Serving:
    """How the server runs the models.

    Attributes:
        backend: "onnxruntime" or "tensorrt" (needs engine files, and a server with their TensorRT version and GPU).
        instances: instances of each model per device.
        kind: "gpu" or "cpu".
        queue_microseconds: how long a request may wait for others to share its batch (max_queue_delay_microseconds).
    """

    backend: str = "onnxruntime"
    instances: int = 1
    kind: str = "gpu"
    queue_microseconds: int = 2000

    def check(self) -> None:
        if self.backend not in BACKENDS:
            raise unknown("backend", self.backend, BACKENDS)
        if self.kind not in ("gpu", "cpu") or (self.kind, self.backend) == ("cpu", "tensorrt"):
            raise UserError(f"{self.backend} does not run on {self.kind!r}", "use gpu, or onnxruntime on cpu")
        if self.instances < 1 or self.queue_microseconds < 0:
            wrong = f"invalid: {self.instances} instances, a queue delay of {self.queue_microseconds} us"
            raise UserError(wrong, "use at least 1 instance, and a delay of 0 or more")


def write(bundle: Bundle, out: str | Path, serving: Serving | None = None, *, overwrite: bool = False) -> str:
    """Write the repository; it appears only when it is whole.

    Returns:
        The command that serves it.

    Raises:
        UserError: for changed files; on the TensorRT backend, for a component without an engine file that it can load.
    """
    serving = serving or Serving()
    serving.check()
    bundle.verify()
    command = ["tritonserver", "--model-repository", str(out)]
    with new_folder(Path(out), overwrite=overwrite) as folder:
        shutil.copyfile(bundle.path / MANIFEST, folder / MANIFEST)
        for component in bundle.manifest.components.values():
            version = inside(folder, f"{component.name}/1", "the component")
            version.mkdir(parents=True)
            file = None
            if serving.backend == "tensorrt":
                # The server may be another machine, so no machine is given to the pre-flight.
                file, data = choose(bundle, component.name, None, refuse=partial(_unservable, bundle))
                (version / "model.plan").write_bytes(data)
                if file.identity["options"]["version_compatible"] and _HOST_CODE not in command:
                    command.append(_HOST_CODE)
            else:
                component = _graph(bundle, component, version / "model.onnx")
                shutil.copyfile(bundle.file(component.weights), version / Path(component.weights).name)
            text = text_format(config(component, serving, file))
            (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")
    return shlex.join(command)


def _unservable(bundle: Bundle, file: EngineFile) -> Fit | None:
    if not file.identity["options"]["strip_plan"]:
        return None
    reason = "it was built without weights (--strip-plan), and Triton's TensorRT backend does not refit"
    return Fit(False, reason, rebuild(bundle, file.component))


def _graph(bundle: Bundle, component: Component, to: Path) -> Component:
    """Write the graph as it is served; returns the component with the inputs of that graph."""
    model = graph(bundle, component, "onnxruntime")
    rows = with_row_timesteps(model)
    to.write_bytes((rows or model).SerializeToString())
    if rows is None:
        return component
    batch = component.inputs[0].shape[0]
    return replace(
        component,
        inputs=tuple(replace(spec, shape=(batch,)) if spec.name == "timestep" else spec for spec in component.inputs),
    )


def config(component: Component, serving: Serving, file: EngineFile | None = None) -> dict[str, Any]:
    """Triton's `ModelConfig` of a component as dicts and lists, with the field names of the protobuf.

    Args:
        file: the engine file to serve, whose first optimization profile is used; None serves the graph.
    """
    dims = dict(component.dims)
    profiles = file.identity["profiles"] if file else []
    for name, ends in (profiles[0]["dims"] if profiles else {}).items():
        dims[name] = Range(ends[0], ends[1], ends[2], dims[name].multiple)
    batched = _batch(component, dims)
    made: dict[str, Any] = {
        "name": component.name,
        "backend": serving.backend,
        "default_model_filename": "model.plan" if file else "model.onnx",
        "max_batch_size": dims[batched].max if batched else 0,
        "input": [_tensor(spec, component, bool(batched)) for spec in component.inputs],
        "output": [_tensor(spec, component, bool(batched)) for spec in component.outputs],
        "instance_group": [
            {"count": serving.instances, "kind": EnumValue(f"KIND_{serving.kind.upper()}")}
            | ({"profile": ["0"]} if profiles else {})
        ],
        "model_warmup": [_warmup(component, dims, batched)],
    }
    if batched and dims[batched].max > 1:
        preferred = sorted({dims[batched].opt, dims[batched].max} - {1})
        made["dynamic_batching"] = {
            "preferred_batch_size": preferred,
            "max_queue_delay_microseconds": serving.queue_microseconds,
        }
    return made


def _batch(component: Component, dims: Mapping[str, Range]) -> str | None:
    """The dimension that Triton may batch over: the first of every input, free, with a minimum of 1."""
    first = {spec.shape[0] if spec.shape else None for spec in component.inputs}
    name = first.pop() if len(first) == 1 else None
    return name if isinstance(name, str) and not component.dims[name].fixed and dims[name].min == 1 else None


def _tensor(spec: TensorSpec, component: Component, batched: bool) -> dict[str, Any]:
    free = lambda d: isinstance(d, str) and not component.dims[d].fixed  # noqa: E731
    sizes = [-1 if free(d) else component.dims[d].min if isinstance(d, str) else d for d in spec.shape]
    made: dict[str, Any] = {"name": spec.name, "data_type": EnumValue(_TYPES[spec.dtype])}
    sizes = sizes[1:] if batched else sizes
    if not sizes:  # Triton has no scalars: the client sends [1], or [rows, 1]
        return made | {"dims": [1], "reshape": {"shape": []}}
    return made | {"dims": sizes}


def _warmup(component: Component, dims: Mapping[str, Range], batched: str | None) -> dict[str, Any]:
    """One run at the profile's optimal shapes before the server reports that it is ready."""
    sizes = {name: limits.opt for name, limits in dims.items()}
    inputs = []
    for spec in component.inputs:
        shape = list(spec.concrete(sizes))
        dims_of_input = (shape[1:] if batched else shape) or [1]
        value = {"data_type": EnumValue(_TYPES[spec.dtype]), "dims": dims_of_input, "zero_data": True}
        inputs.append({"key": spec.name, "value": value})
    return {"name": "ready", "batch_size": sizes[batched] if batched else 0, "inputs": inputs}


def text_format(data: Mapping[str, Any], indent: int = 0) -> str:
    """Protobuf's text format of plain data: dicts are messages, lists are repeated fields."""
    lines: list[str] = []
    pad = "  " * indent
    for name, value in data.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                inner = text_format(item, indent + 1).rstrip("\n")
                lines += [f"{pad}{name} {{", *([inner] if inner else []), f"{pad}}}"]
            else:
                lines.append(f"{pad}{name}: {_scalar(item)}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) and not isinstance(value, EnumValue) else str(value)


def _quoted(text: str) -> str:
    """A string in protobuf's text format: its UTF-8, with octal escapes for what has a meaning or no picture."""
    plain = (chr(b) if 32 <= b < 127 and chr(b) not in "\"'\\" else f"\\{b:03o}" for b in text.encode())
    return f'"{"".join(plain)}"'
