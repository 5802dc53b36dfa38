"""Upsampling and convolution as a transposed convolution, in a graph of OpenVINO.

int8 stays int8: upsampling repeats values, so the scale of the activation is the same before it. Sums of weights are
rounded to int8 again, with a scale of their own per output channel.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .upsample import CHANNELS, transposed

_QUANTIZATION = ("FakeQuantize", "Convert", "Subtract", "Multiply")  # what OpenVINO reads a QDQ pair as
_NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
_SAME = {"strides": [1, 1], "dilations": [1, 1], "pads_begin": [1, 1], "pads_end": [1, 1]}


def fold(model: Any) -> int:
    """Replace every such pair of an `openvino.Model`, in place; returns how many there were."""
    from openvino import opset13

    pairs = 0
    for conv in model.get_ordered_ops():
        if conv.get_type_name() != "Convolution" or not _has(conv, _SAME):
            continue
        above = [conv, *_chain(conv, _QUANTIZATION)]
        upsample, weight = _source(above[-1]), _weight(conv)
        if weight is None or not _doubles(upsample):
            continue
        filters, scale = weight
        folded: Any = opset13.constant(filters)
        if scale is not None:
            folded = opset13.multiply(opset13.convert(folded, "f32"), opset13.constant(scale))
        above[-1].input(0).replace_source_output(upsample.input_value(0))
        data = conv.input_value(0)
        made = opset13.convolution_backprop_data(data, folded, [2, 2], pads_begin=[1, 1], pads_end=[1, 1])
        made.set_friendly_name(conv.get_friendly_name())
        conv.output(0).replace(made.output(0))
        pairs += 1
    if pairs:
        model.validate_nodes_and_infer_types()
    return pairs


def _source(node: Any, place: int = 0) -> Any:
    return node.input_value(place).get_node()


def _chain(node: Any, types: tuple[str, ...], place: int = 0) -> list[Any]:
    """The nodes of these types above an input, nearest first."""
    found = []
    node = _source(node, place)
    while node.get_type_name() in types:
        found.append(node)
        node = _source(node)
    return found


def _has(node: Any, wanted: dict[str, Any]) -> bool:
    own = node.get_attributes()
    return all(own.get(key) == value for key, value in wanted.items())


def _doubles(node: Any) -> bool:
    """Whether it repeats every pixel twice in both directions, for one reader alone."""
    if node.get_type_name() != "Interpolate" or not _has(node, _NEAREST | {"shape_calculation_mode": "scales"}):
        return False
    scales = _source(node, 1)
    if scales.get_type_name() != "Constant" or len(node.output(0).get_target_inputs()) != 1:
        return False
    return scales.data.tolist() == [1, 1, 2, 2]


def _weight(conv: Any) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The folded filters of a 3 x 3 convolution, and in int8 their scale [1, out, 1, 1]; None where it has others."""
    chain = _chain(conv, _QUANTIZATION, 1)
    constant = _source(chain[-1] if chain else conv, 0 if chain else 1)
    if constant.get_type_name() != "Constant" or list(constant.get_shape())[2:] != [3, 3]:
        return None
    if constant.get_shape()[1] < CHANNELS:
        return None
    if not chain and constant.data.dtype == np.float32:
        return transposed(constant.data), None
    if [node.get_type_name() for node in chain] != ["Multiply", "Convert"] or constant.data.dtype != np.int8:
        return None
    above = _chain(chain[0], ("Reshape",), 1)
    scale = _source(above[-1] if above else chain[0], 0 if above else 1)
    if scale.get_type_name() != "Constant":
        return None
    filters = transposed(constant.data.astype(np.float32) * scale.data.reshape(-1, 1, 1, 1))
    peak = np.abs(filters).max((0, 2, 3), keepdims=True)
    step = np.where(peak > 0, peak / 127, 1).astype(np.float32)
    return np.rint(filters / step).astype(np.int8), step
