"""One network into a bundle: weights, graph, and the proof that the graph is the network."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from accel import int8_packed, networks
from accel.bundle import Component
from accel.networks import Network
from accel.profiles import Range

from . import check, onnx, precision, uint8

Step = Callable[[str, int], None]
Feeds = Mapping[str, torch.Tensor]


def write(
    network: Network, chosen: precision.Plan, batches: Sequence[Feeds], truth: Sequence[Sequence[torch.Tensor]],
    limits: Mapping[str, Range], folder: Path, *, opset: int, step: Step, layers: Mapping[str, Any] | None = None,
) -> Component:
    """Write weights and graph of a network whose config lies in `folder` already, and check them.

    Args:
        network: its weights are consumed on the way, so that there is never a second copy of them in memory.
        chosen: dtypes.
        batches: inputs to check with.
        truth: what the float32 network answers to them.
        limits: range of each symbolic dimension.
        layers: {name: traits} of the layers that are packed in int8 (`accel.int8_packed`).

    Raises:
        UserError: when the graph differs from torch by more than the gate.
    """
    name, kind = network.name, network.kind
    inputs, outputs = (precision.with_dtype(specs, chosen.dtype) for specs in (network.inputs, network.outputs))
    parameters = precision.save_weights(network.module.model, folder / onnx.WEIGHTS, chosen)
    del network
    gc.collect()
    module = networks.rebuild(kind, folder / "config.json", folder / onnx.WEIGHTS, inputs, outputs, layers)
    networks.keep_float32(module.model, chosen.float32, chosen.wide)
    network = Network(name, kind, module, inputs, outputs)

    step("tracing", 1)
    onnx.export_graph(network, limits, folder, opset=opset)
    operators = check.structure(folder / onnx.GRAPH)

    step("checking against torch", 2)
    low = [_cast(feeds, inputs) for feeds in batches]
    expected = [[t.numpy() for t in run] for run in truth]
    graphs = {folder / onnx.GRAPH: _run(module, low)}
    if layers:
        graphs[uint8.derive(folder)] = _with_outputs(module, low)
    del module, network
    gc.collect()
    step("checking against torch", 3)
    parity: dict[str, Any] = {}
    for graph, own in graphs.items():
        exported = [[a.astype("float32") for a in run] for run in check.run_onnx(graph, low)]
        # Where everything stayed float32 there is no rounding to allow for.
        found = check.gate(
            name, "int8" if layers else chosen.dtype, check.worst(exported, expected), check.worst(own, expected)
        )
        parity |= found if graph.name == onnx.GRAPH else {graph.name: found}
    return Component(
        name=name,
        kind=kind,
        graph=f"{folder.name}/{onnx.GRAPH}",
        weights=f"{folder.name}/{onnx.WEIGHTS}",
        inputs=inputs,
        outputs=outputs,
        dims=limits,
        dtype=chosen.dtype,
        float32=chosen.float32,
        wide=chosen.wide,
        parameters=parameters,
        parity=parity
        | {"shapes": [{k: list(v.shape) for k, v in feeds.items()} for feeds in batches]}
        | {"operators": operators, "precision_reason": chosen.reason},
    )


def batches(network: Network, limits: Mapping[str, Range]) -> list[dict[str, torch.Tensor]]:
    """Random inputs to check with, at two sizes within the profile: the smallest, and one that differs in every
    free dimension. Height and width of one tensor pair grow by different steps, so that swapped axes cannot hide."""

    def sizes(steps: Mapping[str, int]) -> dict[str, int]:
        result = {}
        for dim, limit in limits.items():
            grow = next((n for side, n in steps.items() if side in dim), 0)
            result[dim] = min(limit.max, limit.min + grow * limit.multiple)
        return result

    chosen = [sizes({}), sizes({"height": 1, "width": 2, "batch": 1, "images": 1})]
    return [onnx.example(network.inputs, own, seed=seed) for seed, own in enumerate(chosen)]


def _run(module: torch.nn.Module, feeds: Sequence[Feeds]) -> list[list[Any]]:
    with torch.no_grad():
        return [[t.float().numpy() for t in module(**own)] for own in feeds]


def _with_outputs(module: torch.nn.Module, feeds: Sequence[Feeds]) -> list[list[Any]]:
    int8_packed.set_outputs(module, True)
    return _run(module, feeds)


def _cast(feeds: Feeds, specs) -> dict[str, torch.Tensor]:
    return {spec.name: feeds[spec.name].to(getattr(torch, spec.dtype)) for spec in specs}
