"""A pipeline to a bundle: every network exported and checked, everything that an app needs in one folder."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accel.bundle import Bundle, Component, Manifest, finalize, is_bundle
from accel.bundle.kinds import KINDS, control_components, kind_of, usual_components
from accel.bundle.shape_profiles import Profile, Range, native_sides
from accel.bundle.shape_profiles import profile as parse_profile
from accel.dtypes import QUANTIZED
from accel.errors import Notice, UserError, unknown
from accel.files import exclusive, new_folder, refuse_existing, require_space
from accel.models.constants import check_runs, checked_sampling, edits, note_left_out, own_sampling, pipeline_constants
from accel.models.embeddings import EmbeddingSpec
from accel.models.lora import LoraFile
from accel.models.source import Source, open_source
from accel.models.source_networks import UNetInputs, check_checker, network_of, own_tokens, unet_inputs
from accel.pipeline.tiling import VaeTiling
from accel.safety import COMPONENT as SAFETY_CHECKER

from . import class_to_image
from .graph import component, trace
from .graph.precision import check_name as check_precision
from .hard_links import link_equal_files
from .int8.quantize import Progress, quantize
from .int8.settings import Int8Settings, complete, refuse_changes
from .int8.unsupported import refuse_control, refuse_image_prompts
from .pipeline_files import copy_pipeline_files
from .preview_map import preview_map

COMPONENTS = usual_components()
_STAGES = 4


@dataclass(frozen=True)
class _Options:
    """How a pipeline becomes a float bundle; `export_pipeline` describes each option."""

    profile: str = "native"
    opset: int = trace.DEFAULT_OPSET
    components: tuple[str, ...] = COMPONENTS
    sampler: Mapping[str, Any] | None = None
    adapter: bool | str | Path = False
    controlnet: str | Path | Sequence[str | Path] | None = None
    loras: tuple[str | Path | LoraFile, ...] = ()
    share: str | Path | None = None
    clip_skip: int = 0
    embeddings: tuple[EmbeddingSpec, ...] = ()
    safety_checker: bool = False

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
    controlnet: str | Path | Sequence[str | Path] | None = None,
    loras: Sequence[str | Path | LoraFile] = (),
    share: str | Path | None = None,
    safety_checker: bool = False,
    clip_skip: int = 0,
    overwrite: bool = False,
    progress: Progress = lambda stage, fraction: None,
    int8: Int8Settings | None = None,
    embeddings: Sequence[EmbeddingSpec] = (),
) -> Bundle:
    """Export a Stable Diffusion pipeline, or an EDM model (`accel.export.class_to_image`), to a bundle.

    Args:
        model: a diffusers pipeline folder, a hub id or a single file; or a source with parts taken from elsewhere
            (`accel.models.source.open_source`); for int8, a float32 bundle too. Or the folder of an EDM model.
        out: folder to write; it appears only when everything has succeeded.
        profile: shapes to accept (`accel.bundle.shape_profiles`).
        precision: fp32, fp16, or one of `accel.dtypes.QUANTIZED`.
        opset: ONNX opset (`accel.export.graph.trace.OPSETS`).
        components: networks to export; `text_encoder` covers both of SDXL's.
        sampler: name, steps or timesteps, guidance to store instead of the source's own.
        adapter: folder of a T2I-Adapter to export with it; or True to give the UNet its inputs alone.
        controlnet: folder of a ControlNet to export with it, or a list of up to three.
        loras: LoRA files to fuse into the weights, each as FILE or FILE=SCALE.
        share: another bundle, such as that of the model without the LoRA: files that are equal become hard links.
        safety_checker: export the safety checker of the model's folder too, in float32 whatever the precision: a
            pipeline of the bundle blackens the images that it rejects. Without it a note says that it is left out.
        clip_skip: how many of the text encoder's last layers prompts do without, unless a call says otherwise;
            diffusers' `clip_skip`.
        overwrite: replace a bundle that is already there.
        progress: called with a description and the fraction done.
        int8: how to quantize, if the precision asks for it.
        embeddings: files of textual inversion whose tokens the bundle reads, each as FILE or FILE=TOKEN.

    Raises:
        UserError: for a source that cannot be exported, or a graph that differs from torch by more than the limit.
    """
    check_precision(precision)
    trace.check_opset(opset)
    parts = adapter, controlnet, tuple(loras), share, clip_skip, tuple(embeddings), safety_checker
    options = _Options(profile, opset, tuple(components), sampler, *parts)
    if class_to_image.takes(model):
        of_texts = [name for name in options.changed() if name not in ("profile", "opset", "sampler")]
        how: dict[str, Any] = dict(profile=profile, precision=precision, opset=opset, sampler=sampler)
        return class_to_image.export(model, out, of_texts, overwrite=overwrite, progress=progress, **how)
    if precision in QUANTIZED:
        settings = replace(int8 or Int8Settings(), precision=precision)
        with exclusive(Path(out)):  # from the start: the float32 bundle alone takes minutes
            return _export_int8(model, Path(out), options, settings, overwrite, progress)
    return _export_float(_open(model, options), Path(out), options, precision, overwrite, progress)


def _open(model: str | Path | Source, options: _Options) -> Source:
    if isinstance(model, Source):
        if options.loras or options.embeddings:
            fix = "open_source(MODEL, loras=..., embeddings=...)"
            raise UserError("a source that is open already takes no more LoRA files and embeddings", fix)
        return model
    adapter = None if isinstance(options.adapter, bool) else options.adapter
    more: dict[str, Any] = dict(adapter=adapter, controlnet=options.controlnet, embeddings=options.embeddings)
    return open_source(model, options.loras, safety_checker=options.safety_checker, **more)


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
    if options.safety_checker:
        check_checker(source)
        names.append(SAFETY_CHECKER)
    source = _with_clip_skip(source, options.clip_skip)
    pipeline = pipeline_constants(source) | ({"clip_skip": options.clip_skip} if options.clip_skip else {})
    sampling = checked_sampling(options.sampler) if options.sampler else own_sampling(source)
    check_runs(source, sampling)
    note_left_out(source, safety_checker=not options.safety_checker)
    shapes = parse_profile(options.profile, native=pipeline["native_size"])
    _note_size(shapes, pipeline["native_size"])
    _check_tokens(source, shapes.tokens)
    inputs = unet_inputs(source, shapes.tokens, options.adapter is True)
    if shapes.vae_tile and "vae_decoder" in names:  # else there is none that would see tiles
        VaeTiling.of(source.config("vae"), pipeline["vae_scale"], shapes.vae_tile)
    sizes = {key: pipeline[key] for key in ("vae_scale", "latent_multiple")}
    sizes |= dict(guidance=sampling.guidance > 1, edits=edits(source))
    dims = {name: shapes.dims(**sizes, component=name) for name in names}
    if inputs.adapter or inputs.control:
        _check_halves(shapes, dims["unet"], pipeline["latent_multiple"])
    parts = sorted({kind_of(name).part or name for name in names})
    stored = sum(path.stat().st_size for part in parts for path in source.weight_files(part))
    require_space(out.absolute().parent, int(stored * (0.6 if precision == "fp16" else 1.2)))
    with new_folder(out, overwrite=overwrite) as folder:
        records = {}
        for i, name in enumerate(names):

            def step(stage: str, done: int, name: str = name, i: int = i) -> None:
                progress(f"{name}: {stage}", (i + done / _STAGES) / len(names))

            records[name] = _export_component(
                source, name, folder / name, dims[name], precision, options.opset, inputs, step
            )
        if "vae_decoder" in names:
            pipeline |= preview_map(source, inputs, pipeline)
        copy_pipeline_files(source, folder, sampling, feature_extractor=options.safety_checker)
        manifest = Manifest(
            family=source.family,
            topology=source.topology,
            pipeline=pipeline,
            sampler=sampling.as_dict(),
            profile=shapes,
            precision=precision,
            source={"name": source.name, "weights_sha256": source.digest(parts)}
            | {"scheduler": source.scheduler()["_class_name"]}
            | source.record(),
            exporter={name: version(name) for name in ("torch", "onnx", "onnxscript", "diffusers", "transformers")}
            | {"opset": options.opset, "method": "torch.onnx.export(dynamo=True)"},
            components=records,
        )
        progress("digests", 0.99)
        if base is not None:
            link_equal_files(folder, base)
        finalize(folder, manifest)
    progress("done", 1.0)
    return Bundle.open(out)


def _with_clip_skip(source: Source, skip: int) -> Source:
    """The source with the output that prompts are taken from, `skip` layers before the last one."""
    layers = min(source.config(name)["num_hidden_layers"] for name in KINDS["text_encoder"].names if source.has(name))
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip < layers:
        raise UserError(f"invalid clip_skip: {skip!r} (expected 0 to {layers - 1})", "such as --clip-skip 1")
    return replace(source, clip_skips=(skip,)) if skip and source.family != "sdxl" else source


def _check_int8(model: str | Path | Source, options: _Options, settings: Int8Settings) -> None:
    if missing := {"text_encoder", "unet", "vae_decoder"} - set(options.components):
        raise UserError(
            f"int8 is calibrated on whole images, which need the {' and the '.join(sorted(missing))} too",
            "leave --components out",
        )
    if options.share is not None:
        raise UserError("an int8 bundle cannot share files with another one", "leave --share out")
    controlled = isinstance(model, Source) and any(map(model.has, control_components()))
    if settings.requires("unet") and (options.adapter or options.controlnet or controlled):
        refuse_control()
    if settings.requires("unet") and isinstance(model, Source) and model.ip_adapter is not None:
        refuse_image_prompts()


def _check_tokens(source: Source, tokens: int) -> None:
    """Refuse a text context that is not one or several of the text encoder's own, laid end to end."""
    own = own_tokens(source)
    if tokens % own:
        raise UserError(
            f"a context of {tokens} tokens does not fit this text encoder", f"use tokens={own}, or a multiple of it"
        )


def _check_halves(shapes: Profile, dims: Mapping[str, Range], multiple: int) -> None:
    """Refuse control inputs in steps of latents that the UNet does not halve exactly.

    `torch.export` declares the sides of an input as multiples of one symbol, which the rounded halves of it are not.
    """
    for side in ("height", "width"):
        limits = dims[f"latent_{side}"]
        if not limits.fixed and limits.multiple % multiple:
            raise UserError(
                f"profile {shapes.name!r}: with an adapter or a ControlNet a range of sizes cannot go in steps of "
                f"{dims[side].multiple} px",
                f"one size, such as {side}={shapes.height.max if side == 'height' else shapes.width.max}, which may be "
                f"odd; or leave step out",
            )


def _note_size(shapes: Profile, native: int | list[int]) -> None:
    height, width = native_sides(native)
    if not (shapes.height.admits(height) and shapes.width.admits(width)):
        own = str(height) if height == width else f"{height} x {width}"
        warnings.warn(
            f"profile {shapes.name} has no images of {own} px, the model's own size: height {shapes.height}, width "
            f"{shapes.width} (--profile native has it)",
            Notice,
            stacklevel=4,
        )


def _component_names(source: Source, wanted: Sequence[str]) -> list[str]:
    """All components to export: those of the source that add to the UNet, and what is wanted."""
    choices = usual_components()
    if strange := [name for name in wanted if name not in choices]:
        raise unknown("component", strange[0], choices)
    if not wanted:
        raise UserError("no component is to be exported", f"choose from: {', '.join(choices)}")
    more = [name for kind in KINDS.values() if kind.adds for name in kind.names if source.has(name)]
    return more + [
        name
        for kind in dict.fromkeys(wanted)
        for name in KINDS[kind].names
        if source.has(KINDS[kind].part or name) or len(KINDS[kind].names) == 1
    ]


def _export_component(
    source: Source,
    name: str,
    folder: Path,
    dims: Mapping[str, Range],
    precision: str,
    opset: int,
    inputs: UNetInputs,
    step: Callable[[str, int], None],
) -> Component:
    """Write weights and graph of one network, and check the graph against torch."""
    started = time.perf_counter()
    folder.mkdir()
    step("loading", 0)
    record = component.exported(
        network_of(source, name, inputs),
        dims,
        precision,
        folder,
        opset=opset,
        step=step,
        family=source.family,
        scaling_factor=pipeline_constants(source)["scaling_factor"],
    )
    return replace(record, parity={**record.parity, "export_seconds": round(time.perf_counter() - started, 2)})
