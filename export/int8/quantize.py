"""Quantize a float32 bundle: calibrate it on its own images, check, measure, and accept or reject each component.

The pipeline runs as it will be deployed, with its own steps, timesteps and guidance, while observers record the inputs
of every layer to quantize. A student that was trained with fake quantization brings its own scales instead, and where
only weights are quantized nothing is calibrated.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel.bundle import Bundle, Component, finalize
from accel.errors import Notice, UserError
from accel.files import new_folder
from accel.int8 import fake_quant, packed
from accel.int8.config import Int8Config, fitting
from accel.int8.formats import INT8
from accel.int8.observers import observe
from accel.models import networks
from accel.models.networks import Network
from accel.pipeline import Pipeline, load
from accel.pipeline.input_images import CONTROL_INPUTS

from ..graph import component, fp16, uint8
from . import acceptance, sensitivity, speed
from .acceptance import Decision, accept
from .image_parity import Evaluator
from .settings import QUANTIZED, Int8Settings
from .unsupported import refuse_control, refuse_image_prompts, refuse_inpainting, refuse_refiner

Progress = Callable[[str, float], None]


def quantize(
    bundle: Bundle,
    out: Path,
    settings: Int8Settings,
    *,
    overwrite: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> Bundle:
    """Write the quantized bundle of a float32 bundle.

    Args:
        bundle: complete, in float32.
        out: folder to write; it appears only when everything has succeeded.
        settings: checked and completed (`settings.complete`).

    Raises:
        UserError: for a bundle that is not float32, a UNet that takes control inputs or is made for inpainting, or a
            config that fits no layer.
    """
    names, decisions = _candidates(bundle, settings)
    records = dict(bundle.manifest.components)
    with new_folder(out, overwrite=overwrite) as folder:
        bundle.copy(folder)
        # Black images calibrate nothing, and what a text encoder made before is not what it makes now.
        pipeline = load(bundle, "eager", device="cpu", safety_checker=False, text_cache=0)
        models = {name: pipeline.engines[name].module.model for name in names}
        for name in _without_layers(models, settings):
            decisions[name] = Decision(f"it has no layer of level {settings.config.level}")
            del models[name]
        if settings.precision != "auto" and not models:
            raise UserError(
                f"none of the components to quantize has a layer of level {settings.config.level}",
                "--int8-level all, or other --int8-components",
            )
        progress("calibration", 0.0)
        kept = calibrate(pipeline, models, settings, lambda done: progress("calibration", 0.4 * done))
        progress("parity", 0.4)
        held_out = settings.calibration.held_out(settings.evaluation_images)
        evaluator = Evaluator(pipeline, models, held_out, settings.least_psnr)
        if "unet" in models and (settings.budget is not None or settings.sensitivity):
            kept["unet"] |= _by_sensitivity(evaluator, models["unet"], settings, bundle, progress)
        parity = {name: {"parity": evaluator.component(name)} for name in models}
        decisions |= {name: accept(name, parity[name], settings) for name in models}
        accepted = [name for name in models if decisions[name].accepted]
        for place, name in enumerate(accepted):

            def step(stage: str, done: int, name: str = name, place: int = place) -> None:
                progress(f"{name}: {stage}", 0.5 + 0.3 * (place + done / 4) / len(accepted))

            shutil.rmtree(folder / name)
            records[name] = _write(pipeline, bundle, name, folder / name, settings, kept[name], step)
        del pipeline, models, evaluator
        if settings.dtype != "float32":
            _convert_the_rest(bundle, records, folder)
        manifest = replace(bundle.manifest, precision=settings.precision, components=records)
        finalize(folder, manifest)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
            engines, pairs = speed.engines_for(settings.dtype, settings.form), {}
            for name in accepted:
                pairs[name] = speed.pair(Bundle.open(folder), bundle, name, settings.dtype, Path(scratch), engines)
                speeds = speed.measure(
                    pairs[name], name, engines, threads=settings.threads, progress=lambda stage: progress(stage, 0.85)
                )
                decisions[name] = accept(name, parity[name] | speeds, settings)
            for name, decision in decisions.items():
                fallback = pairs[name].float if name in pairs else bundle
                records[name] = acceptance.apply(decision, records[name], fallback, folder)
            finalize(folder, replace(manifest, components=records))
            for name, pair in pairs.items():
                acceptance.keep_engine_files(records[name], pair.int8, folder)
    progress("done", 1.0)
    return Bundle.open(out)


def _candidates(bundle: Bundle, settings: Int8Settings) -> tuple[list[str], dict[str, Decision]]:
    """The components to try to quantize, and the decisions that need no measurement."""
    for record in bundle.manifest.components.values():
        if record.precision != "float32":
            raise UserError(
                f"{bundle.path}: {record.name} is not float32 but {record.precision}",
                "give the pipeline that it was made of, or a bundle with --precision fp32",
            )
    names = [name for name in QUANTIZED if settings.wants(name) and name in bundle.manifest.components]
    inputs = bundle.component("unet").inputs
    refuse_inpainting(inputs[0].shape[1])
    if bundle.manifest.refines:
        refuse_refiner()
    controlled = any(spec.name.startswith(CONTROL_INPUTS) for spec in inputs)
    prompted = any(spec.name == "image_embeds" for spec in inputs)
    if "unet" not in names or not (controlled or prompted):
        return names, {}
    if settings.requires("unet"):
        refuse_control() if controlled else refuse_image_prompts()
    names.remove("unet")
    return names, {"unet": Decision(f"calibration has no {'control images' if controlled else 'image prompts'}")}


def calibrate(
    pipeline: Pipeline,
    models: Mapping[str, nn.Module],
    settings: Int8Settings,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, dict[str, str]]:
    """Attach fake quantization to the networks of a pipeline, and calibrate it on the pipeline's own images.

    A UNet with trained scales keeps them, and computes in float while the other networks are calibrated.

    Returns:
        Per network {layer that stays in higher precision although the config names it: why}.
    """
    for name, model in models.items():
        scales = settings.trained if _is_trained(settings, name) else {}
        trained = dict.fromkeys(key.rpartition(".")[0] for key in scales if key.endswith("_scale"))
        fake_quant.attach(model, _config_of(settings, name), names=list(trained) or None)
    if not settings.form.activations:
        for model in models.values():
            fake_quant.set_mode(model, "quantize")
        return {name: {} for name in models}
    observed = {name: model for name, model in models.items() if not _is_trained(settings, name)}
    dead: list[list[str]] = []
    if observed:
        dead = observe(list(observed.values()), settings.config, lambda: settings.calibration.run(pipeline, progress))
    if observed.keys() != models.keys():
        fake_quant.set_scales(models["unet"], settings.trained)
        fake_quant.set_mode(models["unet"], "quantize")
    kept: dict[str, dict[str, str]] = {name: {} for name in models}
    kept |= {name: dict.fromkeys(layers, "its range is zero") for name, layers in zip(observed, dead, strict=True)}
    for name, layers in kept.items():
        if layers:
            warnings.warn(
                f"{name}: {len(layers)} layers, such as {next(iter(layers))}, see nothing but zeros in calibration and "
                f"stay in higher precision",
                Notice,
                stacklevel=2,
            )
    return kept


def _by_sensitivity(
    evaluator: Evaluator, unet: nn.Module, settings: Int8Settings, bundle: Bundle, progress: Progress
) -> dict[str, str]:
    """Measure what each layer of the UNet costs; with a budget, keep the most sensitive ones in float until it holds.

    If no layer can be int8 within the budget, all stay int8 and `accept` rejects the UNet; a required one is an error.

    Returns:
        {layer that stays in higher precision: why}.
    """
    layers = [name for name, _ in fake_quant.fake_layers(unet)]
    costs = sensitivity.measure(
        evaluator,
        "unet",
        sensitivity.one_by_one(layers),
        lambda done: progress("sensitivity, layer by layer", 0.4 + 0.1 * done),
    )
    blocks = sensitivity.measure(evaluator, "unet", sensitivity.by_block(layers)) if settings.sensitivity else []
    kept: dict[str, str] = {}
    try:
        if settings.budget is not None:
            names = sensitivity.layers_to_keep(evaluator, "unet", costs)
            fake_quant.detach(unet, names)
            kept = dict.fromkeys(names, f"sensitive: kept for {settings.budget:g} dB")
    except UserError:
        if settings.requires("unet"):
            raise
    finally:
        if settings.sensitivity:
            sensitivity.write(settings.sensitivity, costs, blocks, bundle.manifest.source["name"], kept)
    return kept


def _is_trained(settings: Int8Settings, name: str) -> bool:
    return settings.trained is not None and name == "unet"


def _without_layers(models: Mapping[str, nn.Module], settings: Int8Settings) -> list[str]:
    """Networks other than the UNet that have no layer of the config's level: a text encoder has no convolutions."""
    return [
        name
        for name, model in models.items()
        if name != "unet" and not fitting(_config_of(settings, name), fake_quant.layers_of(model))
    ]


def _config_of(settings: Int8Settings, name: str) -> Int8Config:
    """The config of a network: the names in `keep` are meant for the UNet."""
    return settings.config if name == "unet" else replace(settings.config, keep=())


def _write(
    pipeline: Pipeline,
    bundle: Bundle,
    name: str,
    folder: Path,
    settings: Int8Settings,
    kept: Mapping[str, str],
    step: component.Step,
) -> Component:
    """Export one network with packed layers: weights, graphs, checks. It is removed from the pipeline."""
    started = time.perf_counter()
    engine, manifest = pipeline.engines.take(name), bundle.manifest
    record, model = engine.component, engine.module.model
    network = Network(name, record.kind, engine.module, record.inputs, record.outputs)
    folder.mkdir()
    networks.save_config(network, folder)
    layers = fake_quant.traits(model)
    fake_quant.set_mode(model, "disabled")
    reference = component.reference_of(
        network,
        record.dims,
        "fp32" if settings.dtype == "float32" else "fp16",
        family=manifest.family,
        scaling_factor=manifest.pipeline["scaling_factor"],
    )
    packed.pack(model, getattr(torch, reference.chosen.dtype))
    opset = max(manifest.exporter["opset"], settings.form.opset)
    made = component.write(network, reference, record.dims, folder, opset=opset, step=step, layers=layers)
    ranges: dict[str, Any] = {"ranges": "of weights alone"}
    if settings.form.activations:
        ranges = {"ranges": "trained" if _is_trained(settings, name) else "calibrated"}
        ranges |= settings.calibration.record(manifest.sampler)
    return replace(
        made,
        parameters=record.parameters,
        parity=made.parity | {"export_seconds": round(time.perf_counter() - started, 2)},
        int8={
            "config": _config_of(settings, name).as_dict(),
            "kept": kept,
            "calibration": ranges,
            "layers": layers,
            "graphs": {"onnxruntime": f"{name}/{uint8.FILE}"} if settings.form is INT8 else {},
        },
    )


def _convert_the_rest(bundle: Bundle, records: dict[str, Component], folder: Path) -> None:
    """Convert the components that are not int8 to float16."""
    for name, record in records.items():
        if not record.int8:
            shutil.rmtree(folder / name)
            records[name] = fp16.write(bundle, name, folder / name)
