"""A float32 bundle to an int8 one: calibrated on its own images, checked, audited, and judged.

The pipeline is run as it will be deployed, with its own steps, timesteps and guidance, and every layer that is to be
quantised watches its input. A student that was trained with fake quantisation brings its own ranges instead.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from accel.bundle import MANIFEST, Bundle, Component, finalize
from accel.errors import Notice, UserError
from accel.files import new_folder
from accel.int8 import fake_quant, packed
from accel.int8.config import Int8Config, fitting
from accel.int8.observers import observe
from accel.models import networks
from accel.models.networks import Network
from accel.pipeline import Pipeline, control, load

from ..graph import component, fp16, uint8
from . import acceptance, image_parity, sensitivity
from .settings import Settings
from .unsupported import refuse_control, refuse_inpainting

Progress = Callable[[str, float], None]


def quantize(
    bundle: Bundle,
    out: Path,
    settings: Settings,
    *,
    name: str = "int8",
    overwrite: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> Bundle:
    """Write the int8 bundle of a float32 bundle.

    Args:
        bundle: complete, in float32.
        out: folder to write; it appears only when everything has succeeded.
        name: of the precision, for the manifest.

    Raises:
        UserError: for a bundle that is not float32, a UNet that takes control inputs or paints into images, a recipe
            that fits no layer, a graph that differs from torch.
    """
    for entry in bundle.manifest.components.values():
        if entry.precision != "float32":
            raise UserError(
                f"{bundle.path}: {entry.name} is not float32 but {entry.precision}",
                "give the pipeline that it was made of, or a bundle with --precision fp32",
            )
    names = [entry for entry in settings.networks if entry in bundle.manifest.components]
    records = dict(bundle.manifest.components)
    unet = bundle.component("unet").inputs
    refuse_inpainting(unet[0].shape[1])
    if "unet" in names and any(spec.name.startswith(control.PREFIXES) for spec in unet):
        if settings.strict:
            refuse_control()
        names.remove("unet")
        acceptance.stay(records, "unet", "calibration has no control images", {})
    with new_folder(out, overwrite=overwrite) as folder:
        _copy(bundle, folder)
        pipeline = load(bundle, "eager", device="cpu")
        models = {entry: pipeline.engines[entry].module.model for entry in names}
        for entry in _without_layers(models, settings.recipe):
            acceptance.stay(records, entry, f"it has no layer of level {settings.recipe.level}", {})
            names.remove(entry)
            del models[entry]
        if settings.strict and not names:
            raise UserError(
                f"no network that was asked for has a layer of level {settings.recipe.level}",
                "--int8-level all, or other --int8-components",
            )
        progress("calibration", 0.0)
        kept = calibrate(pipeline, models, settings, lambda done: progress("calibration", 0.4 * done))
        progress("parity", 0.4)
        judge = image_parity.Judge(pipeline, models, settings.calibration.held_out(settings.judged), settings.budget)
        if "unet" in names and (settings.keep_budget or settings.sensitivity):
            kept["unet"] |= _by_sensitivity(judge, models["unet"], settings, bundle, progress)
        found = {entry: judge.component(entry) for entry in names}
        origin = settings.calibration.record(bundle.manifest.sampler)
        for place, entry in enumerate(names):
            if not found[entry]["ok"] and not (settings.strict and entry == "unet"):
                why = f"outside the parity budget of {settings.budget:g} dB ({found[entry]['psnr']:.1f} dB)"
                acceptance.stay(records, entry, why, found[entry])
                continue
            shutil.rmtree(folder / entry)

            def step(stage: str, done: int, entry: str = entry, place: int = place) -> None:
                progress(f"{entry}: {stage}", 0.5 + 0.3 * (place + done / 4) / len(names))

            about = {"recipe": _recipe_of(settings.recipe, entry).as_dict(), "kept": kept[entry]}
            about["calibration"] = origin | {"ranges": "trained" if _is_trained(settings, entry) else "calibrated"}
            records[entry] = _write(pipeline, bundle, entry, folder / entry, settings.dtype, about, step)
        del pipeline, models, judge
        if settings.dtype != "float32":
            _halve_the_rest(bundle, records, folder)
        manifest = replace(bundle.manifest, precision=name, components=records)
        finalize(folder, manifest)
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
            raced = acceptance.decide(folder, bundle, records, found, settings, Path(scratch), progress)
            finalize(folder, replace(manifest, components=records))
            acceptance.keep_engine_files(raced, records, folder)
    progress("done", 1.0)
    return Bundle.open(out)


def calibrate(
    pipeline: Pipeline,
    models: Mapping[str, nn.Module],
    settings: Settings,
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, dict[str, str]]:
    """Attach fake quantisation to the networks of a pipeline, with the ranges that its own images need.

    A UNet that was trained with ranges keeps them, and computes in float while the others are calibrated.

    Returns:
        Per network {layer that stays in higher precision though the recipe names it: why}.
    """
    for entry, model in models.items():
        fake_quant.attach(model, _recipe_of(settings.recipe, entry), names=_trained_layers(settings, entry))
    seen = {entry: model for entry, model in models.items() if not _is_trained(settings, entry)}
    dead: list[list[str]] = []
    if seen:
        dead = observe(list(seen.values()), settings.recipe, lambda: settings.calibration.run(pipeline, progress))
    if seen.keys() != models.keys():
        fake_quant.set_scales(models["unet"], settings.trained)
        fake_quant.set_mode(models["unet"], "quantize")
    kept: dict[str, dict[str, str]] = {entry: {} for entry in models}
    kept |= {entry: dict.fromkeys(names, "its range is zero") for entry, names in zip(seen, dead, strict=True)}
    for entry, names in kept.items():
        if names:
            warnings.warn(
                f"{entry}: {len(names)} layers see nothing but zeros and stay in higher precision, the first one is "
                f"{next(iter(names))}",
                Notice,
                stacklevel=2,
            )
    return kept


def _by_sensitivity(
    judge: image_parity.Judge, unet: nn.Module, settings: Settings, bundle: Bundle, progress: Progress
) -> dict[str, str]:
    """Measure what each layer of the UNet costs, and take out the worst until the budget holds, where it must.

    Where no layer can be int8 within the budget, all stay, for parity to refuse the UNet; an error if it must be int8.
    """
    layers = [name for name, _ in fake_quant.fake_layers(unet)]
    rows = sensitivity.measure(
        judge,
        "unet",
        sensitivity.one_by_one(layers),
        lambda done: progress("sensitivity, layer by layer", 0.4 + 0.1 * done),
    )
    blocks = sensitivity.measure(judge, "unet", sensitivity.by_block(layers)) if settings.sensitivity else []
    kept: dict[str, str] = {}
    try:
        if settings.keep_budget:
            names = sensitivity.leave(judge, "unet", rows)
            fake_quant.detach(unet, names)
            kept = dict.fromkeys(names, f"sensitive: left out for {settings.budget:g} dB")
    except UserError:
        if settings.strict:
            raise
    finally:
        if settings.sensitivity:
            sensitivity.write(settings.sensitivity, rows, blocks, bundle.manifest.source["name"], kept)
    return kept


def _is_trained(settings: Settings, entry: str) -> bool:
    return settings.trained is not None and entry == "unet"


def _trained_layers(settings: Settings, entry: str) -> Sequence[str] | None:
    if not _is_trained(settings, entry):
        return None
    return list(dict.fromkeys(key.rpartition(".")[0] for key in settings.trained if key.endswith("_scale")))


def _without_layers(models: Mapping[str, nn.Module], recipe: Int8Config) -> list[str]:
    """Networks that the recipe, meant for the UNet, has nothing to do in: a text encoder has no convolutions."""
    return [
        entry
        for entry, model in models.items()
        if entry != "unet" and not fitting(_recipe_of(recipe, entry), fake_quant.layers_of(model))
    ]


def _recipe_of(recipe: Int8Config, entry: str) -> Int8Config:
    return recipe if entry == "unet" else replace(recipe, keep=())


def _write(
    pipeline: Pipeline,
    bundle: Bundle,
    entry: str,
    folder: Path,
    dtype: str,
    about: dict[str, Any],
    step: component.Step,
) -> Component:
    """One network with packed layers: weights, graphs, proof. It is gone from the pipeline afterwards."""
    started = time.perf_counter()
    engine, manifest = pipeline.engines.take(entry), bundle.manifest
    record, model = engine.component, engine.module.model
    network = Network(entry, record.kind, engine.module, record.inputs, record.outputs)
    folder.mkdir()
    networks.save_config(network, folder)
    layers = fake_quant.traits(model)
    fake_quant.set_mode(model, "pass")
    known = component.truth(
        network,
        record.dims,
        "fp32" if dtype == "float32" else "fp16",
        family=manifest.family,
        scaling_factor=manifest.pipeline["scaling_factor"],
    )
    packed.pack(model, getattr(torch, known.chosen.dtype))
    made = component.write(
        network, known, record.dims, folder, opset=manifest.exporter["opset"], step=step, layers=layers
    )
    seconds = {"export_seconds": round(time.perf_counter() - started, 2)}
    graphs = {"onnxruntime": f"{entry}/{uint8.FILE}"}
    return replace(
        made,
        parameters=record.parameters,
        parity=made.parity | seconds,
        int8=about | {"layers": layers, "graphs": graphs},
    )


def _halve_the_rest(bundle: Bundle, records: dict[str, Component], folder: Path) -> None:
    """Components that are not int8, in float16."""
    for entry, record in records.items():
        if record.int8:
            continue
        shutil.rmtree(folder / entry)
        made = fp16.write(bundle, entry, folder / entry)
        notes = {key: record.parity[key] for key in ("int8_tried",) if key in record.parity}
        records[entry] = replace(made, parity=made.parity | notes)


def _copy(bundle: Bundle, folder: Path) -> None:
    """Everything but the manifest; a component that turns int8 is written anew afterwards."""
    for entry in bundle.manifest.files:
        if entry != MANIFEST:
            (folder / entry).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.file(entry), folder / entry)
