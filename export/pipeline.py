"""A pipeline to a bundle: every network exported and checked, everything that an app needs in one folder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from accel.bundle import Bundle, Component, Manifest, finalize
from accel.bundle.kinds import KINDS, control_components, kind_of
from accel.bundle.shape_profiles import Range
from accel.bundle.shape_profiles import profile as parse_profile
from accel.errors import UserError
from accel.files import new_folder, require_space
from accel.models import networks
from accel.models.control_networks import match_adapter, match_controlnet
from accel.models.lora import LoraFile
from accel.models.source import Source, open_source
from accel.models.source_networks import UNetInputs, own_tokens, unet_config
from accel.pipeline import control

from .constants import checked_sampling, own_sampling, pipeline_constants
from .graph import component, trace
from .graph.precision import INT8
from .graph.precision import check_name as check_precision
from .hard_links import link_equal_files
from .int8 import options
from .int8.unsupported import refuse_control
from .pipeline_files import copy_pipeline_files

COMPONENTS = tuple(name for name, kind in KINDS.items() if not kind.control)
_STAGES = 4
Progress = Callable[[str, float], None]


def export_pipeline(
    model: str | Path | Source,
    out: str | Path,
    *,
    profile: str = "native",
    precision: str = "fp32",
    opset: int = trace.DEFAULT_OPSET,
    components: tuple[str, ...] = COMPONENTS,
    sampler: Mapping[str, Any] | None = None,
    adapter: bool | str | Path = False,
    controlnet: str | Path | None = None,
    loras: Sequence[str | Path | LoraFile] = (),
    share: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = lambda stage, fraction: None,
    int8: options.Options | None = None,
) -> Bundle:
    """Export a Stable Diffusion pipeline to a bundle.

    Args:
        model: a diffusers pipeline folder, a hub id or a single file; or a source with parts taken from elsewhere
            (`accel.models.source.open_source`); for int8, a float32 bundle too.
        out: folder to write; it appears only when everything has succeeded.
        profile: shapes to accept (`accel.bundle.shape_profiles`).
        precision: fp32, fp16, or one of `accel.export.graph.precision.INT8`.
        opset: ONNX opset (`accel.export.graph.trace.OPSETS`).
        components: networks to export; `text_encoder` covers both of SDXL's.
        sampler: name, steps or timesteps, guidance to store instead of the source's own.
        adapter: folder of a T2I-Adapter to export with it; or True to give the UNet its inputs alone.
        controlnet: folder of a ControlNet to export with it.
        loras: LoRA files to fuse into the weights, each as FILE or FILE=SCALE.
        share: another bundle, such as that of the model without the LoRA: files that are equal become hard links.
        overwrite: replace a bundle that is already there.
        progress: called with a description and the fraction done.
        int8: how to quantise, where the precision asks for it.

    Raises:
        UserError: for a source that cannot be exported, or a graph that differs from torch by more than the gate.
    """
    check_precision(precision)
    trace.check_opset(opset)
    if precision in INT8:
        wanted = int8 or options.Options()
        _check_int8(components, share is not None)
        if precision != "auto" and (not wanted.networks or "unet" in wanted.networks):
            _check_controlled(model, adapter, controlnet)
        high = partial(
            export_pipeline,
            model,
            profile=profile,
            opset=opset,
            components=components,
            sampler=sampler,
            adapter=adapter,
            controlnet=controlnet,
            loras=loras,
            overwrite=True,
        )
        changes = {
            "profile": profile != "native",
            "opset": opset != trace.DEFAULT_OPSET,
            "sampler": sampler,
            "components": components != COMPONENTS,
            "adapter": adapter,
            "controlnet": controlnet,
            "loras": loras,
        }
        return options.export(
            model,
            Path(out),
            precision,
            wanted,
            high,
            loras=loras,
            overwrite=overwrite,
            progress=progress,
            changes=[name for name, change in changes.items() if change],
        )
    if not isinstance(model, Source):
        folder = None if isinstance(adapter, bool) else adapter
        model = open_source(model, loras, adapter=folder, controlnet=controlnet)
    source = model
    base = None if share is None else Bundle.open(share)
    names = _component_names(source, components)
    pipeline = pipeline_constants(source)
    sampling = checked_sampling(sampler) if sampler else own_sampling(source)
    shapes = parse_profile(profile, native=pipeline["native_size"])
    _check_tokens(source, shapes.tokens)
    inputs = _unet_inputs(source, shapes.tokens, adapter is True)
    dims = shapes.dims(
        vae_scale=pipeline["vae_scale"], latent_multiple=pipeline["latent_multiple"], guidance=sampling.guidance > 1
    )
    parts = sorted({kind_of(name).part or name for name in names})
    stored = sum(path.stat().st_size for part in parts for path in source.weight_files(part))
    require_space(Path(out).absolute().parent, int(stored * (0.6 if precision == "fp16" else 1.2)))
    with new_folder(Path(out), overwrite=overwrite) as folder:
        records = {}
        for i, name in enumerate(names):

            def step(stage: str, done: int, name: str = name, i: int = i) -> None:
                progress(f"{name}: {stage}", (i + done / _STAGES) / len(names))

            records[name] = _export_component(source, name, folder / name, dims, precision, opset, inputs, step)
        copy_pipeline_files(source, folder)
        manifest = Manifest(
            family=source.family,
            topology=source.topology,
            pipeline=pipeline,
            sampler=sampling.as_dict(),
            profile=shapes,
            precision=precision,
            source={"name": source.name, "weights_sha256": source.digest(parts)} | source.record(),
            exporter={name: version(name) for name in ("torch", "onnx", "onnxscript", "diffusers", "transformers")}
            | {"opset": opset, "method": "torch.onnx.export(dynamo=True)"},
            components=records,
        )
        progress("digests", 0.99)
        if base is not None:
            link_equal_files(folder, base)
        finalize(folder, manifest)
    progress("done", 1.0)
    return Bundle.open(out)


def _check_int8(components: Sequence[str], shares: bool) -> None:
    if missing := {"text_encoder", "unet", "vae_decoder"} - set(components):
        raise UserError(
            f"int8 is calibrated on whole images, which need the {' and the '.join(sorted(missing))} too",
            "leave --components out",
        )
    if shares:
        raise UserError("an int8 bundle cannot share files with another one", "leave --share out")


def _check_controlled(model: str | Path | Source, adapter: Any, controlnet: Any) -> None:
    if adapter or controlnet or isinstance(model, Source) and any(map(model.has, control_components())):
        refuse_control()


def _check_tokens(source: Source, tokens: int) -> None:
    """Refuse a text context that is not one or several of the text encoder's own, laid end to end."""
    own = own_tokens(source)
    if tokens % own:
        raise UserError(
            f"a context of {tokens} tokens does not fit this text encoder", f"use tokens={own}, or a multiple of it"
        )


def _component_names(source: Source, wanted: Sequence[str]) -> list[str]:
    """All components to export: the control networks that the source has, and what is wanted."""
    choices = [name for name, kind in KINDS.items() if not kind.control]
    if unknown := [name for name in wanted if name not in choices]:
        raise UserError(f"unknown component {unknown[0]!r}", f"choose from: {', '.join(choices)}")
    if not wanted:
        raise UserError("no component is to be exported", f"choose from: {', '.join(choices)}")
    more = [name for name in control_components() if source.has(name)]
    return more + [
        name for kind in dict.fromkeys(wanted) for name in KINDS[kind].names if name == kind or source.has(name)
    ]


def _unet_inputs(source: Source, tokens: int, adapter: bool) -> UNetInputs:
    """Which inputs the UNet gets; says early which control network does not fit."""
    unet = unet_config(source)
    features = len(unet["block_out_channels"]) if adapter else 0
    if source.has(control.ADAPTER):
        scale = pipeline_constants(source)["vae_scale"]
        features = len(match_adapter(source.config(control.ADAPTER), unet, scale))
    if source.has(control.CONTROLNET):
        match_controlnet({"addition_embed_type": None} | source.config(control.CONTROLNET), unet)
    return UNetInputs(tokens, features, source.has(control.CONTROLNET))


def _export_component(
    source: Source,
    name: str,
    folder: Path,
    dims: Mapping[str, Range],
    recipe: str,
    opset: int,
    inputs: UNetInputs,
    step: Callable[[str, int], None],
) -> Component:
    """Write weights and graph of one network, and check the graph against torch."""
    started = time.perf_counter()
    folder.mkdir()
    step("loading", 0)
    kind = kind_of(name)
    network = resolve_name(kind.network or f"accel.models.source_networks:{kind.names[0]}")(source, name, inputs)
    used = {d for spec in (*network.inputs, *network.outputs) for d in spec.shape if isinstance(d, str)}
    limits = {dim: dims[dim] for dim in sorted(used)}
    # The reference is the source as it was loaded, so a config or weight lost on the way into the bundle shows too.
    scaling_factor = pipeline_constants(source)["scaling_factor"]
    known = component.truth(network, limits, recipe, family=source.family, scaling_factor=scaling_factor)
    networks.save_config(network, folder)
    record = component.write(network, known, limits, folder, opset=opset, step=step)
    return replace(record, parity=record.parity | {"export_seconds": round(time.perf_counter() - started, 2)})
