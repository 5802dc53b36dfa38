"""Whether an ONNX graph is one that a bundle can have, seen from its structure alone, before any engine reads it.

An engine follows what a graph says: into other files, into memory that the graph names by its address, into loops, into
tensors of any size. So the graph may have only what an export writes: standard operators of a known opset, no subgraphs
and no functions, constants of the size that their shape says, and weights that are tensors of the component's own
safetensors file, at the place, of the length and of the dtype that its header says.

It takes milliseconds, and bounds what a graph asks for by what stands in it; how much memory the operators take between
input and output is for the profile's sizes to say.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import parse_json, read_bytes
from .limits import LARGEST
from .manifest import Component

OPSETS = range(17, 26)
_BYTES, _HEADER_BYTES = 256 << 20, 16 << 20
_NODES, _ELEMENTS, _RANK = 200_000, 1 << 28, 8
_NO_OPERATORS = frozenset(
    "If Loop Scan SequenceMap Optional OptionalGetElement SequenceConstruct SequenceEmpty SequenceAt StringConcat "
    "StringSplit StringNormalizer RegexFullMatch TfIdfVectorizer ImageDecoder RandomNormal RandomUniform "
    "RandomNormalLike RandomUniformLike Multinomial Bernoulli".split()
)
# Operators whose output is as large as a number in the graph says, and the input that says it.
_SIZED = {"ConstantOfShape": 0, "Expand": 1, "Tile": 1, "Resize": 3, "Pad": 1, "Range": 1, "OneHot": 1, "EyeLike": 0}
# Safetensors' dtypes as ONNX counts them, and their bytes.
_DTYPES = {"F64": (11, 8), "F32": (1, 4), "F16": (10, 2), "BF16": (16, 2), "I64": (7, 8), "I32": (6, 4), "I16": (5, 2)}
_DTYPES |= {"I8": (3, 1), "U8": (2, 1), "BOOL": (9, 1), "F8_E4M3": (17, 1), "F8_E5M2": (19, 1)}
_IN_BYTES = {22: 2}  # int4, which safetensors has not: pairs of it are stored as bytes
_SIZES = {number: size for number, size in _DTYPES.values()} | {4: 2, 12: 4, 13: 8, 21: 0.5, 22: 0.5}
_FIELDS = {1: "float_data", 7: "int64_data", 11: "double_data", 12: "uint64_data", 13: "uint64_data"}
_SPECS = {"float32": 1, "float16": 10, "bfloat16": 16, "int64": 7, "int32": 6}


def read_graph(path: Path, component: Component, weights: Path) -> Any:
    """The graph of a component as an `onnx.ModelProto`, checked.

    Args:
        path: of the ONNX file.
        weights: of the component's safetensors file.

    Raises:
        UserError: for a file that is not ONNX, or a graph with anything that no export writes.
    """
    import onnx

    data = read_bytes(path, f"the graph of {component.name}", _BYTES)
    try:
        model = onnx.ModelProto.FromString(data)
        problem = next(_problems(model, component, weights), None)
    except UserError:
        raise
    except Exception as error:  # protobuf's own
        raise UserError(
            f"{path} is not a readable ONNX file ({type(error).__name__})", "export the model again"
        ) from None
    if problem:
        raise UserError(f"{path}: {problem}; refused, because no export writes that", "export the model again")
    return model


def _problems(model: Any, component: Component, weights: Path) -> Iterator[str]:
    graph = model.graph
    opsets = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if set(opsets) != {"ai.onnx"} or opsets["ai.onnx"] not in OPSETS:
        yield f"its opset is {opsets!r:.200}, not one of {OPSETS.start} to {OPSETS.stop - 1}"
    if model.functions or model.training_info or graph.sparse_initializer:
        yield "it has functions, training or sparse tensors"
    if not 0 < len(graph.node) <= _NODES:
        yield f"it has {len(graph.node):,} nodes (1 to {_NODES:,} are allowed)"
    yield from _interface(graph.input, component.inputs, component, "input")
    yield from _interface(graph.output, component.outputs, component, "output")
    stored = _stored(weights)
    known: dict[str, Any] = {}
    for tensor in graph.initializer:
        yield from _tensor(tensor, stored, weights)
        known[tensor.name] = tensor
    for node in graph.node:
        if node.domain or node.op_type in _NO_OPERATORS or not node.op_type.isalnum():
            yield f"it has an operator {node.domain}.{node.op_type}".replace(" .", " ")[:200]
        for attribute in node.attribute:
            if attribute.type not in (1, 2, 3, 4, 6, 7, 8) or attribute.ref_attr_name:
                yield f"the attribute {attribute.name!r:.80} of {node.name!r:.80} is a graph or a sparse tensor"
            if attribute.type == 4:
                yield from _tensor(attribute.t, {}, weights)
                if node.op_type == "Constant" and node.output:
                    known[node.output[0]] = attribute.t
        if node.op_type in _SIZED:
            yield from _size(node, known)


def _interface(values: Any, specs: Any, component: Component, side: str) -> Iterator[str]:
    """Whether the graph takes or gives what the manifest says, so that the graphs of two components are not swapped."""
    found = [value.name for value in values]
    if found != [spec.name for spec in specs]:
        yield f"its {side}s are {', '.join(found)!r:.200}, not {', '.join(spec.name for spec in specs)}"
        return
    for value, spec in zip(values, specs, strict=True):
        tensor = value.type.tensor_type
        sizes = [dim.dim_value if dim.HasField("dim_value") else None for dim in tensor.shape.dim]
        wanted = [component.dims[size].min if isinstance(size, str) else size for size in spec.shape]
        same = len(sizes) == len(wanted) and all(a in (None, b) for a, b in zip(sizes, wanted, strict=True))
        if tensor.elem_type != _SPECS[spec.dtype] or not same:
            yield f"its {side} {spec.name} is not the {spec.dtype} {list(spec.shape)} of the manifest"


def _tensor(tensor: Any, stored: Mapping[tuple[int, int], tuple[int, int]], weights: Path) -> Iterator[str]:
    name, count = f"{tensor.name!r:.80}", math.prod(tensor.dims)
    if len(tensor.dims) > _RANK or any(not 0 <= size <= LARGEST * 16 for size in tensor.dims) or count > 1 << 40:
        yield f"the tensor {name} has the shape {list(tensor.dims)!r:.120}"
        return
    if tensor.data_type not in _SIZES:
        yield f"the tensor {name} is of type {tensor.data_type}"
        return
    size = math.ceil(count * _SIZES[tensor.data_type])
    if not (tensor.data_location or tensor.external_data):
        field = getattr(tensor, _FIELDS.get(tensor.data_type, "int32_data"))
        if (len(tensor.raw_data) if tensor.raw_data else len(field) * _SIZES[tensor.data_type]) != size:
            yield f"the tensor {name} holds other data than its shape {list(tensor.dims)} says"
        return
    entries = {entry.key: entry.value for entry in tensor.external_data}
    place = [entries.get(key, "") for key in ("offset", "length")]
    if entries.get("location") != weights.name:
        yield f"the tensor {name} lies in {entries.get('location')!r:.120} and not in {weights.name}"
    elif not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in place):
        yield f"the tensor {name} is at {place!r:.120} of {weights.name}"
    elif stored.get((int(place[0]), int(place[1]))) != (_IN_BYTES.get(tensor.data_type, tensor.data_type), size):
        yield f"the tensor {name} is none that {weights.name} has at this place"


def _size(node: Any, known: Mapping[str, Any]) -> Iterator[str]:
    """The output of an operator whose size is a constant of the graph."""
    at = _SIZED[node.op_type]
    for name in node.input[at : at + 1]:
        tensor = known.get(name)
        if tensor is None or tensor.external_data or tensor.data_type not in (6, 7):
            continue
        code = "q" if tensor.data_type == 7 else "i"
        values = list(tensor.int64_data or tensor.int32_data)
        if tensor.raw_data:
            values = list(struct.unpack(f"<{len(tensor.raw_data) // struct.calcsize(code)}{code}", tensor.raw_data))
        total = sum(map(abs, values)) if node.op_type == "Pad" else math.prod(max(1, abs(v)) for v in values)
        if total > _ELEMENTS:
            yield f"{node.op_type} {node.name!r:.80} makes {total:,} numbers"


def _stored(weights: Path) -> dict[tuple[int, int], tuple[int, int]]:
    """(first byte, bytes) -> (ONNX's dtype, bytes by shape) of every tensor of a safetensors file that is whole."""
    again = "get the file again, or export the model again"
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_BYTES:
                raise ValueError(f"its header has {length:,} bytes")
            header = parse_json(file.read(length))
            end = file.seek(0, 2)
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            number, size = _DTYPES[entry["dtype"]]
            if not 0 <= first <= last <= end - 8 - length:
                raise ValueError(f"{name} lies outside it")
            found[8 + length + first, last - first] = number, size * math.prod(entry["shape"])
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{weights} is not a safetensors file ({error!s:.200})", again) from None
