"""Which precision a built engine really computes in, as TensorRT itself lists its layers.

TensorRT 11 and RTX have no precision flags; tools that still asked for one got float32 engines and never noticed. So
every build ends here. The layers that do the work (convolutions, matrix products, attention) are counted by datatype
and compared, node by node, with the graph that they were made of: a layer that computes wider than its node is one the
graph's precision was lost for, and the engine is refused.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph
from accel.dtypes import ALWAYS_FLOAT32
from accel.errors import UserError

from .layers import Layer, Tensor

# LayerType as TensorRT spells it: correlation (a convolution of the graph compiler), CaskConvolution, gemm, fmha, ...
# In fused kernels (kgen, runtime_fusion) only the name shows it: __myl_FcMulAdd_myl0_8, __myl_CorrCastAdd_myl0_33,
# _gemm_mha_v2_myl0_23.
_HEAVY_TYPE = re.compile(r"correlation|conv|gemm|matrix|matmul|attention|mha", re.IGNORECASE)
_HEAVY_NAME = re.compile(r"__myl_\w*?(Fc|Corr|Conv|Gemm|MatMul|Mha)|_?gemm|\w*_mha_|\w*fmha")
FUSED_ATTENTION = re.compile(r"mha", re.IGNORECASE)
_NOT_COMPUTE = re.compile(r"reformat|copy|shuffle|constant|signal|wait", re.IGNORECASE)
# The order counts: "BFloat16" contains "float". "Channel major FP16" and "Half" mean the same.
_DATATYPES = (
    ("bf16", re.compile(r"bf16|bfloat", re.IGNORECASE)),
    ("fp16", re.compile(r"fp16|half|float16", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8|e4m3", re.IGNORECASE)),
    ("int8", re.compile(r"int8", re.IGNORECASE)),
    ("fp32", re.compile(r"float|fp32", re.IGNORECASE)),
)
_TACTICS = (
    ("int8", re.compile(r"i8i8|i8f|s8s8|imma", re.IGNORECASE)),
    ("fp16", re.compile(r"f16f16|h\d{4}|hmma|fp16", re.IGNORECASE)),
    ("bf16", re.compile(r"bf16", re.IGNORECASE)),
    ("fp32", re.compile(r"f32f32|tf32|sgemm|fp32", re.IGNORECASE)),
)
_QUANTIZED = ("int8", "fp8")
_WIDTH = {"int8": 0, "fp8": 1, "fp16": 2, "bf16": 2, "fp32": 3}
_MOVES = ("Cast", "Transpose", "Reshape", "Identity", "QuantizeLinear", "DequantizeLinear", "Unsqueeze", "Squeeze")
_OPERATORS = ("Conv", "ConvTranspose", "MatMul", "Gemm", "Attention", "Einsum")
_ONNX = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
}
_SHOWN = 20


def expected(bundle: Bundle, component: Component) -> dict[str, str]:
    """ONNX node -> the precision that a component's graph gives it, for its convolutions, products and attentions."""
    return of_graph(graph(bundle, component))


def of_graph(model: onnx.ModelProto) -> dict[str, str]:
    """`expected` of a graph. A node whose operands are all dequantized computes in int8 or fp8; another in its first
    input's: where weights alone are quantized, its activations decide.
    """
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    through = ("Transpose", "Reshape", "Unsqueeze", "Squeeze")  # these move integers as well as floats
    low: dict[str, str] = {}  # tensor -> what it was dequantized from
    for node in inferred.node:
        if node.op_type == "DequantizeLinear":
            low[node.output[0]] = _ONNX.get(types.get(node.input[0], 0), "unknown")
        elif node.op_type in through and node.input[0] in low:
            low |= dict.fromkeys(node.output, low[node.input[0]])
    return {
        node.name: low[node.input[0]]
        if low.keys() >= set(node.input[:2])
        else _ONNX.get(types.get(node.input[0], 0), "unknown")
        for node in inferred.node
        if node.op_type in _OPERATORS
    }


def audit(layers: Sequence[Layer], nodes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Count an engine's layers by the precision they compute in.

    Args:
        layers: those of an engine that was built with detailed profiling verbosity.
        nodes: ONNX node -> precision, as `expected` gives it.

    Returns:
        `layers`: number of all layers; `heavy`: precision or "unknown" -> number of convolutions, matrix products and
        attentions; `fused_attentions`: attentions that are one kernel; `float32_layers`: names of heavy float32
        layers, at most 20; `float32_in_graph`: how many of them have a float32 node in the graph;
        `wider`: {layer, node, graph, engine} of layers that compute in float32 although all of
        their nodes are lower, at most 20; `int8_nodes`: names of the ONNX nodes that heavy int8 or fp8 layers were made
        of; `int8_share`: [how many int8 or fp8 nodes of the graph run so, how many it has].
    """
    nodes = nodes or {}
    heavy: Counter[str] = Counter()
    float32, wider, int8_nodes, fused, explained = [], [], [], 0, 0
    for layer in filter(_is_heavy, layers):
        precision = _precision(layer)
        heavy[precision] += 1
        fused += bool(FUSED_ATTENTION.search(layer.name + layer.kind))
        if precision == "fp32":
            float32.append(layer.name[:200])
        if precision in _QUANTIZED:
            int8_nodes += layer.nodes
        known = {name: nodes[name] for name in layer.nodes if name in nodes}
        if precision == "fp32" and known and all(_WIDTH.get(kind, 3) < 3 for kind in known.values()):
            name, kind = next(iter(known.items()))
            wider.append({"layer": layer.name[:200], "node": name, "graph": kind, "engine": precision})
        elif precision == "fp32" and known:
            explained += 1
    found = {
        "layers": len(layers),
        "heavy": dict(sorted(heavy.items())),
        "fused_attentions": fused,
        "float32_layers": float32[:_SHOWN],
        "float32_in_graph": explained,
        "wider": wider[:_SHOWN],
        "int8_nodes": int8_nodes,
    }
    if quantized := {name for name, kind in nodes.items() if kind in _QUANTIZED}:
        found["int8_share"] = [len(quantized & set(int8_nodes)), len(quantized)]
    return found


def check(component: str, wanted: str, counts: Mapping[str, Any]) -> str:
    """Refuse an engine that does not compute in the precision of its graph.

    Args:
        wanted: the graph's precision: fp32, fp16, bf16, int8 or fp8.
        counts: what `audit` returned.

    Returns:
        The counts as one line.

    Raises:
        UserError: when nothing is known of the engine's precision; when a layer computes in float32 whose nodes are
            lower in the graph; when more than half of the heavy layers are float32 in a lower graph; or when none of
            an int8 or fp8 graph's is.
    """
    heavy = counts["heavy"]
    known = {name: count for name, count in heavy.items() if name != "unknown"}
    total = sum(known.values())
    if not total:
        raise UserError(
            f"TensorRT does not tell in which precision the layers of {component} compute "
            f"({counts['layers']} layers, {heavy.get('unknown', 0)} of them convolutions or matrix products), so the "
            "engine is not kept",
            "report this with the version of TensorRT (accel doctor)",
        )
    text = ", ".join(f"{count} in {name}" for name, count in known.items())
    unknown = f"; {heavy['unknown']} more of unknown precision" if heavy.get("unknown") else ""
    if wider := counts.get("wider"):
        first, more = wider[0], f" and {len(wider) - 1} more" if len(wider) > 1 else ""
        raise UserError(
            f"{component} was to run in {wanted}, but TensorRT computes {first['node']}{more} in float32, which the "
            f"graph has in {first['graph']} (layer {first['layer']}); the engine is not kept",
            f"check the ONNX graph's precision: accel inspect BUNDLE; or export again with --precision {wanted}",
        )
    low = wanted in ("fp16", "bf16", *_QUANTIZED)
    lost = known.get("fp32", 0) - counts.get("float32_in_graph", 0)
    if low and lost * 2 > total or wanted in _QUANTIZED and not known.get(wanted):
        raise UserError(
            f"{component} was to run in {wanted}, but of its {total} convolutions and matrix products TensorRT runs "
            f"{text}; the engine is not kept",
            f"check the ONNX graph's precision: accel inspect BUNDLE; or export again with --precision {wanted}",
        )
    made, of = counts.get("int8_share", (0, 0))
    done = f"; {made} of {of} {wanted} nodes" if of else ""
    fused = f"; {counts['fused_attentions']} fused attentions" if counts.get("fused_attentions") else ""
    return f"{total} convolutions and matrix products: {text}{unknown}{done}{fused}"


def unexplained(component: Component, model: onnx.ModelProto, nodes: Mapping[str, str]) -> list[str]:
    """Float32 nodes of a lower graph that its record does not explain: their weights' modules are no fp32 fallback.

    A graph in which one layer was turned to float32 builds without a word, because the graph decides.
    """
    if component.dtype == "float32":
        return []
    weights = {tensor.name for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    # A product of two activations has no weights to go by; only fallbacks of whole blocks have such in float32.
    blocks = not set(component.float32) <= set(ALWAYS_FLOAT32)
    found = []
    for node in model.graph.node:
        if nodes.get(node.name) != "fp32":
            continue
        weight = next((name for given in node.input if (name := _origin(given, maker)) in weights), None)
        if not (any(weight.startswith(f"{part}.") for part in component.float32) if weight else blocks):
            found.append(f"{node.name} ({weight or node.op_type})")
    return found


def _origin(name: str, maker: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor that one is made of by moving, casting or rounding it."""
    while (node := maker.get(name)) is not None and node.op_type in _MOVES:
        name = node.input[0]
    return name


def _is_heavy(layer: Layer) -> bool:
    if _NOT_COMPUTE.search(layer.kind):
        return False
    return bool(_HEAVY_TYPE.search(layer.kind) or _HEAVY_NAME.match(layer.name))


def _precision(layer: Layer) -> str:
    """The wider datatype of the two operands of a product; else that of the tactic.

    The operands are the first input (what is added later may be wider) and the weights, or the second input where
    there are none. Weights show a product that a fused kernel casts its input for.
    """
    inputs = [kind for tensor in layer.inputs if (kind := datatype(tensor)) not in ("", "index")]
    weights = [tensor for tensor in layer.constants if sum(size > 1 for size in tensor.shape) > 1]
    operands = inputs[:1] if weights else inputs[:2] if layer.kind == "gemm" else inputs[:1]
    if weights:
        operands.append(datatype(max(weights, key=lambda tensor: _count(tensor.shape))))
    operands = [kind for kind in operands if kind in _WIDTH]
    if operands:
        return max(operands, key=_WIDTH.__getitem__)
    return next((name for name, pattern in _TACTICS if pattern.search(layer.tactic)), "unknown")


def datatype(tensor: Tensor) -> str:
    if re.fullmatch(r"(?i)u?int(32|64)|bool", tensor.datatype.strip()):
        return "index"  # a shape, or the place of a slice
    return next((name for name, pattern in _DATATYPES if pattern.search(tensor.datatype)), "")


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= max(size, 1)
    return count
