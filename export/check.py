"""What an exported graph must pass before it counts: standard operators only, valid, and equal to torch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from accel.errors import MissingPackage, UserError
from accel.parity import relative_l2

FP32_GATE = 1e-4
FP16_FACTOR = 2.0
# Beyond this, float16 itself does not work on the network, and being no worse than it proves nothing.
FP16_WORST = 0.05


def structure(graph: Path) -> dict[str, int]:
    """Run onnx.checker with shape inference and make sure that every node is standard ONNX.

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
    """Run a graph on ONNX Runtime's CPU provider, as written (no optimiser, so no second copy of the weights)."""
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
    """Decide whether an exported graph is the same network.

    Args:
        onnx_error: relative L2 of the graph's output against float32 torch.
        torch_error: the same for torch in the exported precision: the noise floor (0 for fp32).

    Raises:
        UserError: when the error exceeds the gate, or the precision alone destroys the output.
    """
    if precision != "float32" and not torch_error <= FP16_WORST:
        raise UserError(
            f"{component}: {precision} changes the output by {torch_error:.2e} (relative L2) in torch already",
            "--precision fp32",
        )
    limit = FP32_GATE if precision == "float32" else FP16_FACTOR * torch_error
    if not onnx_error <= limit:
        raise UserError(
            f"{component}: the exported graph differs from torch by {onnx_error:.2e} (relative L2; limit {limit:.2e})",
            "try another --opset or --precision fp32, and report the model",
        )
    return {"relative_l2": float(onnx_error), "limit": float(limit), "torch_relative_l2": float(torch_error)}
