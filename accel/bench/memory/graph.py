"""The most memory that the activations of an ONNX graph take at once, from its shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ...bundle import Bundle, Component
from ...bundle.graph_file import graph_file

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_FOLDED = 1024  # elements of a constant that is computed here
_HALVES = (10, 16)  # ONNX's numbers of float16 and bfloat16
_FUSED_HEADS = range(16, 257)  # sizes of a head
_ELEMENTWISE = ("Cast", "Mul", "Div", "Add", "Identity", "Where")


def peak(bundle: Bundle, component: Component, sizes: Mapping[str, int], engine: str = "") -> int:
    """The most bytes of tensors alive at once when the nodes run in the graph's order at given sizes.

    Nothing is fused but attention, whose scores a kernel never holds as a whole where it has one.
    """
    import onnx_ir as ir

    return peak_of(ir.load(graph_file(bundle, component, engine)), sizes)


def peak_of(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """`peak` of a graph that is changed."""
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
    import onnx
    import onnx_ir as ir
    from onnxscript import optimizer

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


def _bytes(value: Any) -> int:
    import onnx

    count = 1
    for dim in value.type.tensor_type.shape.dim:
        count *= dim.dim_value or 1
    if not value.type.tensor_type.HasField("shape"):
        return 0
    return count * onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
