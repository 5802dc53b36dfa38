"""Find the nodes of an ONNX graph that TensorRT's parser does not support, without a build.

The table is the operator matrix that NVIDIA publishes with the parser (onnx-tensorrt, docs/operators.md), as of
TensorRT 10.15: opsets 9 to 24, also for strongly typed networks. It covers operators, types and attributes; whether a
kernel exists for a shape is known only to the builder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

SOURCE = "onnx-tensorrt docs/operators.md, TensorRT 10.15"
OPSETS = range(9, 25)

_F = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"})  # DOUBLE is cast down
_FI = _F | {"INT32", "INT64"}
_ALL = _FI | {"BOOL"}
_BOOL = frozenset({"BOOL"})
_QUANTIZED = frozenset({"INT8", "FLOAT8E4M3FN", "FLOAT4E2M1", "INT4"})

_TYPES: tuple[tuple[frozenset[str], str], ...] = (
    (
        _F,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh "
        "CumSum Dropout Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization "
        "GRU HardSigmoid HardSwish Hardmax InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax "
        "LRN LSTM LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu QuantizeLinear RandomNormal "
        "RandomNormalLike RandomUniform RandomUniformLike Reciprocal Resize RMSNormalization RNN Round Scan Selu "
        "Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu TopK Upsample",
    ),
    (
        _F - {"BFLOAT16"},
        "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign",
    ),
    (
        _FI,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod "
        "Mul Neg Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin "
        "ReduceProd ReduceSum ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub "
        "Sum",
    ),
    (
        _ALL,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity If Loop OneHot Reshape "
        "ReverseSequence Shape Size Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    (_ALL | {"UINT8"}, "Cast CastLike"),
    (_ALL | _QUANTIZED, "Constant ConstantOfShape"),
    (_FI | {"INT8"}, "Gelu"),
    (_F | {"INT8", "FLOAT8E4M3FN"}, "Attention"),
    (_F | {"INT64"}, "RotaryEmbedding"),
    (_QUANTIZED, "DequantizeLinear"),
    (_BOOL, "And Not Or Xor"),
    (frozenset({"FLOAT"}), "STFT"),
)
MATRIX: Mapping[str, frozenset[str]] = {name: kinds for kinds, names in _TYPES for name in names.split()}
# How many inputs have a type of the matrix, where it is not all: indices and shapes are integers whatever the data is,
# and zero points have a rule of their own.
_DATA_INPUTS = dict.fromkeys(("ConstantOfShape", "OneHot", "Loop"), 0) | dict.fromkeys(
    "Gather GatherElements GatherND Reshape Expand Slice Split Squeeze Unsqueeze Tile Resize Pad TopK DequantizeLinear "
    "QuantizeLinear CumSum ReverseSequence Dropout Trilu Upsample".split(),
    1,
)


@dataclass(frozen=True)
class Problem:
    """A node that TensorRT's parser does not support, and why."""

    node: str
    operator: str
    reason: str


def check(graph: str | Path | onnx.ModelProto) -> list[Problem]:
    """The nodes whose operator, types or attributes the matrix does not list.

    Args:
        graph: a model, or its file; weights are not read.
    """
    model = graph if isinstance(graph, onnx.ModelProto) else onnx.load(str(graph), load_external_data=False)
    problems = []
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version not in OPSETS:
            reason = f"opset {entry.version} is outside {OPSETS.start} to {OPSETS.stop - 1}"
            problems.append(Problem("(graph)", "", reason))
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:
        inferred = model
    return problems + list(_walk(inferred.graph, {}, {}))


Constants = Mapping[str, Any]  # name -> TensorProto, None where it is given in another form


def _walk(graph: onnx.GraphProto, outer: Mapping[str, int], constants: Constants) -> Iterator[Problem]:
    types = dict(outer)
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    constants = {**constants, **{t.name: t for t in graph.initializer}}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = next((a.t for a in node.attribute if a.HasField("t")), None)
    for node in graph.node:
        reason = _reason(node, types, constants)
        if reason:
            yield Problem(node.name or node.output[0], node.op_type, reason)
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _walk(inner, types, constants)


def _reason(node: onnx.NodeProto, types: Mapping[str, int], constants: Constants) -> str:
    if node.domain not in ("", "ai.onnx"):
        return f"the domain {node.domain!r} is not standard ONNX; TensorRT would need a plugin"
    if node.op_type not in MATRIX:
        return "TensorRT's parser has no such operator"
    data = node.input[: _DATA_INPUTS.get(node.op_type, len(node.input))]
    if node.op_type in ("Where", "If"):
        data = data[1:]
    for name in [*data, *(node.output[:1] if node.op_type in ("Cast", "ConstantOfShape", "Range") else [])]:
        kind = TensorProto.DataType.Name(types.get(name, 0))
        if kind != "UNDEFINED" and kind not in MATRIX[node.op_type]:
            return f"{name} is {kind}, and TensorRT supports {', '.join(sorted(MATRIX[node.op_type]))} there"
    rule = _RULES.get(node.op_type)
    return rule(node, {a.name: helper.get_attribute_value(a) for a in node.attribute}, constants) if rule else ""


def _resize(node: onnx.NodeProto, at: Mapping[str, Any], constants: Constants) -> str:
    modes = {  # ONNX's default first
        "coordinate_transformation_mode": "half_pixel pytorch_half_pixel tf_half_pixel_for_nn asymmetric align_corners",
        "mode": "nearest linear",
        "nearest_mode": "round_prefer_floor round_prefer_ceil floor ceil",
        "keep_aspect_ratio_policy": "stretch",
    }
    for name, allowed in modes.items():
        value = at.get(name, allowed.split()[0])
        value = value.decode() if isinstance(value, bytes) else value
        if value not in allowed.split():
            return f"{name} = {value}, and TensorRT supports {', '.join(allowed.split())}"
    return "antialiasing is not supported" if at.get("antialias") else ""


def _constant_input(index: int, what: str) -> Callable[..., str]:
    def rule(node: onnx.NodeProto, at: Mapping[str, Any], constants: Constants) -> str:
        given = len(node.input) > index and node.input[index]
        return f"{what} must be a constant" if given and node.input[index] not in constants else ""

    return rule


def _symmetric(node: onnx.NodeProto, at: Mapping[str, Any], constants: Constants) -> str:
    if len(node.input) < 3 or not node.input[2]:
        return ""
    tensor = constants.get(node.input[2])
    if tensor is None:
        return "its zero point must be a constant"
    if tensor.external_data:
        return ""  # the weights are not read here
    return "its zero point is not 0: quantize symmetrically" if onnx.numpy_helper.to_array(tensor).any() else ""


def _one_output(node: onnx.NodeProto, at: Mapping[str, Any], constants: Constants) -> str:
    return f"only its first output is supported, {len(node.output)} are used" if any(node.output[1:]) else ""


def _only_values(**values: Any) -> Callable[..., str]:
    """A rule: these attributes only with these values."""

    def rule(node: onnx.NodeProto, at: Mapping[str, Any], constants: Constants) -> str:
        for name, allowed in values.items():
            value = at.get(name, allowed)
            value = value.decode() if isinstance(value, bytes) else value
            if value != allowed and not (allowed == 1 and isinstance(value, list) and set(value) <= {1}):
                return f"{name} = {value} is not supported"
        return ""

    return rule


def _attention(node: onnx.NodeProto, at: Mapping[str, Any], constants: Constants) -> str:
    if any(node.input[4:]) or any(node.output[1:]):
        return "past and present keys and values, and the scores as an output, are not supported"
    for name in ("softcap", "qk_matmul_output_mode", "q_num_heads", "kv_num_heads"):
        if at.get(name):
            return f"{name} is not supported: give queries, keys and values as [batch, heads, length, size]"
    return ""


_RULES: Mapping[str, Callable[..., str]] = {
    "Resize": _resize,
    "Attention": _attention,
    "QuantizeLinear": _symmetric,
    "DequantizeLinear": _symmetric,
    "LayerNormalization": _one_output,
    "MaxPool": _one_output,
    "AveragePool": _only_values(dilations=1),
    "LpPool": _only_values(dilations=1),
    "ScatterND": _only_values(reduction="none"),
    "LSTM": _only_values(input_forget=0, layout=0),
    "CumSum": _constant_input(1, "axis"),
    "OneHot": _constant_input(1, "depth"),
    **{name: _constant_input(1, "axes") for name in MATRIX if name.startswith("Reduce")},
}
