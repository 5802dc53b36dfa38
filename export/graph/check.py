"""The checks of an exported graph: standard operators only, valid ONNX, and equal to torch."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from accel.errors import MissingPackage, UserError
from accel.int8.config import is_product
from accel.int8.packed import PackedLinear
from accel.parity import relative_l2

FP32_GATE = 1e-4
FP16_FACTOR = 2.0
# int8 rounding is chaotic from end to end: inputs that differ by 1e-6 give outputs that differ by 5 %. So the graph's
# error against float32 is compared with that of torch's own int8; layer by layer the two agree to 1e-5 (`layers`).
INT8_FACTOR = 1.2
# Above this error float16 itself fails on the network, and a graph that is no worse than torch proves nothing.
FP16_WORST = 0.05


def structure(graph: Path) -> dict[str, int]:
    """Run onnx.checker with shape inference and check that every node is standard ONNX.

    Returns:
        Number of nodes by operator type.
    """
    onnx.checker.check_model(str(graph), full_check=True)
    model = onnx.load(str(graph), load_external_data=False)
    nodes = model.graph.node
    foreign = sorted({f"{node.domain}.{node.op_type}" for node in nodes if node.domain not in ("", "ai.onnx")})
    if foreign or model.functions:
        raise UserError(f"the graph uses operators outside standard ONNX: {', '.join(foreign)}", "please report this")
    counts: dict[str, int] = {}
    for node in nodes:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def run_onnx(graph: Path, batches: Sequence[dict[str, torch.Tensor]]) -> list[list[np.ndarray]]:
    """Run a graph as it is written on ONNX Runtime's CPU provider (without its optimiser, which copies the weights)."""
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackage("onnxruntime", "checking an export", "cpu") from None
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {name: t.numpy() for name, t in feeds.items()}) for feeds in batches]
    del session
    gc.collect()
    return outputs


def worst(candidates: Sequence[Sequence[np.ndarray]], references: Sequence[Sequence[np.ndarray]]) -> float:
    """Largest relative L2 error over all batches and outputs; infinite when a candidate is not finite."""
    errors = [
        relative_l2(candidate, reference) if np.isfinite(candidate).all() else float("inf")
        for run, reference_run in zip(candidates, references, strict=True)
        for candidate, reference in zip(run, reference_run, strict=True)
    ]
    return max(errors)


def gate(component: str, precision: str, onnx_error: float, torch_error: float) -> dict[str, float]:
    """Compare the error of an exported graph with its limit, and return both.

    Args:
        onnx_error: relative L2 of the graph's output against float32 torch.
        precision: dtype of the network, or "int8" if some of its layers are int8.
        torch_error: the same for torch in the exported precision: the noise floor, 0 for fp32.

    Raises:
        UserError: when the error exceeds the limit, or the precision alone destroys the output.
    """
    broken = not math.isfinite(torch_error) or precision == "float16" and torch_error > FP16_WORST
    if precision != "float32" and broken:
        raise UserError(
            f"{component}: {precision} alone changes the output by {torch_error:.2e} (relative L2), in torch too",
            "--precision fp32",
        )
    limit = {"float32": FP32_GATE, "int8": max(FP32_GATE, INT8_FACTOR * torch_error)}.get(
        precision, FP16_FACTOR * torch_error
    )
    if not onnx_error <= limit:
        raise UserError(
            f"{component}: the exported graph differs from torch by {onnx_error:.2e} (relative L2; limit {limit:.2e})",
            "try another --opset or --precision fp32, and report the model",
        )
    return {"relative_l2": float(onnx_error), "limit": float(limit), "torch_relative_l2": float(torch_error)}


def layers(
    graph: Path, model: torch.nn.Module, feeds: dict[str, torch.Tensor], names: Sequence[str]
) -> dict[str, float]:
    """Compare each int8 layer of a graph with torch's, given the same input as in the graph.

    Args:
        graph: the canonical or the uint8 file; for the latter the outputs of `model` must be quantized too
            (`packed.set_outputs`).
        model: the inner model with packed layers.
        feeds: inputs of the graph.
        names: layers to compare.

    Returns:
        {layer: relative L2 of its output}.
    """
    proto = onnx.load(str(graph), load_external_data=False)
    reads: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            reads.setdefault(name, []).append(node)
    ends = {name: _ends(reads, name) for name in names}
    wanted = sorted({tensor for pair in ends.values() for tensor in pair} - {v.name for v in proto.graph.output})
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in wanted)
    exposed = graph.with_name(f"{graph.stem}.exposed.onnx")  # the same graph, with inner tensors as outputs
    try:
        onnx.save(proto, str(exposed))
        (outputs,) = run_onnx(exposed, [feeds])
    finally:
        exposed.unlink(missing_ok=True)
    tensors = dict(zip(wanted, outputs, strict=True))
    errors = {}
    for name, (*starts, end) in ends.items():
        layer, inputs = model.get_submodule(name), [torch.from_numpy(tensors[start]) for start in starts]
        with torch.no_grad():
            own = layer.rounded(*inputs, layer.dequantized(1)) if isinstance(layer, PackedLinear) else layer(*inputs)
        errors[name] = relative_l2(own.float().numpy(), tensors[end].astype("float32"))
    return errors


def _ends(reads: dict[str, list[onnx.NodeProto]], layer: str) -> tuple[str, ...]:
    """Find the quantized inputs of a layer (one, or a product's two) and its output, by the layer's initializers."""

    def reader(tensor: str, *ops: str) -> onnx.NodeProto:
        return next(node for node in reads[tensor] if node.op_type in ops)

    if is_product(layer):
        sides = [reader(f"{layer}.{side}_scale", "QuantizeLinear") for side in ("left", "right")]
        node = reader(reader(sides[0].output[0], "DequantizeLinear").output[0], "MatMul")
        return *(quantize.input[0] for quantize in sides), node.output[0]
    quantize = reader(f"{layer}.input_scale", "QuantizeLinear")
    node = reader(reader(quantize.output[0], "DequantizeLinear").output[0], "Conv", "MatMul")
    if node.op_type == "MatMul" and f"{layer}.bias" in reads:
        node = reader(node.output[0], "Add")
    if f"{layer}.output_scale" in reads:
        node = reader(f"{layer}.output_scale", "DequantizeLinear")
    return quantize.input[0], node.output[0]
