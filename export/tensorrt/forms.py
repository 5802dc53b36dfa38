"""Forms of a graph that a compiler fuses better, and that compute the same numbers.

TensorRT-RTX 1.7, as its own list of layers tells (`benchmarks/tensorrt_rtx_layers.py`):

* An int8 convolution whose weights have a scale per output channel writes float32: twice the bytes of the float16 that
  the graph asks for. With one scale for all channels it writes float16, and the next kernel multiplies by the rest.
* A 1 x 1 convolution in front of a transformer block (SD1.5) leaves its output in the layout of images. The layer
  normalization behind it is then two kernels, with a float32 tensor of full size between them. As a product of tokens,
  which is what SD2 and SDXL have there, it is one.
* The group normalization in front of a VAE's attention is on [batch, channels, pixels], and is not recognized as one:
  its parts hand each other 17 MB of float32 for an image of 512 px. On [batch, channels, height, width] it is one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

_TO_TOKENS, _TO_IMAGE = [0, 2, 3, 1], [0, 3, 1, 2]
_HIGH = {onnx.TensorProto.INT8: 127, onnx.TensorProto.FLOAT8E4M3FN: 448}  # largest number, in units of the scale
_LARGEST = float(np.finfo(np.float16).max)


def scalar_scales(model: onnx.ModelProto, folder: Path) -> int:
    """Give float16 int8 and fp8 convolutions one weight scale, a power of two, and multiply by what is left of each.

    Both factors are exact. A convolution stays as it is where they would not be, or where the products of some inputs
    could leave float16's range before the second factor.

    Args:
        model: changed in place.
        folder: of the graph's weights.

    Returns:
        How many convolutions were changed.
    """
    given = {tensor.name: tensor for tensor in model.graph.initializer}
    dequantized = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    nodes, count = [], 0
    for node in model.graph.node:
        nodes.append(node)
        sides = [dequantized.get(name) for name in node.input[:2]]
        if node.op_type != "Conv" or None in sides:
            continue
        x, w = sides
        if not {x.input[1], *w.input[:2]} <= given.keys() or given[w.input[0]].data_type not in _HIGH:
            continue
        step, scale, weight = (
            numpy_helper.to_array(given[name], str(folder)) for name in (x.input[1], w.input[1], w.input[0])
        )
        if scale.dtype != np.float16 or scale.ndim != 1:
            continue
        top = np.exp2(np.ceil(np.log2(scale.astype(np.float32).max())))
        rest = (scale.astype(np.float32) / top).astype(np.float16)
        sums = np.abs(weight.astype(np.float32)).reshape(len(weight), -1).sum(1).max()
        high = _HIGH[given[w.input[0]].data_type]
        if (rest.astype(np.float32) * top != scale).any() or float(step) * top * high * sums > _LARGEST:
            continue
        one, factor = f"{node.name}_scale", f"{node.name}_channels"
        model.graph.initializer.extend(
            [
                numpy_helper.from_array(np.array(top, np.float16), one),
                numpy_helper.from_array(rest.reshape(1, -1, 1, 1), factor),
            ]
        )
        nodes[-1:] = [helper.make_node("DequantizeLinear", [w.input[0], one], [f"{node.name}_weight"]), node]
        node.input[1] = f"{node.name}_weight"
        out, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
        node.output[0] = f"{out}_unscaled"
        nodes.append(helper.make_node("Mul", [node.output[0], factor], [f"{out}_scaled" if bias else out]))
        if bias:
            del node.input[2]
            spread = f"{node.name}_bias"
            value = numpy_helper.to_array(given[bias], str(folder)).reshape(1, -1, 1, 1)
            model.graph.initializer.append(numpy_helper.from_array(value, spread))
            nodes.append(helper.make_node("Add", [f"{out}_scaled", spread], [out]))
        count += 1
    _replace(model, nodes)
    return count


def linear_projections(model: onnx.ModelProto, folder: Path) -> int:
    """Write 1 x 1 convolutions between images and tokens as products of tokens; weights keep their names.

    Args:
        model: changed in place.
        folder: not read.

    Returns:
        How many convolutions were changed.
    """
    dims = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in model.graph.output}

    def only_reader(name: str) -> onnx.NodeProto | None:
        found = readers.get(name, [])
        return found[0] if len(found) == 1 and name not in outputs else None

    nodes: list[onnx.NodeProto] = []
    gone, count = set(), 0
    for node in model.graph.node:
        if not _is_projection(node, dims):
            nodes.append(node)
            continue
        turn, before = only_reader(node.output[0]), maker.get(node.input[0])
        flatten = only_reader(turn.output[0]) if turn is not None and _perm(turn) == _TO_TOKENS else None
        unflatten = maker.get(before.input[0]) if before is not None and _perm(before) == _TO_IMAGE else None
        out = node.output[0]
        if flatten is not None and flatten.op_type == "Reshape":
            nodes.append(helper.make_node("Transpose", [node.input[0]], [f"{out}_turned"], perm=_TO_TOKENS))
            nodes.append(helper.make_node("Reshape", [f"{out}_turned", flatten.input[1]], [f"{out}_tokens"]))
            nodes += _product(node, f"{out}_tokens", flatten.output[0])
            gone |= {id(turn), id(flatten)}
        elif unflatten is not None and unflatten.op_type == "Reshape" and _alone(only_reader, unflatten, before, node):
            nodes += _product(node, unflatten.input[0], f"{out}_tokens")
            nodes.append(helper.make_node("Reshape", [f"{out}_tokens", unflatten.input[1]], [f"{out}_turned"]))
            nodes.append(helper.make_node("Transpose", [f"{out}_turned"], [out], perm=_TO_IMAGE))
            gone |= {id(before), id(unflatten)}
        else:
            nodes.append(node)
            continue
        count += 1
    _replace(model, [node for node in nodes if id(node) not in gone])
    return count


def _alone(only_reader: Callable[[str], Any], *chain: onnx.NodeProto) -> bool:
    """Whether each node of a chain is the only one that reads the one before."""
    return all(only_reader(first.output[0]) is second for first, second in zip(chain, chain[1:], strict=False))


def norms_of_images(model: onnx.ModelProto, folder: Path) -> int:
    """Normalize groups before the pixels of an image are put in a row, not after.

    Args:
        model: changed in place.
        folder: not read.

    Returns:
        How many normalizations were changed.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    images = {v.name for v in inferred.value_info if len(v.type.tensor_type.shape.dim) == 4}
    maker = {name: node for node in model.graph.node for name in node.output}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    behind: dict[int, list[onnx.NodeProto]] = {}
    count = 0
    for norm in [node for node in model.graph.node if node.op_type == "InstanceNormalization"]:
        groups = maker.get(norm.input[0])
        row = _untransposed(groups.input[0], maker) if groups is not None and groups.op_type == "Reshape" else None
        chain = _readers_of(norm, ("Reshape", "Mul", "Add"), readers)
        if row is None or row.op_type != "Reshape" or row.input[0] not in images or not chain:
            continue
        back, *affine = chain
        spread = [node for part in affine for name in part.input if (node := maker.get(name)) is not None]
        spread = [node for node in spread if node.op_type == "Unsqueeze"]
        if len(spread) != 2 or any(len(readers[node.output[0]]) != 1 for node in spread):
            continue
        axes, shape, out = f"{norm.name}_axes", f"{norm.name}_shape", affine[-1].output[0]
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.int64), axes))
        groups.input[0] = row.input[0]
        back.input[1] = shape
        behind[id(groups)] = [helper.make_node("Shape", [row.input[0]], [shape])]
        for node in spread:
            node.input[1] = axes
        affine[-1].output[0] = f"{out}_image"
        behind[id(affine[-1])] = [helper.make_node("Reshape", [f"{out}_image", row.input[1]], [out])]
        count += 1
    _replace(model, [new for node in model.graph.node for new in (node, *behind.get(id(node), []))])
    return count


def _untransposed(name: str, maker: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """What makes a tensor that was transposed there and back; None for any other."""
    for _ in range(2):
        node = maker.get(name)
        if node is None or _perm(node) != [0, 2, 1]:
            return None
        name = node.input[0]
    return maker.get(name)


def _readers_of(
    node: onnx.NodeProto, operators: tuple[str, ...], readers: Mapping[str, list[onnx.NodeProto]]
) -> list[onnx.NodeProto]:
    """The nodes that read a node one after another, each alone; [] where they are others."""
    found = []
    for operator in operators:
        after = readers.get(node.output[0], [])
        if len(after) != 1 or after[0].op_type != operator:
            return []
        node = after[0]
        found.append(node)
    return found


def _is_projection(node: onnx.NodeProto, dims: Mapping[str, list[int]]) -> bool:
    shape = dims.get(node.input[1], []) if node.op_type == "Conv" else []
    if shape[2:] != [1, 1] or shape[0] != shape[1]:  # of as many channels, so the shapes of the tokens stay
        return False
    set_ = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = all(set(set_.get(name, [one])) == {one} for name, one in (("strides", 1), ("dilations", 1), ("pads", 0)))
    return plain and set_.get("group", 1) == 1


def _perm(node: onnx.NodeProto) -> list[int]:
    found = [list(a.ints) for a in node.attribute if a.name == "perm"] if node.op_type == "Transpose" else []
    return found[0] if found else []


def _product(node: onnx.NodeProto, given: str, out: str) -> list[onnx.NodeProto]:
    """A 1 x 1 convolution as a product of [..., in] with its weights; it keeps the node's name."""
    weight, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
    flat, matrix, product = (f"{node.output[0]}_{name}" for name in ("flat", "matrix", "product"))
    made = [
        helper.make_node("Flatten", [weight], [flat], axis=1),
        helper.make_node("Transpose", [flat], [matrix], perm=[1, 0]),
        helper.make_node("MatMul", [given, matrix], [product if bias else out], name=node.name),
    ]
    if bias:
        made.append(helper.make_node("Add", [product, bias], [out]))
    return made


def _replace(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    held = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(held)


FORMS: Mapping[str, Callable[[onnx.ModelProto, Path], int]] = {
    "scalar_scales": scalar_scales,
    "linear_projections": linear_projections,
    "norms_of_images": norms_of_images,
}
