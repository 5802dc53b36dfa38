"""The constants that an app needs to run a pipeline: sizes, factors, and how it is meant to be sampled."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from ..bundle import limits
from ..bundle.kinds import KINDS
from ..errors import Notice, UserError
from ..sampling import Sampling
from ..sampling.noise_schedule import NoiseSchedule
from ..sampling.samplers import SAMPLERS, grid, own_sampler, table, unread_fields
from . import few_step
from .source import Source


def pipeline_constants(source: Source) -> dict[str, Any]:
    """Sizes and factors that turn pixels into latents and back; see `accel.bundle.Manifest.pipeline`."""
    unet, vae = source.config("unet"), source.config("vae")
    stages = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    size, widths, channels = unet.get("sample_size"), unet.get("block_out_channels"), vae.get("latent_channels")
    sides, factors = size if isinstance(size, list) else [size], ("scaling_factor", "shift_factor")
    each = ("latents_mean", "latents_std")
    for name, key, value, ok in (
        ("vae", "block_out_channels", stages, isinstance(stages, list)),
        ("vae", "latent_channels", channels, isinstance(channels, int)),
        ("unet", "block_out_channels", widths, isinstance(widths, list)),
        ("unet", "sample_size", size, len(sides) in (1, 2) and all(isinstance(n, int) for n in sides)),
        *(("vae", key, vae.get(key, 1.0), isinstance(vae.get(key) or 0, (int, float))) for key in factors),
        *(("vae", key, vae.get(key), _is_numbers(vae.get(key) or [1])) for key in each),
    ):
        if not ok:
            raise UserError(f"{source.path}/{name}/config.json: {key} is invalid: {value!r}", "get the file again")
    scale = 2 ** (len(stages) - 1)
    factor, shift = latent_scale(vae, source.family)
    made = {
        "vae_scale": scale,
        "latent_channels": vae["latent_channels"],
        "scaling_factor": factor,
        "shift_factor": shift,
        "latent_multiple": 2 ** (len(unet["block_out_channels"]) - 1),
        "native_size": sides[0] * scale if len(set(sides)) == 1 else [side * scale for side in sides],
        "zero_empty_prompt": bool(source.index.get("force_zeros_for_empty_prompt", source.family == "sdxl")),
    }
    nets = [name for name in KINDS["controlnet"].names if source.has(name)]
    if pooling := [name for name in nets if source.config(name).get("global_pool_conditions")]:
        made["control_conditional_only"] = pooling
    for problem in limits.constants(made):
        raise UserError(f"{source.path}: {problem}", "get the files of the model again")
    _check_channels(unet.get("in_channels", 4), vae["latent_channels"], source)
    return made


def note_left_out(source: Source, *, safety_checker: bool) -> None:
    """Say which parts of diffusers' pipeline change its images and are left out: its checker and watermark.

    Args:
        safety_checker: whether the checker is left out, where the source has one, without having been asked to.
    """
    if safety_checker and source.has("safety_checker"):
        text = (
            f"{source.name}: the safety checker is left out; diffusers blackens the images that it rejects. "
            "--safety-checker (export_pipeline(..., safety_checker=True)) exports it; without it, check images before "
            "you publish them"
        )
        warnings.warn(text, Notice, stacklevel=3)
    if source.family == "sdxl" and find_spec("imwatermark") is not None:
        text = (
            f"{source.name}: no invisible watermark is added; diffusers adds one where invisible-watermark is installed"
        )
        warnings.warn(text, Notice, stacklevel=3)


def _check_channels(channels: Any, latent: int, source: Source) -> None:
    """Refuse before an export a UNet that no call can run: it takes latents, and for inpainting mask and image."""
    if channels in (latent, 2 * latent + 1):
        return
    pipeline = str(source.index.get("_class_name"))
    if channels == 2 * latent:
        if "InstructPix2Pix" in pipeline or "unet" in source.files:
            return
        raise UserError(
            f"{source.path}: the UNet takes {channels} channels, as InstructPix2Pix does, and {pipeline} of "
            "model_index.json cannot run it",
            "if the model edits images: save it as a StableDiffusionInstructPix2PixPipeline",
        )
    kind = {latent + 1: "as a depth-to-image or upscaling model does"}
    what = kind.get(channels, "which no supported pipeline does") if isinstance(channels, int) else "no number"
    raise UserError(
        f"{source.path}: the UNet takes {channels!r} channels, {what}; that is not supported",
        f"give a text-to-image model ({latent} channels), one that edits images ({2 * latent}), or an inpainting one "
        f"({2 * latent + 1})",
    )


def edits(source: Source) -> bool:
    """Whether the UNet takes latents of an image beside its own, as InstructPix2Pix (arXiv 2211.09800) does."""
    return source.config("unet").get("in_channels", 4) == 2 * source.config("vae")["latent_channels"]


def latent_scale(vae: Mapping[str, Any], family: str) -> tuple[Any, Any]:
    """Factor and shift with x = (z - shift) * factor, of the VAE's latents z and the UNet's x.

    `latents_mean` and `latents_std` of a config make one of both for each channel, as in diffusers' pipelines of SDXL
    (playground-v2.5); those of SD1.x and SD2.x do not read them.

    Args:
        vae: its config.
    """
    # Configs from before the field existed (such as SD1.5's own) mean diffusers' default.
    usual = 0.18215 if vae.get("_class_name") == "AutoencoderKL" else 1.0
    factor = usual if vae.get("scaling_factor") is None else vae["scaling_factor"]
    mean, std = vae.get("latents_mean"), vae.get("latents_std")
    if family == "sdxl" and mean is not None and std is not None:
        return [factor / value if value else 0.0 for value in std], list(mean)
    return factor, vae.get("shift_factor") or 0.0


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)


def own_sampling(source: Source) -> Sampling:
    """How a pipeline is meant to be sampled: by the constants that it carries along, else by its scheduler.

    Raises:
        UserError: for a scheduler that no sampler here is, a field of it that none can honour, and a model that looks
            like a few-step one of no known family.
    """
    return checked_sampling(default_sampler(source))


def chosen_sampling(
    source: Source, sampler: str | None, steps: int | None, guidance: float | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The sampling constants to store: those given, and the source's for the rest.

    Args:
        options: of the sampler (`accel.sampling.constants.OPTIONS`); those that are None were not given.
    """
    given = {name: value for name, value in options.items() if value is not None}
    carried = source.sampler() or {}
    if sampler is None or sampler == carried.get("name"):
        made = own_sampling(source).as_dict()
    else:
        few = sampler in ("dmd2", "lcm", "tcd")
        made = {"name": sampler, "guidance": 0.0 if few else carried.get("guidance", source.usual_guidance)}
        steps = SAMPLERS[sampler].steps if steps is None and sampler in SAMPLERS else steps
    if steps is not None:
        made.pop("timesteps", None)
        made["steps"] = steps
        if made["name"] == "dmd2":
            made["timesteps"] = grid("dmd2", NoiseSchedule.from_scheduler(source.scheduler()), made.pop("steps"))
    if guidance is not None:
        made["guidance"] = guidance
    kept = made.get("options", {}) | given
    return made | ({"options": kept} if kept else {})


def checked_sampling(constants: Any) -> Sampling:
    """Sampling constants that a bundle can be run with.

    Raises:
        UserError: for anything else, see `Sampling.from_dict`.
    """
    return Sampling.from_dict(constants, "the sampling constants", SAMPLERS)


def default_sampler(source: Source) -> dict[str, Any]:
    """The sampling constants of a pipeline that carries none along: its own scheduler's."""
    if (constants := source.sampler()) is not None:
        return constants
    config = source.scheduler()
    if source.few_step is None:
        few_step.ask_about(source.parts, source.name, config)
    name = own_sampler(config)
    if name is None:
        raise UserError(
            f"the model's scheduler is {config['_class_name']}, which no sampler here equals",
            f"--sampler NAME to draw with another: {', '.join(SAMPLERS)}",
        )
    few = name == "tcd"
    return {"name": name, "steps": SAMPLERS[name].steps, "guidance": 0.0 if few else source.usual_guidance}


def check_runs(source: Source, sampling: Sampling) -> None:
    """Refuse now what the first run would refuse, and say what is sampled otherwise than the model's files say.

    Raises:
        UserError: naming the scheduler's field or the option that this sampler cannot honour.
    """
    config = source.scheduler()
    schedule = NoiseSchedule.from_scheduler(config)
    if SAMPLERS[sampling.sampler].rows is not None:
        table(sampling.sampler, schedule, sampling.steps, timesteps=sampling.timesteps, **sampling.options)
    for note in _notes(source, sampling, config):
        warnings.warn(note, Notice, stacklevel=2)


def _notes(source: Source, sampling: Sampling, config: dict[str, Any]) -> Iterator[str]:
    scheduler, entry = str(config["_class_name"]), SAMPLERS[sampling.sampler]
    found, carried = source.recognised(), source.sampler()
    how = f"{sampling.sampler}, {sampling.count} steps, guidance {sampling.guidance:g}"
    if found is not None and (found.family.sampler or sampling.sampler) == sampling.sampler:
        yield f"a few-step model of family {found.family.name} (by {found.by}): sampled with {how}"
    elif entry.scheduler != scheduler and (carried is None or carried.get("name") != sampling.sampler):
        yield f"the model's own scheduler is {scheduler}; the bundle is sampled with {how} instead"
    unread = unread_fields(sampling.sampler, config) if entry.fields else {}
    if unread:
        fields = ", ".join(f"{field} = {value!r}" for field, value in unread.items())
        yield f"sampler {sampling.sampler} does not read the scheduler's {fields}"
