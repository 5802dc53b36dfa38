"""Estimate the memory that a build needs, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from onnxscript import optimizer

from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph_file

# While TensorRT times tactics, the GPU holds the weights twice: as given, and in the kernel's layout.
# The host also holds the parsed network and the serialized engine.
_COPIES_DEVICE, _COPIES_HOST = 2, 3.5
# Of the library itself, and of the code it makes for each node (TensorRT-RTX 1.7 on a CPU: docs/tensorrt.md).
_LIBRARY, _PER_NODE = 300 << 20, 100 << 10
_FOLDED = 1024  # elements of a constant that is computed here
_HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_FUSED_HEADS = range(16, 257)  # sizes of a head
_ELEMENTWISE = ("Cast", "Mul", "Div", "Add", "Identity", "Where")


@dataclass(frozen=True)
class Estimate:
    """Bytes of the weights, of the activations alive at once at the largest shapes, and of the whole build."""

    weights: int
    activations: int
    device: int
    host: int

    def text(self, gpu: bool = True) -> str:
        """In words.

        Args:
            gpu: whether the build happens on one.
        """
        host = f"{_gb(self.host)} of host memory"
        if not gpu:
            return f"about {host}; running it about {_gb(self.activations)} on the card beside its weights"
        return f"about {_gb(self.device)} on the GPU and {host} (an estimate from the graph)"


def estimate(bundle: Bundle, component: Component, sizes: Mapping[str, int], workspace: int | None) -> Estimate:
    """Estimate a build.

    Args:
        sizes: dimension -> its largest size in any optimization profile.
        workspace: limit of the workspace memory pool in bytes, None for no limit.
    """
    return of_graph(
        graph_file(bundle, component), bundle.file(component.weights).stat().st_size, sizes, workspace=workspace
    )


def of_graph(path: Path, weights: int, sizes: Mapping[str, int], *, workspace: int | None = None) -> Estimate:
    """`estimate` of a graph's file and the bytes of its weights."""
    model = ir.load(path)
    nodes = len(model.graph)
    activations = _peak(model, sizes)
    device = _COPIES_DEVICE * weights + activations + min(workspace or activations, 8 * activations)
    return Estimate(weights, activations, device, int(_LIBRARY + _COPIES_HOST * weights + _PER_NODE * nodes))


def peak(bundle: Bundle, component: Component, sizes: Mapping[str, int]) -> int:
    """The most bytes of tensors alive at once when the nodes run in the graph's order at given sizes.

    Nothing is fused but attention, whose scores a kernel never holds as a whole where it has one.
    """
    return _peak(ir.load(graph_file(bundle, component)), sizes)


def _peak(model: ir.Model, sizes: Mapping[str, int]) -> int:
    graph = _at(model, sizes).graph
    values = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    bytes_of = {name: _bytes(value) for name, value in values.items()}
    bytes_of |= dict.fromkeys((*fused_scores(graph, values), *_of_weights(graph)), 0)
    last_use = {name: i for i, node in enumerate(graph.node) for name in node.input}
    last_use |= {v.name: len(graph.node) for v in graph.output}
    alive = {v.name: bytes_of[v.name] for v in graph.input}
    highest = sum(alive.values())
    for i, node in enumerate(graph.node):
        alive |= {name: bytes_of.get(name, 0) for name in node.output if name}
        highest = max(highest, sum(alive.values()))
        for name in [name for name in (*node.input, *node.output) if last_use.get(name, i) <= i]:
            alive.pop(name, None)
    return highest


def fused_scores(graph: onnx.GraphProto, values: Mapping[str, onnx.ValueInfoProto]) -> set[str]:
    """Tensors of attention scores in 16-bit heads of 16 to 256, for which TensorRT has kernels that keep none.

    Scores are what lies between the product with the keys and that with the values, around a softmax.
    """
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: set[str] = set()
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        scores, name = {softmax.input[0]}, softmax.input[0]
        while (node := maker.get(name)) is not None and node.op_type in _ELEMENTWISE:
            # of a scale or a mask, the other side is the product's
            name = next((i for i in node.input if _leads_to_product(i, maker)), "")
            scores.add(name)
        keys = maker.get(name)
        name = softmax.output[0]
        scores.add(name)
        while len(after := readers.get(name, [])) == 1 and after[0].op_type in _ELEMENTWISE:
            name = after[0].output[0]
            scores.add(name)
        if keys is None or keys.op_type != "MatMul" or not any(node.op_type == "MatMul" for node in after):
            continue
        queries = values.get(keys.input[0])
        kind = queries.type.tensor_type if queries is not None else None
        if kind is not None and kind.elem_type in _HALVES and kind.shape.dim:
            if kind.shape.dim[-1].dim_value in _FUSED_HEADS:
                found |= scores
    return found


def _leads_to_product(name: str, maker: Mapping[str, onnx.NodeProto]) -> bool:
    while (node := maker.get(name)) is not None and node.op_type in _ELEMENTWISE:
        name = node.input[0]
    return node is not None and node.op_type == "MatMul"


def _at(model: ir.Model, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """The graph at given sizes, with the shape of every tensor; weights are not read.

    ONNX's shape inference does not follow shapes that nodes compute, so those nodes are folded to constants first.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([d if isinstance(d, int) else sizes.get(d.value, d) for d in value.shape])
    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=_FOLDED, output_size_limit=_FOLDED, should_fold=_may_fold
    )
    return onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)


def _may_fold(node: ir.Node) -> bool | None:
    """Not a weight: the folder turns a weight of any size around, which would read it and hold it."""
    constants = (value.const_value for value in node.inputs if value is not None)
    return False if any(constant is not None and constant.size > _FOLDED for constant in constants) else None


def _of_weights(graph: onnx.GraphProto) -> set[str]:
    """Tensors that are computed from weights alone: a compiler computes them once and keeps them as weights."""
    found = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and all(name in found for name in node.input if name):
            found.update(node.output)
    return found


def _bytes(value) -> int:
    count = 1
    for dim in value.type.tensor_type.shape.dim:
        count *= dim.dim_value or 1
    if not value.type.tensor_type.HasField("shape"):
        return 0
    return count * onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{max(1, size // 10**6)} MB"
