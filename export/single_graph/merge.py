"""Put the graph of a component into a larger one, and the weights that are used into one file."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import onnx

from accel.errors import UserError
from accel.models.weight_files import read_header

from .nodes import Nodes, Value

Values = list[onnx.ValueInfoProto]
WEIGHTS = "weights.safetensors"
_CHUNK = 1 << 24
_ITEM_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16}


class Merged:
    """Nodes, and the constants and weights of every component that was put in, once."""

    def __init__(self, scope: str = "accel") -> None:
        self.nodes = Nodes(scope)
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.opsets: dict[str, int] = {}
        self.ir_version = 0

    def put(self, model: onnx.ModelProto, scope: str, inputs: Mapping[str, Value], call: str = "") -> dict[str, str]:
        """Append a component's nodes.

        Args:
            model: its graph, the weights in their file.
            scope: before the names of its constants; a second call of it shares them.
            inputs: the tensor for each of its inputs.
            call: tells the calls of one component apart.

        Returns:
            Its outputs by name.
        """
        for opset in model.opset_import:
            if self.opsets.setdefault(opset.domain, opset.version) != opset.version:
                fix = "export the bundle again: all components with one --opset"
                raise UserError(f"{scope} has opset {opset.version}, others {self.opsets[opset.domain]}", fix)
        self.ir_version = max(self.ir_version, model.ir_version)
        names = {name: self.nodes.name_of(value) for name, value in inputs.items()} | {"": ""}
        for tensor in model.graph.initializer:
            names[tensor.name] = f"{scope}/{tensor.name}"
            if names[tensor.name] not in self.initializers:
                copy = onnx.TensorProto()
                copy.CopyFrom(tensor)
                copy.name = names[tensor.name]
                self.initializers[copy.name] = copy
        prefix = f"{scope}/{call}" if call else scope
        for node in model.graph.node:
            if bodies(node):
                raise UserError(f"{scope} has a graph inside its node {node.name}", "export the bundle again")
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            names |= {name: f"{prefix}/{name}" for name in node.output if name}
            copy.name = f"{prefix}/{node.name or node.output[0]}"
            copy.input[:] = [names[name] for name in node.input]
            copy.output[:] = [names[name] for name in node.output]
            self.nodes.nodes.append(copy)
        return {value.name: names[value.name] for value in model.graph.output}

    def adopt(self, body: Merged, *, widened: bool = False) -> None:
        """Take over what a loop's body may read from outside, its weights, and its opsets.

        ONNX Runtime Web finds the file of weights of the outer graph alone.

        Args:
            widened: quantized weights become float outside, once for all rows. For products with quantized weights ONNX
                Runtime lays these out anew, and in a body it does not find them.
        """
        if widened:
            stored = {*body.initializers, *(tensor.name for tensor in body.nodes.constants.values()), ""}
            wide = [n.op_type == "DequantizeLinear" and stored.issuperset(n.input) for n in body.nodes.nodes]
            pairs = list(zip(body.nodes.nodes, wide, strict=True))
            self.nodes.nodes += [node for node, moves in pairs if moves]
            body.nodes.nodes = [node for node, moves in pairs if not moves]
        self.initializers |= body.initializers
        body.initializers = {}
        self.opsets |= body.opsets
        self.ir_version = max(self.ir_version, body.ir_version)

    def model(self, name: str, inputs: Values, outputs: Values) -> onnx.ModelProto:
        opsets = [onnx.helper.make_opsetid(domain, number) for domain, number in self.opsets.items()]
        graph = self.graph(name, inputs, outputs)
        return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=self.ir_version, producer_name="accel")

    def graph(self, name: str, inputs: Values, outputs: Values) -> onnx.GraphProto:
        """The graph, without what no output needs."""
        wanted, kept = {value.name for value in outputs}, []
        for node in reversed(self.nodes.nodes):
            if wanted & set(node.output):
                wanted |= set(node.input)
                for body in bodies(node):
                    wanted |= {used for inner in body.node for used in inner.input}
                kept.append(node)
        constants = [*self.initializers.values(), *self.nodes.constants.values()]
        used = [tensor for tensor in constants if tensor.name in wanted]
        return onnx.helper.make_graph(kept[::-1], name, inputs, outputs, used)


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node: a loop's body."""
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def gather_weights(models: list[onnx.ModelProto], sources: Mapping[str, Path], out: Path) -> int:
    """Write every weight that the graphs use into one safetensors file, and let the graphs point into it.

    Args:
        models: their names of weights begin with the component's name and a slash.
        sources: weights of each component.

    Returns:
        Number of bytes of the weights.
    """
    external = [
        tensor
        for model in models
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    used = {tensor.name for tensor in external}
    entries = []  # (name, entry, file, first byte)
    for component, path in sources.items():
        length, header = read_header(path)
        for name, entry in header.items():
            if f"{component}/{name}" in used:
                entries.append((f"{component}/{name}", entry, path, 8 + length + entry["data_offsets"][0]))
    # Large items first, so that each one lies at a multiple of its size.
    entries.sort(key=lambda entry: -_ITEM_BITS.get(entry[1]["dtype"], 8))
    placed, position = {}, 0
    for name, entry, _, _ in entries:
        begin, end = entry["data_offsets"]
        placed[name] = entry | {"data_offsets": [position, position + end - begin]}
        position += end - begin
    header = json.dumps({"__metadata__": {"format": "pt"}} | placed, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 64 + 56)  # with the eight bytes before it, the data begins at a multiple of 64
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, _, path, start in entries:
            begin, end = placed[name]["data_offsets"]
            _copy(path, start, end - begin, file)
    for tensor in external:
        begin, end = placed[tensor.name]["data_offsets"]
        del tensor.external_data[:]
        where = {"location": out.name, "offset": 8 + len(header) + begin, "length": end - begin}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
    return position


def _copy(path: Path, start: int, length: int, to) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while length and (chunk := file.read(min(_CHUNK, length))):
            to.write(chunk)
            length -= len(chunk)
    if length:
        raise UserError(f"{path} is too short", "export the bundle again")
