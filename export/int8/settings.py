"""How `--precision int8` is done: one record, checked before hours of work."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from accel.dtypes import QUANTIZED as PRECISIONS
from accel.errors import Notice, UserError
from accel.int8 import fake_quant, trained_scales
from accel.int8.config import Int8Config, chosen
from accel.int8.formats import FORMATS, INT8, Format
from accel.models.source import Source

from . import image_parity
from .calibration import IMAGES, Calibration, calibration, default_prompts, read_prompts
from .unsupported import refuse_inpainting, refuse_refiner

QUANTIZED = ("unet", "text_encoder", "text_encoder_2", "vae_decoder")


@dataclass(frozen=True)
class Int8Settings:
    """How a pipeline or a float32 bundle is quantized.

    Attributes:
        config: which layers, and how. What it keeps by name is meant for the UNet. None: the config that the student
            was trained with, or the default one.
        prompts: file of calibration prompts; None for the built-in ones.
        images: calibration images.
        budget: least PSNR in dB of images against float32. If given, the most sensitive layers of the UNet are left in
            higher precision until it holds. None: `image_parity.BUDGET`, which decides acceptance alone.
        sensitivity: folder for the table of what each layer costs, or None.
        components: networks to quantize, out of `QUANTIZED`; SDXL's second text encoder goes with the first.
        evaluation_images: images that parity is measured on.
        threads: CPU threads of the engines whose speed is measured; 0 for their own default.
        precision: a key of `accel.dtypes.QUANTIZED`, which gives the number format.
        calibration: prompts and noise to calibrate with. `complete` sets it.
        trained: {range: scale} of a UNet trained with fake quantization, or None to calibrate. `complete` sets it.

    Raises:
        UserError: for a value that cannot be honoured.
    """

    config: Int8Config | None = None
    prompts: Path | None = None
    images: int = IMAGES
    budget: float | None = None
    sensitivity: Path | None = None
    components: tuple[str, ...] = QUANTIZED
    evaluation_images: int = image_parity.IMAGES
    threads: int = 0
    precision: str = "int8"
    calibration: Calibration | None = None
    trained: Mapping[str, torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget < 100:
            raise UserError(f"invalid parity budget: {self.budget:g} dB (expected 0 to 100)", "such as --budget 30")
        if unknown := [name for name in self.components if name not in QUANTIZED]:
            raise UserError(f"{unknown[0]!r} cannot be quantized", f"some of: {', '.join(QUANTIZED)}")
        if self.sensitivity is not None:  # written only when everything has been measured
            parents = (self.sensitivity, *self.sensitivity.absolute().parents)
            place = next(path for path in parents if path.exists())
            if not place.is_dir():
                raise UserError(
                    f"{self.sensitivity} cannot be a folder: {place} is a file", "another --sensitivity DIR"
                )

    @property
    def dtype(self) -> str:
        """The dtype of everything that is not quantized: float32, or float16 for GPUs."""
        return PRECISIONS[self.precision][1]

    @property
    def form(self) -> Format:
        return FORMATS[PRECISIONS[self.precision][0]]

    @property
    def least_psnr(self) -> float:
        return image_parity.BUDGET if self.budget is None else self.budget

    def wants(self, component: str) -> bool:
        return component in self.components or component == "text_encoder_2" and "text_encoder" in self.components

    def requires(self, component: str) -> bool:
        """Whether a component must be quantized whatever is measured: the UNet, unless the precision is auto."""
        return component == "unet" and self.precision != "auto" and self.wants("unet")


def complete(settings: Int8Settings, name: str, source: Source | None = None) -> Int8Settings:
    """Check settings against a model, and fill in its calibration, trained scales and config. Runs no network.

    Args:
        name: of the model; it chooses the built-in prompts.
        source: the pipeline to export, or None for a float32 bundle.

    Raises:
        UserError: for an inpainting model, a config that names no layer, prompts that cannot be read, or a config
            beside the one that the model was trained with.
    """
    form = settings.form
    if settings.config is not None:
        settings = replace(settings, config=replace(settings.config, format=form.name))
    if source is not None:
        unet = source.config("unet")
        refuse_inpainting(unet.get("in_channels", 4))
        if source.refines:
            refuse_refiner()
        if settings.config is not None and settings.wants("unet"):
            with torch.device("meta"):  # without its weights
                chosen(settings.config, fake_quant.layers_of(UNet2DConditionModel.from_config(unet)))
    prompts = read_prompts(settings.prompts) if settings.prompts else default_prompts(name)
    images = calibration(prompts, settings.images)
    trained = None if source is None else _trained(source)
    if trained is not None and form is not INT8:
        warnings.warn(f"{name} was trained for int8: its scales are not used for {form.name}", Notice, stacklevel=3)
    if trained is None or form is not INT8:
        return replace(settings, config=settings.config or Int8Config(format=form.name), calibration=images)
    if settings.config is not None:
        raise UserError(f"{name} was trained with its own int8 config", "leave out --int8-level, --int8-keep and such")
    return replace(settings, config=trained.config, calibration=images, trained=trained.scales)


def refuse_changes(bundle: str | Path, names: Sequence[str], what: str = "quantized") -> None:
    """Raise a UserError for options of the export of a pipeline, if any is given for a bundle."""
    if names:
        raise UserError(
            f"{bundle} is {what} as it is; {', '.join(names)} cannot be changed any more",
            "leave that out, or give the pipeline that the bundle was made of",
        )


def _trained(source: Source) -> trained_scales.Trained | None:
    """The scales that were learned for the weights to export: those of a LoRA, or the pipeline's own."""
    found = [trained for file in source.loras if (trained := trained_scales.find(file.path.parent)) is not None]
    if len(source.loras) > 1 and found:
        raise UserError(
            "a LoRA that was trained for int8 has scales for itself alone",
            "fuse it alone, or delete its int8.safetensors",
        )
    if found:
        return found[0]
    return None if source.loras else trained_scales.find(source.path)
