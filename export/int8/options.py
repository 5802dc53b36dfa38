"""What a user says about int8, checked before hours of work, and the way from any model to an int8 bundle."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from accel.bundle import Bundle, is_bundle
from accel.errors import UserError
from accel.files import refuse_existing
from accel.int8 import fake_quant, trained_scales
from accel.int8.config import Int8Config, chosen
from accel.models.source import Source, open_source

from ..graph.precision import INT8
from . import calibration, image_parity
from .quantize import Progress, quantize
from .settings import QUANTISED, Settings
from .unsupported import refuse_inpainting


@dataclass(frozen=True)
class Options:
    """How `--precision int8` is to be done.

    Attributes:
        recipe: which layers; None for the trained student's own, or the default one.
        prompts: file of calibration prompts; None for prompts of our own.
        images: calibration images.
        budget: least PSNR in dB. Given, layers are left in higher precision until it holds; None: `parity.BUDGET`, and
            the verdict says whether it holds.
        sensitivity: folder for the table and the plot of what each layer costs; None for none.
        networks: what is to be int8, out of `settings.QUANTISED`; empty for all of them.
        threads: of the engines whose speed is measured; 0 lets them choose.
    """

    recipe: Int8Config | None = None
    prompts: Path | None = None
    images: int = calibration.IMAGES
    budget: float | None = None
    sensitivity: Path | None = None
    threads: int = 0
    networks: tuple[str, ...] = ()
    judged: int = field(default=image_parity.IMAGES)


def export(
    model: str | Path | Source,
    out: Path,
    precision: str,
    options: Options,
    high: Callable[..., Bundle],
    *,
    loras: Sequence[Any] = (),
    changes: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress = lambda stage, fraction: None,
) -> Bundle:
    """Quantise a float32 bundle, or export a pipeline as one first.

    Args:
        model: a float32 bundle, or what `high` exports.
        high: (folder, progress=...) -> the float32 bundle of the model.
        loras: LoRA files that `high` fuses; one that was trained for int8 brings its ranges.
        changes: names of what `high` does with a model, which can no longer be done with a bundle.

    Raises:
        UserError: for options that cannot be honoured, before anything is exported.
    """
    refuse_existing(out, overwrite)
    if options.budget is not None and not 0 < options.budget < 100:
        raise UserError(f"a parity budget of {options.budget:g} dB makes no sense", "such as --budget 30")
    if options.sensitivity is not None:  # written only when everything has been measured
        place = next(path for path in (options.sensitivity, *options.sensitivity.absolute().parents) if path.exists())
        if not place.is_dir():
            raise UserError(f"{options.sensitivity} cannot be a folder: {place} is a file", "another --sensitivity DIR")
    networks = _networks(options.networks)
    given = not isinstance(model, Source) and is_bundle(model)
    if given:
        refuse_changes(model, changes)
    source = None if given else model if isinstance(model, Source) else open_source(model, loras)
    if source is not None:
        unet = source.config("unet")
        refuse_inpainting(unet.get("in_channels", 4))
        if options.recipe is not None and "unet" in networks:
            _fits(options.recipe, unet)
    bundle = Bundle.open(model) if given else None
    name = bundle.manifest.source["name"] if bundle else source.name
    prompts = calibration.read_prompts(options.prompts) if options.prompts else calibration.default_prompts(name)
    images = calibration.calibration(prompts, options.images)
    trained = None if source is None else _trained(source)
    if trained is not None and options.recipe is not None:
        raise UserError(f"{source.name} was trained with its own int8 recipe", "leave the recipe's options out")
    scratch = out.parent / f".{out.name}.float"
    refuse_existing(scratch, overwrite=True)  # it is taken away at the end, whoever made it
    try:
        if bundle:
            bundle.verify()
        else:
            bundle = high(scratch, progress=lambda stage, done: progress(stage, 0.3 * done))
        settings = Settings(
            recipe=trained.recipe if trained else options.recipe or Int8Config(),
            calibration=images,
            dtype=INT8[precision],
            strict=precision != "auto",
            budget=options.budget if options.budget is not None else image_parity.BUDGET,
            keep_budget=options.budget is not None,
            sensitivity=options.sensitivity,
            judged=options.judged,
            networks=networks,
            trained=trained.scales if trained else None,
            threads=options.threads,
        )
        return quantize(
            bundle,
            out,
            settings,
            name=precision,
            overwrite=overwrite,
            progress=lambda stage, done: progress(stage, 0.3 + 0.7 * done),
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def refuse_changes(bundle: str | Path, names: Sequence[str], what: str = "quantised") -> None:
    """Raise the UserError about options that say what is exported, where that lies exported already."""
    if names:
        raise UserError(
            f"{bundle} is {what} as it is; {', '.join(names)} cannot be changed any more",
            "leave that out, or give the pipeline that the bundle was made of",
        )


def _fits(recipe: Int8Config, config: Mapping[str, Any]) -> None:
    """Raise the UserError about a recipe that names no layer of a UNet, which is built without its weights for it."""
    with torch.device("meta"):
        chosen(recipe, fake_quant.layers_of(UNet2DConditionModel.from_config(config)))


def _networks(names: tuple[str, ...]) -> tuple[str, ...]:
    """In the order of `QUANTISED`; SDXL's second text encoder goes with the first."""
    if unknown := [name for name in names if name not in QUANTISED]:
        raise UserError(f"{unknown[0]!r} cannot be int8", f"some of: {', '.join(QUANTISED)}")
    wanted = {*names, "text_encoder_2"} if "text_encoder" in names else set(names)
    return tuple(name for name in QUANTISED if name in wanted) if names else QUANTISED


def _trained(source: Source) -> trained_scales.Trained | None:
    """Ranges that were learned for the weights that are to be exported: a LoRA's, or the pipeline's own."""
    found = [trained for file in source.loras if (trained := trained_scales.find(file.path.parent)) is not None]
    if len(source.loras) > 1 and found:
        raise UserError(
            "a LoRA that was trained for int8 has ranges for itself alone",
            "fuse it alone, or delete its int8.safetensors",
        )
    if found:
        return found[0]
    return None if source.loras else trained_scales.find(source.path)
