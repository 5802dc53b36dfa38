"""Which precision a built engine really computes in, as TensorRT's engine inspector reports it.

TensorRT 11 has no precision flags any more; tools that still asked for one got float32 engines and never noticed. So
every build ends here: the layers that do the work (convolutions, matrix products, attention) are counted by datatype,
and an engine of an fp16 or int8 graph that computes mostly in float32 is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from accel.errors import UserError

# LayerType as the inspector spells it: CaskConvolution, gemm, MatrixMultiply, fmha, ... In fused kernels of the graph
# compiler (LayerType kgen, names such as __myl_FcMulAdd_myl0_8) only the name shows it.
_HEAVY_TYPE = re.compile(r"conv|gemm|matrix|matmul|attention|mha", re.IGNORECASE)
_HEAVY_NAME = re.compile(r"__myl_\w*?(Fc|Conv|Gemm|MatMul|Mha)")
_NOT_COMPUTE = re.compile(r"reformat|copy|shuffle|constant|signal|wait", re.IGNORECASE)
# The order counts: "BFloat16" contains "float". "Channel major FP16" and "Half" mean the same.
_DATATYPES = (
    ("bf16", re.compile(r"bf16|bfloat", re.IGNORECASE)),
    ("fp16", re.compile(r"fp16|half|float16", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8|e4m3", re.IGNORECASE)),
    ("int8", re.compile(r"int8", re.IGNORECASE)),
    ("fp32", re.compile(r"float|fp32", re.IGNORECASE)),
)
# With detailed profiling verbosity, each layer names the ONNX nodes that it was made of.
_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TACTICS = (
    ("int8", re.compile(r"i8i8|i8f|s8s8|imma", re.IGNORECASE)),
    ("fp16", re.compile(r"f16f16|h\d{4}|hmma|fp16", re.IGNORECASE)),
    ("bf16", re.compile(r"bf16", re.IGNORECASE)),
    ("fp32", re.compile(r"f32f32|tf32|sgemm|fp32", re.IGNORECASE)),
)


def audit(information: str) -> dict[str, Any]:
    """Count an engine's layers by the precision they compute in.

    Args:
        information: `EngineInspector.get_engine_information` in JSON, of an engine built with detailed profiling
            verbosity.

    Returns:
        `layers`: number of all layers; `heavy`: precision or "unknown" -> number of convolutions, matrix products and
        attentions; `float32_layers`: names of heavy float32 layers, at most 20; `int8_nodes`: names of the ONNX nodes
        that heavy int8 layers were made of.
    """
    try:
        layers = json.loads(information).get("Layers", [])
    except (ValueError, AttributeError):
        layers = []
    heavy: Counter[str] = Counter()
    float32, int8_nodes = [], []
    for layer in layers:
        if isinstance(layer, Mapping) and _is_heavy(layer):
            precision = _precision(layer)
            heavy[precision] += 1
            if precision == "fp32":
                float32.append(str(layer.get("Name"))[:200])
            if precision == "int8":
                int8_nodes += _NODE.findall(str(layer.get("Metadata", "")))
    return {
        "layers": len(layers),
        "heavy": dict(sorted(heavy.items())),
        "float32_layers": float32[:20],
        "int8_nodes": int8_nodes,
    }


def check(component: str, wanted: str, counts: Mapping[str, Any]) -> str:
    """Refuse an engine that does not compute in the precision of its graph.

    Args:
        wanted: the graph's precision: fp32, fp16, bf16 or int8.
        counts: what `audit` returned.

    Returns:
        The counts as one line.

    Raises:
        UserError: when more than half of the heavy layers are float32, or none of an int8 graph's is int8.
    """
    heavy = counts["heavy"]
    known = {name: count for name, count in heavy.items() if name != "unknown"}
    total = sum(known.values())
    if not total:
        return "the engine inspector does not report the precision of its layers"
    text = ", ".join(f"{count} in {name}" for name, count in known.items())
    unknown = f"; {heavy['unknown']} more of unknown precision" if heavy.get("unknown") else ""
    low = wanted in ("fp16", "bf16", "int8")
    if low and known.get("fp32", 0) * 2 > total or wanted == "int8" and not known.get("int8"):
        raise UserError(
            f"{component} was to run in {wanted}, but of its {total} convolutions and matrix products TensorRT runs "
            f"{text}; the engine is not kept",
            f"check the ONNX graph's precision: accel inspect BUNDLE; or export again with --precision {wanted}",
        )
    return f"{total} convolutions and matrix products: {text}{unknown}"


def _is_heavy(layer: Mapping[str, Any]) -> bool:
    kind = str(layer.get("LayerType", ""))
    if _NOT_COMPUTE.search(kind):
        return False
    return bool(_HEAVY_TYPE.search(kind) or _HEAVY_NAME.match(str(layer.get("Name", ""))))


def _precision(layer: Mapping[str, Any]) -> str:
    """The datatype of the first input that has one (what is added later may be wider), else that of the tactic."""
    for tensor in layer.get("Inputs") or ():
        text = str(tensor.get("Format/Datatype", "")) if isinstance(tensor, Mapping) else ""
        for name, pattern in _DATATYPES:
            if pattern.search(text):
                return name
    for name, pattern in _TACTICS:
        if pattern.search(str(layer.get("TacticName", ""))):
            return name
    return "unknown"
