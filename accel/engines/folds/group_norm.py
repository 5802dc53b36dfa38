"""Group normalization as a scale and a shift per channel, in a graph of OpenVINO.

    y = (x - mean_g) / sqrt(var_g + eps) * weight_c + bias_c = x * scale_c + shift_c

OpenVINO normalizes over [batch, groups, rest], which holds in memory only where channels come first, while its
convolutions want them last: two reorders of the whole tensor around every norm. Means over height and width can be
taken in any layout; what is left is small, [batch, channels], and x is read once more with SiLU and quantization at
its side. The variance is E[x^2] - E[x]^2 of float32 sums: with a mean of ten deviations it loses 1e-5 of its value.
Where channels are few (digits), the small operators between cost more than the reorders did.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .upsample import CHANNELS


def fold(model: Any) -> int:
    """Replace every group normalization of an `openvino.Model`, in place; returns how many there were."""
    found = 0
    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "MVN" or not (parts := _parts(norm)):
            continue
        data, groups, end, affine = parts
        end.output(0).replace(_scaled(data, groups, norm.get_attributes()["eps"], affine).output(0))
        found += 1
    if found:
        model.validate_nodes_and_infer_types()
    return found


def _parts(norm: Any) -> tuple[Any, int, Any, list[tuple[str, Any]]] | None:
    """What is normalized [N, C, H, W], the groups, the last node, and factors and summands on the way there.

    An export writes it as `Reshape` to [N, groups, rest], instance normalization with a scale and a bias per group,
    `Reshape` back, and a scale and a bias per channel.
    """
    before = norm.input_value(0).get_node()
    own = norm.get_attributes()
    if before.get_type_name() != "Reshape" or own["eps_mode"] != "INSIDE_SQRT" or not own["normalize_variance"]:
        return None
    data, grouped = before.input_value(0), norm.input_value(0).get_partial_shape()
    axes = norm.input_value(1).get_node()
    if data.get_partial_shape().rank.get_length() != 4 or grouped.rank.get_length() != 3:
        return None
    if axes.get_type_name() != "Constant" or axes.data.tolist() not in ([2], [-1]):
        return None
    channels = data.get_partial_shape()[1]
    if channels.is_dynamic or channels.get_length() < CHANNELS or grouped[1].is_dynamic:
        return None
    affine: list[tuple[str, Any]] = []
    node, reshaped = norm, False
    while True:
        after = [target.get_node() for target in node.output(0).get_target_inputs()]
        after = [other for other in after if other.get_type_name() != "ShapeOf"]  # of the shape to go back to
        if len(after) != 1:
            break
        (following,) = after
        kind = following.get_type_name()
        if kind == "Reshape" and not reshaped:
            reshaped = True
        elif kind in ("Multiply", "Add") and (vector := _vector(following, node, reshaped)) is not None:
            affine.append((kind, vector))
        else:
            break
        node = following
    back = node.output(0).get_partial_shape()
    if not reshaped or back.rank != data.get_partial_shape().rank:
        return None
    return data, grouped[1].get_length(), node, affine


def _vector(node: Any, data: Any, channels: bool) -> Any:
    """The other input of a sum or a product as [1, n, 1, 1], if it has one value per group or per channel."""
    from openvino import opset13

    other = next((v for v in node.input_values() if v.get_node().get_friendly_name() != data.get_friendly_name()), None)
    if other is None or other.get_partial_shape().is_dynamic:
        return None
    shape, count = list(other.get_shape()), data.output(0).get_partial_shape()[1]
    rank = 4 if channels else 3
    if count.is_dynamic or [1] * (rank - len(shape)) + shape != [1, count.get_length(), *[1] * (rank - 2)]:
        return None
    return opset13.reshape(other, [1, count.get_length(), 1, 1], False)


def _scaled(data: Any, groups: int, eps: float, affine: list[tuple[str, Any]]) -> Any:
    """`data` times a scale plus a shift, [N, C, 1, 1] each."""
    from openvino import opset13 as op

    channels = data.get_partial_shape()[1].get_length()
    space, within = (op.constant(np.array(axes, np.int64)) for axes in ([2, 3], [2]))

    def of_groups(means: Any) -> Any:
        """[N, C, 1, 1] -> [N, groups, 1, 1]"""
        return op.reduce_mean(op.reshape(means, [0, groups, channels // groups, 1], True), within, keep_dims=True)

    def of_channels(vector: Any) -> Any:
        """[N, groups or C, 1, 1] -> [N, groups, C / groups, 1], or such that it broadcasts to it"""
        if vector.get_output_partial_shape(0)[1].get_length() == channels:
            return op.reshape(vector, [0, groups, channels // groups, 1], True)
        return vector

    mean = of_groups(op.reduce_mean(data, space, keep_dims=True))
    square = of_groups(op.reduce_mean(op.multiply(data, data), space, keep_dims=True))
    variance = op.relu(op.subtract(square, op.multiply(mean, mean)))  # rounding may make it negative
    scale = op.power(op.add(variance, op.constant(np.float32(eps))), op.constant(np.float32(-0.5)))
    shift = op.negative(op.multiply(mean, scale))
    for kind, vector in affine:
        vector = of_channels(vector)
        if kind == "Multiply":
            scale, shift = op.multiply(scale, vector), op.multiply(shift, vector)
        else:
            shift = op.add(shift, vector)
    if scale.get_output_partial_shape(0)[2].get_length() == 1:  # nothing was per channel
        scale, shift = (op.broadcast(v, [1, groups, channels // groups, 1], "BIDIRECTIONAL") for v in (scale, shift))
    scale, shift = (op.reshape(v, [0, channels, 1, 1], True) for v in (scale, shift))
    return op.add(op.multiply(data, scale), shift)
