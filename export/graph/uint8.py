"""Derive the int8 graph that ONNX Runtime runs in int8 on a CPU from the canonical one.

The canonical graph quantizes activations to signed bytes around zero, which TensorRT demands and OpenVINO accepts. ONNX
Runtime's x86 kernels want unsigned activations: q + 128 with zero point 128 is exactly the same number. And it uses its
integer convolution (QLinearConv) only if the convolution's output is quantized too, by the scale that was calibrated or
learned for it. Both graphs refer to the same weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors import safe_open

from .trace import GRAPH, WEIGHTS

FILE = "model.uint8.onnx"
_ZERO = "uint8_zero_point"
_PAIR = ("QuantizeLinear", "DequantizeLinear")


def derive(folder: Path) -> Path:
    """Write `folder/model.uint8.onnx` beside `folder/model.onnx`; returns its path."""
    model = onnx.load(str(folder / GRAPH), load_external_data=False)
    rewrite(model, output_scales(folder / WEIGHTS))
    onnx.save(model, str(folder / FILE))
    return folder / FILE


def output_scales(weights: Path) -> dict[str, np.ndarray]:
    """{layer: scale of its output}, read from a component's weights."""
    with safe_open(weights, "np") as file:
        names = [name for name in file.keys() if name.endswith(".output_scale")]  # noqa: SIM118 (not a dict)
        return {name.removesuffix(".output_scale"): file.get_tensor(name) for name in names}


def rewrite(model: onnx.ModelProto, scales: dict[str, np.ndarray]) -> None:
    """Change a canonical graph in place: activations to uint8, outputs of convolutions quantized by `scales`."""
    graph = model.graph
    signed = {
        tensor.name
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8 and not tensor.dims and not numpy_helper.to_array(tensor)
    }
    graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), _ZERO))
    weights = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    nodes = []
    for node in graph.node:
        if node.op_type in _PAIR and len(node.input) > 2 and node.input[2] in signed:
            node.input[2] = _ZERO
        nodes.append(node)
        layer = weights.get(node.input[1], "").removesuffix(".weight") if node.op_type == "Conv" else ""
        if layer not in scales:
            continue
        out, scale = node.output[0], f"{layer}.output_scale"
        graph.initializer.append(numpy_helper.from_array(scales[layer], scale))
        node.output[0] = f"{out}_float"
        nodes.append(helper.make_node(_PAIR[0], [node.output[0], scale, _ZERO], [f"{out}_uint8"]))
        nodes.append(helper.make_node(_PAIR[1], [f"{out}_uint8", scale, _ZERO], [out]))
    unused = signed - {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name not in unused]
    for field, values in ((graph.node, nodes), (graph.initializer, kept)):
        held = [type(value).FromString(value.SerializeToString()) for value in values]
        del field[:]
        field.extend(held)
