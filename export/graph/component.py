"""Export one network into a bundle: its weights, its graph, and the check that the graph equals the network."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from accel.bundle import Component
from accel.bundle.shape_profiles import Range
from accel.int8 import packed
from accel.int8.formats import INT8, of_layer
from accel.models import networks
from accel.models.networks import Network

from . import check, precision, trace, uint8
from .fp16_reference import SummedInFloat32

Step = Callable[[str, int], None]
Feeds = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """The float32 reference of a network, taken before anything is done to it, and the dtypes derived from it.

    Attributes:
        batches: inputs to check with.
        outputs: the float32 network's outputs for them.
        chosen: the dtypes to export in.
    """

    batches: Sequence[Feeds]
    outputs: Sequence[Sequence[torch.Tensor]]
    chosen: precision.DtypePolicy


def reference_of(
    network: Network, limits: Mapping[str, Range], dtypes: str, *, family: str, scaling_factor: float | list[float]
) -> Reference:
    """Run a network in float32 at two sizes of its profile, and choose its dtypes.

    Args:
        limits: range of each symbolic dimension.
        dtypes: fp32 or fp16.
        family, scaling_factor: of the pipeline.
    """
    feeds = [_as_decoded(own, scaling_factor) for own in batches(network, limits)]
    # Magnitudes decide about float16 alone, and take as long as the network.
    outputs, peaks = (
        (precision.run(network.module, feeds), {}) if dtypes == "fp32" else precision.scan(network.module, feeds)
    )
    # diffusers, too, reads this field for SDXL alone: the older VAEs have it and do not need it.
    upcast = family == "sdxl" and network.kind.startswith("vae_") and network.module.model.config.get("force_upcast")
    return Reference(feeds, outputs, precision.choose(network, dtypes, peaks, force_upcast=bool(upcast)))


def exported(
    network: Network,
    dims: Mapping[str, Range],
    precision: str,
    folder: Path,
    *,
    opset: int,
    step: Step,
    family: str,
    scaling_factor: float | list[float],
) -> Component:
    """Write config, weights and graph of a network as it was loaded, and check the graph against it.

    Args:
        dims: range of each symbolic dimension, of others as well.
        precision: fp32 or fp16.
        family, scaling_factor: of the pipeline.

    Raises:
        UserError: as `write`.
    """
    used = {d for spec in (*network.inputs, *network.outputs) for d in spec.shape if isinstance(d, str)}
    limits = {dim: dims[dim] for dim in sorted(used)}
    # The reference is the source as it was loaded, so a config or weight lost on the way into the bundle shows too.
    reference = reference_of(network, limits, precision, family=family, scaling_factor=scaling_factor)
    networks.save_config(network, folder)
    return write(network, reference, limits, folder, opset=opset, step=step)


def write(
    network: Network,
    reference: Reference,
    limits: Mapping[str, Range],
    folder: Path,
    *,
    opset: int,
    step: Step,
    layers: Mapping[str, Any] | None = None,
) -> Component:
    """Write the weights and the graph of a network whose config is in `folder` already, and check them.

    Args:
        network: its weights are freed on the way, so that there is never a second copy of them in memory.
        reference: the float32 outputs, and the dtypes to write.
        limits: range of each symbolic dimension.
        layers: {name: traits} of the layers that are packed (`accel.int8.packed`).

    Raises:
        UserError: when the graph differs from torch by more than the limit.
    """
    name, kind, chosen = network.name, network.kind, reference.chosen
    inputs, outputs = (precision.with_dtype(specs, chosen.dtype) for specs in (network.inputs, network.outputs))
    parameters = precision.save_weights(network.module.model, folder / trace.WEIGHTS, chosen)
    del network
    gc.collect()
    module = networks.rebuild(kind, folder / "config.json", folder / trace.WEIGHTS, inputs, outputs, layers)
    networks.keep_float32(module.model, chosen.float32, chosen.fp32_output)
    network = Network(name, kind, module, inputs, outputs)

    step("tracing", 1)
    trace.export_graph(network, limits, folder, opset=opset)
    operators = check.structure(folder / trace.GRAPH)

    step("checking against torch", 2)
    low = [_cast(feeds, inputs) for feeds in reference.batches]
    expected = [[t.numpy() for t in run] for run in reference.outputs]
    # In float32 nothing is rounded: what torch gives is the reference itself.
    graphs = {folder / trace.GRAPH: expected if chosen.dtype == "float32" and not layers else _run(module, low)}
    forms = {of_layer(own)[0] for own in (layers or {}).values()}
    if INT8 in forms:
        packed.set_outputs(module, True)
        graphs[uint8.derive(folder)] = _run(module, low)
    del module, network
    gc.collect()
    step("checking against torch", 3)
    parity: dict[str, Any] = {}
    for graph, own in graphs.items():
        exported = [[a.astype("float32") for a in run] for run in check.run_onnx(graph, low)]
        # A network that stayed float32 has no rounding to allow for, and rounded weights are the same ones in torch.
        if layers and chosen.dtype == "float32" and not any(form.activations for form in forms):
            check.gate(name, "float32", check.worst(exported, own), 0.0)
        errors = check.gate(
            name, "int8" if layers else chosen.dtype, check.worst(exported, expected), check.worst(own, expected)
        )
        parity |= errors if graph.name == trace.GRAPH else {graph.name: errors}
    return Component(
        name=name,
        kind=kind,
        graph=f"{folder.name}/{trace.GRAPH}",
        weights=f"{folder.name}/{trace.WEIGHTS}",
        inputs=inputs,
        outputs=outputs,
        dims=limits,
        dtype=chosen.dtype,
        float32=chosen.float32,
        fp32_output=chosen.fp32_output,
        parameters=parameters,
        parity=parity
        | {"shapes": [{k: list(v.shape) for k, v in feeds.items()} for feeds in reference.batches]}
        | {"operators": operators, "precision_reason": chosen.reason},
    )


def batches(network: Network, limits: Mapping[str, Range]) -> list[dict[str, torch.Tensor]]:
    """Random inputs to check with, at two sizes within the profile: the smallest, and one that differs in every
    free dimension. Height and width grow by different steps, so that swapped axes show. A fixed size is one."""

    def sizes(steps: Mapping[str, int]) -> dict[str, int]:
        result = {}
        for dim, limit in limits.items():
            grow = next((n for side, n in steps.items() if side in dim), 0)
            result[dim] = min(limit.max, limit.min + grow * limit.multiple)
        return result

    smallest, other = sizes({}), sizes({"height": 1, "width": 2, "batch": 1, "images": 1})
    chosen = [smallest] if other == smallest else [smallest, other]
    known = trace.vocabulary_of(network)
    return [trace.example(network.inputs, own, seed=seed, vocabulary=known) for seed, own in enumerate(chosen)]


def _as_decoded(feeds: dict[str, torch.Tensor], scaling_factor: float | list[float]) -> dict[str, torch.Tensor]:
    """Scale the noise as a VAE decoder's input is: latents have unit variance before they are divided by the factor."""
    if "latent_sample" in feeds:
        factor = torch.tensor(scaling_factor, dtype=torch.float32)
        feeds["latent_sample"] = feeds["latent_sample"] / (factor[:, None, None] if factor.ndim else factor)
    return feeds


def _run(module: torch.nn.Module, feeds: Sequence[Feeds]) -> list[list[Any]]:
    with torch.no_grad(), SummedInFloat32():
        return [[t.float().numpy() for t in module(**own)] for own in feeds]


def _cast(feeds: Feeds, specs) -> dict[str, torch.Tensor]:
    return {spec.name: feeds[spec.name].to(getattr(torch, spec.dtype)) for spec in specs}
