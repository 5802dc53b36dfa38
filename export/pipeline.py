"""A pipeline to a bundle: every network exported and checked, everything an embedding app needs in one folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from accel.bundle import Bundle, Component, Manifest, is_bundle, seal
from accel.bundle.shape_profiles import Range
from accel.bundle.shape_profiles import profile as parse_profile
from accel.errors import UserError
from accel.files import new_folder, refuse_existing, require_space
from accel.models import control_networks, networks
from accel.models.control_networks import match_adapter, match_controlnet
from accel.models.lora import LoraFile
from accel.models.networks import Network
from accel.models.source import Source, open_source
from accel.pipeline import control

from .companions import copy_companions
from .constants import checked_sampler, own_sampler, pipeline_constants
from .graph import component, trace
from .graph.precision import INT8
from .graph.precision import check_name as check_precision
from .int8.quantize import Progress, quantize
from .int8.settings import Int8Settings, complete, refuse_changes
from .int8.unsupported import refuse_control
from .share import share_files

COMPONENTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder")
_STAGES = 4


@dataclass(frozen=True)
class _Options:
    """How a pipeline becomes a float bundle; `export_pipeline` describes each option."""

    profile: str = "native"
    opset: int = trace.DEFAULT_OPSET
    components: tuple[str, ...] = COMPONENTS
    sampler: Mapping[str, Any] | None = None
    adapter: bool | str | Path = False
    controlnet: str | Path | None = None
    loras: tuple[str | Path | LoraFile, ...] = ()
    share: str | Path | None = None

    def changed(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        return [option.name for option in fields(self) if getattr(self, option.name) != option.default]


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
    int8: Int8Settings | None = None,
) -> Bundle:
    """Export a Stable Diffusion pipeline to a bundle.

    Args:
        model: a diffusers pipeline folder, a hub id or a single file; or a source with parts taken from elsewhere
            (`accel.models.source.open_source`); for int8, a float32 bundle too.
        out: folder to write; it appears only when everything has succeeded.
        profile: shapes to accept (`accel.bundle.shape_profiles`).
        precision: fp32, fp16, or one of `export.graph.precision.INT8`.
        opset: ONNX opset (`export.graph.trace.OPSETS`).
        components: networks to export; `text_encoder` covers both of SDXL's.
        sampler: name, steps or timesteps, guidance to store instead of the source's own.
        adapter: folder of a T2I-Adapter to export with it; or True to give the UNet its inputs alone.
        controlnet: folder of a ControlNet to export with it.
        loras: LoRA files to fuse into the weights, each as FILE or FILE=SCALE.
        share: another bundle, such as that of the model without the LoRA: files that are equal become hard links.
        overwrite: replace a bundle that is already there.
        progress: called with a description and the fraction done.
        int8: how to quantize, if the precision asks for it.

    Raises:
        UserError: for a source that cannot be exported, or a graph that differs from torch by more than the limit.
    """
    check_precision(precision)
    trace.check_opset(opset)
    options = _Options(profile, opset, tuple(components), sampler, adapter, controlnet, tuple(loras), share)
    if precision in INT8:
        settings = replace(int8 or Int8Settings(), precision=precision)
        return _export_int8(model, Path(out), options, settings, overwrite, progress)
    return _export_float(_open(model, options), Path(out), options, precision, overwrite, progress)


def _open(model: str | Path | Source, options: _Options) -> Source:
    if isinstance(model, Source):
        return model
    adapter = None if isinstance(options.adapter, bool) else options.adapter
    return open_source(model, options.loras, adapter=adapter, controlnet=options.controlnet)


def _export_int8(
    model: str | Path | Source,
    out: Path,
    options: _Options,
    settings: Int8Settings,
    overwrite: bool,
    progress: Progress,
) -> Bundle:
    """Quantize a float32 bundle, or export a pipeline as one first. Everything is checked before that."""
    refuse_existing(out, overwrite)
    _check_int8(model, options, settings)
    if not isinstance(model, Source) and is_bundle(model):
        refuse_changes(model, options.changed())
        bundle = Bundle.open(model)
        settings = complete(settings, bundle.manifest.source["name"])
        bundle.verify()
        return quantize(bundle, out, settings, overwrite=overwrite, progress=progress)
    source = _open(model, options)
    settings = complete(settings, source.name, source)
    float32 = out.parent / f".{out.name}.float"
    refuse_existing(float32, overwrite=True)  # it is deleted at the end, whoever made it
    try:
        bundle = _export_float(source, float32, options, "fp32", True, lambda stage, done: progress(stage, 0.3 * done))
        return quantize(
            bundle, out, settings, overwrite=overwrite, progress=lambda stage, done: progress(stage, 0.3 + 0.7 * done)
        )
    finally:
        shutil.rmtree(float32, ignore_errors=True)


def _export_float(
    source: Source, out: Path, options: _Options, precision: str, overwrite: bool, progress: Progress
) -> Bundle:
    base = None if options.share is None else Bundle.open(options.share)
    names = _component_names(source, options.components)
    pipeline = pipeline_constants(source)
    chosen_sampler = checked_sampler(options.sampler or own_sampler(source))
    shapes = parse_profile(options.profile, native=pipeline["native_size"])
    _check_tokens(source, shapes.tokens)
    inputs = _control_inputs(source, options.adapter is True)
    dims = shapes.dims(
        vae_scale=pipeline["vae_scale"],
        latent_multiple=pipeline["latent_multiple"],
        guidance=float(chosen_sampler["guidance"]) > 1,
    )
    stored = sum(
        p.stat().st_size
        for name in ("text_encoder", "text_encoder_2", "unet", "vae", *control.COMPONENTS)
        if source.has(name)
        for p in source.weight_files(name)
    )
    require_space(out.absolute().parent, int(stored * (0.6 if precision == "fp16" else 1.2)))
    with new_folder(out, overwrite=overwrite) as folder:
        records = {}
        for i, name in enumerate(names):

            def step(stage: str, done: int, name: str = name, i: int = i) -> None:
                progress(f"{name}: {stage}", (i + done / _STAGES) / len(names))

            records[name] = _export_component(
                source, name, folder / name, dims, precision, options.opset, inputs, step, shapes.tokens
            )
        copy_companions(source, folder)
        manifest = Manifest(
            family=source.family,
            topology=source.topology,
            pipeline=pipeline,
            sampler=chosen_sampler,
            profile=shapes,
            precision=precision,
            source={"name": source.name, "weights_sha256": source.digest(_weight_folders(names))} | source.record(),
            exporter={name: version(name) for name in ("torch", "onnx", "onnxscript", "diffusers", "transformers")}
            | {"opset": options.opset, "method": "torch.onnx.export(dynamo=True)"},
            components=records,
        )
        progress("digests", 0.99)
        if base is not None:
            share_files(folder, base)
        seal(folder, manifest)
    progress("done", 1.0)
    return Bundle.open(out)


def _check_int8(model: str | Path | Source, options: _Options, settings: Int8Settings) -> None:
    if missing := {"text_encoder", "unet", "vae_decoder"} - set(options.components):
        raise UserError(
            f"int8 is calibrated on whole images, which need the {' and the '.join(sorted(missing))} too",
            "leave --components out",
        )
    if options.share is not None:
        raise UserError("an int8 bundle cannot share files with another one", "leave --share out")
    controlled = isinstance(model, Source) and any(map(model.has, control.COMPONENTS))
    if settings.requires("unet") and (options.adapter or options.controlnet or controlled):
        refuse_control()


def _check_tokens(source: Source, tokens: int) -> None:
    """The UNet takes one context of the text encoder's own length, or several of them laid end to end."""
    own = _own_tokens(source)
    if tokens % own:
        raise UserError(
            f"a context of {tokens} tokens does not fit this text encoder", f"use tokens={own}, or a multiple of it"
        )


def _own_tokens(source: Source) -> int:
    return source.config("text_encoder").get("max_position_embeddings", 77)


def _component_names(source: Source, wanted: tuple[str, ...]) -> list[str]:
    unknown = [name for name in wanted if name not in COMPONENTS]
    if unknown:
        raise UserError(f"unknown component {unknown[0]!r}", f"choose from: {', '.join(COMPONENTS)}")
    names = list(dict.fromkeys(wanted))
    if not names:
        raise UserError("no component is to be exported", f"choose from: {', '.join(COMPONENTS)}")
    if "text_encoder" in names and source.has("text_encoder_2"):
        names.insert(names.index("text_encoder") + 1, "text_encoder_2")
    return [*(name for name in control.COMPONENTS if source.has(name)), *names]


def _control_inputs(source: Source, adapter: bool) -> dict[str, Any]:
    """Which control inputs the UNet gets, as `networks.unet` takes them; says early what does not fit."""
    unet = _unet_config(source)
    features = len(unet["block_out_channels"]) if adapter else 0
    if source.has(control.ADAPTER):
        scale = pipeline_constants(source)["vae_scale"]
        features = len(match_adapter(source.config(control.ADAPTER), unet, scale))
    if source.has(control.CONTROLNET):
        match_controlnet({"addition_embed_type": None} | source.config(control.CONTROLNET), unet)
    return {"adapter": features, "control": source.has(control.CONTROLNET)}


def _weight_folders(names: list[str]) -> list[str]:
    return sorted({"vae" if name.startswith("vae_") else name for name in names})


def _unet_config(source: Source) -> dict[str, Any]:
    """With diffusers' defaults for fields that are younger than some configs."""
    return {"mid_block_type": "UNetMidBlock2DCrossAttn", "addition_embed_type": None} | source.config("unet")


def _network(source: Source, name: str, inputs: Mapping[str, Any], tokens: int) -> Network:
    if name.startswith("text_encoder"):
        own = _own_tokens(source)
        return networks.text_encoder(source.load(name), name, hidden_states=source.family == "sdxl", tokens=own)
    if name == "unet":
        return networks.unet(source.load("unet"), tokens=tokens, **inputs)
    if name == control.ADAPTER:
        model = source.load(name)
        shapes = match_adapter(model.config, _unet_config(source), pipeline_constants(source)["vae_scale"])
        return Network(name, name, *control_networks.t2i_adapter(model, shapes))
    if name == control.CONTROLNET:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(source.config("unet"))
        shared = networks.unet(unet, tokens=tokens).inputs
        return Network(name, name, *control_networks.controlnet(source.load(name), shared))
    return getattr(networks, name)(source.load("vae"))


def _export_component(
    source: Source,
    name: str,
    folder: Path,
    dims: Mapping[str, Range],
    precision: str,
    opset: int,
    control_inputs: Mapping[str, Any],
    step: Callable[[str, int], None],
    tokens: int,
) -> Component:
    """Weights, graph and proof of one network."""
    started = time.perf_counter()
    folder.mkdir()
    step("loading", 0)
    network = _network(source, name, control_inputs, tokens)
    used = {d for spec in (*network.inputs, *network.outputs) for d in spec.shape if isinstance(d, str)}
    limits = {dim: dims[dim] for dim in sorted(used)}
    # The truth is the source as it was loaded, so that a config or weight lost on the way into the bundle shows too.
    scaling_factor = pipeline_constants(source)["scaling_factor"]
    reference = component.reference_of(network, limits, precision, family=source.family, scaling_factor=scaling_factor)
    networks.save_config(network, folder)
    record = component.write(network, reference, limits, folder, opset=opset, step=step)
    return replace(record, parity=record.parity | {"export_seconds": round(time.perf_counter() - started, 2)})
