"""An ONNX network of somebody else's, its weights in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ...files import inside
from .specs import Network, Tensor

GRAPH, WEIGHTS = "model.onnx", "model.safetensors"
_OPSET = 18
_SMALL = 1 << 10  # bytes of a tensor that stays in the graph
_DTYPES = {1: "float32", 10: "float16", 16: "bfloat16", 7: "int64", 6: "int32"}


def take(source: Path, out: Path) -> Network:
    """Write the graph of `source` and its weights into `out`; its timestep becomes a float scalar, as ours is.

    Raises:
        UserError: for a file that is no ONNX, or whose weights lie outside its folder.
    """
    import onnx
    from onnx import numpy_helper
    from safetensors.numpy import save_file

    try:
        model = onnx.load(str(source / GRAPH), load_external_data=False)
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for tensor in tensors.values():
            for entry in tensor.external_data:
                if entry.key == "location":
                    inside(source, entry.value, "the file of weights")
        values = {name: numpy_helper.to_array(tensor, str(source)) for name, tensor in tensors.items()}
    except UserError:
        raise
    except Exception as error:  # protobuf's, onnx' and numpy's own
        text = f"{source / GRAPH} is not a readable ONNX file ({type(error).__name__})"
        raise UserError(text, "get the folder again") from None
    large = {name: np.ascontiguousarray(value) for name, value in values.items() if value.nbytes > _SMALL}
    save_file(large, out / WEIGHTS)
    places = _places(out / WEIGHTS)
    for name, tensor in tensors.items():
        small = numpy_helper.from_array(values[name], name)
        tensor.CopyFrom(small)
        if name in large:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            offset, length = places[name]
            for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
    model = _of_known_opset(model, source)
    _scalar_timestep(model)
    del model.graph.value_info[:]
    (out / GRAPH).write_bytes(model.SerializeToString())
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    inputs, outputs = ([_tensor(value) for value in side] for side in (model.graph.input, model.graph.output))
    return Network(GRAPH, WEIGHTS, inputs, outputs, sum(value.size for value in large.values()), opset)


def _of_known_opset(model: Any, source: Path) -> Any:
    """The same graph in an opset that the check of graphs knows; older exporters wrote lower ones."""
    from onnx import version_converter

    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    if opset >= _OPSET:
        return model
    try:
        return version_converter.convert_version(model, _OPSET)
    except Exception as error:
        text = f"{source / GRAPH} is of opset {opset}, and cannot be brought to {_OPSET} ({str(error)[:80]})"
        raise UserError(text, "export the model again, with --opset 18") from None


def _places(weights: Path) -> dict[str, tuple[int, int]]:
    """First byte and length of every tensor of a safetensors file."""
    from ...files import parse_json

    with weights.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = parse_json(file.read(length))
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + length + first, last - first) for name, (first, last) in entries.items()}


def _scalar_timestep(model: Any) -> None:
    """An int64 timestep, or one with a dimension, is made of a float scalar by nodes at the start."""
    from onnx import TensorProto, helper

    graph = model.graph
    given = next((value for value in graph.input if value.name == "timestep"), None)
    if given is None:
        return
    kind, rank = given.type.tensor_type.elem_type, len(given.type.tensor_type.shape.dim)
    floating = kind in (TensorProto.FLOAT, TensorProto.FLOAT16)
    if floating and not rank:
        return
    inner = "timestep.inner"
    for node in graph.node:
        node.input[:] = [inner if name == "timestep" else name for name in node.input]
    cast = helper.make_node("Cast", ["timestep"], ["timestep.cast"], to=kind)
    shape = helper.make_node("Constant", [], ["timestep.shape"], value_ints=[1] * rank)
    graph.node.insert(0, helper.make_node("Reshape", ["timestep.cast", "timestep.shape"], [inner]))
    graph.node.insert(0, shape)
    graph.node.insert(0, cast)
    given.CopyFrom(helper.make_tensor_value_info("timestep", kind if floating else TensorProto.FLOAT, []))


def _tensor(value: Any) -> Tensor:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        raise UserError(f"{value.name!r:.80} is of ONNX type {tensor.elem_type}", "export the model with accel")
    shape = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim)
    if not all(size is None or size > 0 for size in shape):
        raise UserError(f"{value.name!r:.80} has the shape {shape}", "get the folder again")
    return Tensor(value.name, _DTYPES[tensor.elem_type], shape)
