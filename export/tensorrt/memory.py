"""Estimate the memory that a build needs, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnxscript import optimizer

from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph_file

# While TensorRT times tactics, the GPU holds the weights twice: as given, and in the kernel's layout.
# The host also holds the parsed network and the serialized engine.
_COPIES_DEVICE, _COPIES_HOST = 2, 3


@dataclass(frozen=True)
class Estimate:
    """Bytes of the weights, of the activations alive at once at the largest shapes, and of the whole build."""

    weights: int
    activations: int
    device: int
    host: int

    def __str__(self) -> str:
        needs = f"about {_gb(self.device)} on the GPU and {_gb(self.host)} of host memory"
        return f"{needs} (an estimate from the graph with unfused attention, not calibrated on real builds)"


def estimate(bundle: Bundle, component: Component, sizes: Mapping[str, int], workspace: int | None) -> Estimate:
    """Estimate a build.

    Args:
        sizes: dimension -> its largest size in any optimization profile.
        workspace: limit of the workspace memory pool in bytes, None for no limit.
    """
    weights = bundle.file(component.weights).stat().st_size
    activations = peak(bundle, component, sizes)
    device = _COPIES_DEVICE * weights + activations + min(workspace or activations, 8 * activations)
    return Estimate(weights, activations, device, _COPIES_HOST * weights)


def peak(bundle: Bundle, component: Component, sizes: Mapping[str, int]) -> int:
    """The most bytes of tensors alive at once when the nodes run in the graph's order at given sizes, unfused."""
    graph = _at(ir.load(graph_file(bundle, component)), sizes).graph
    bytes_of = {v.name: _bytes(v) for v in (*graph.input, *graph.value_info, *graph.output)}
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


def _at(model: ir.Model, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """The graph at given sizes, with the shape of every tensor; weights are not read.

    ONNX's shape inference does not follow shapes that nodes compute, so those nodes are folded to constants first.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape([d if isinstance(d, int) else sizes.get(d.value, d) for d in value.shape])
    optimizer.fold_constants(model, onnx_shape_inference=True, input_size_limit=1024, output_size_limit=1024)
    return onnx.shape_inference.infer_shapes(ir.to_proto(model), data_prop=True)


def _bytes(value) -> int:
    count = 1
    for dim in value.type.tensor_type.shape.dim:
        count *= dim.dim_value or 1
    if not value.type.tensor_type.HasField("shape"):
        return 0
    return count * onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{max(1, size // 10**6)} MB"
