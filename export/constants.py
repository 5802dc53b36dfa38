"""The constants an embedding app needs to run a pipeline: sizes, factors, and how it is meant to be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel.errors import UserError
from accel.models.source import Source
from accel.sampling.samplers import SAMPLERS


def pipeline_constants(source: Source) -> dict[str, Any]:
    """Sizes and factors that turn pixels into latents and back; see `accel.bundle.Manifest.pipeline`."""
    unet, vae = source.config("unet"), source.config("vae")
    stages = vae.get("block_out_channels") or vae.get("decoder_block_out_channels")
    size, widths, channels = unet.get("sample_size"), unet.get("block_out_channels"), vae.get("latent_channels")
    for name, key, value, ok in (
        ("vae", "block_out_channels", stages, isinstance(stages, list)),
        ("vae", "latent_channels", channels, isinstance(channels, int)),
        ("unet", "block_out_channels", widths, isinstance(widths, list)),
        ("unet", "sample_size", size, all(isinstance(n, int) for n in (size if isinstance(size, list) else [size]))),
    ):
        if not ok:
            raise UserError(f"{source.path}/{name}/config.json: {key} = {value!r} makes no sense", "get the file again")
    scale = 2 ** (len(stages) - 1)
    # Configs from before the field existed (such as SD1.5's own) mean diffusers' default.
    scaling = 0.18215 if vae.get("_class_name") == "AutoencoderKL" else 1.0
    return {
        "vae_scale": scale,
        "latent_channels": vae["latent_channels"],
        "scaling_factor": vae.get("scaling_factor", scaling),
        "shift_factor": vae.get("shift_factor") or 0.0,
        "latent_multiple": 2 ** (len(unet["block_out_channels"]) - 1),
        "native_size": (size if isinstance(size, int) else max(size)) * scale,
        "zero_empty_prompt": bool(source.index.get("force_zeros_for_empty_prompt", source.family == "sdxl")),
    }


def checked_sampler(sampler: Any) -> dict[str, Any]:
    """The sampling constants as they go into the manifest, after making sure that they can be run."""
    fix = 'such as {"name": "dpmpp_2m", "steps": 25, "guidance": 7.5}, or with "timesteps" instead of "steps"'
    if not isinstance(sampler, Mapping):
        raise UserError("the sampling constants are no table", fix)
    name, guidance = sampler.get("name"), sampler.get("guidance")
    steps, timesteps = sampler.get("steps"), sampler.get("timesteps")
    if not isinstance(name, str) or name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}", f"one of: {', '.join(SAMPLERS)}")
    if not isinstance(guidance, (int, float)) or not 0 <= guidance < float("inf"):
        raise UserError(f"guidance = {guidance!r} makes no sense", "use 0 for none, 3 to 12 for a guided model")
    if timesteps is None and not (isinstance(steps, int) and steps >= 1):
        raise UserError(f"steps = {steps!r} makes no sense", "use a whole number of at least 1")
    if timesteps is not None and not (
        isinstance(timesteps, (list, tuple)) and timesteps and all(isinstance(t, (int, float)) for t in timesteps)
    ):
        raise UserError(f"timesteps = {timesteps!r} makes no sense", "use a list of numbers, highest first")
    return dict(sampler)


def own_sampler(source: Source) -> Any:
    """How a pipeline is meant to be run: by the constants that it carries along, else by its scheduler."""
    constants = source.sampler()
    return default_sampler(source) if constants is None else constants


def default_sampler(source: Source) -> dict[str, Any]:
    """How a pipeline without sampling constants is meant to be run: by its scheduler's class."""
    if source.index["scheduler"][1] == "LCMScheduler":
        from diffusers import LCMScheduler

        scheduler = LCMScheduler.from_config(source.config("scheduler"))
        scheduler.set_timesteps(4)
        return {"name": "dmd2", "timesteps": scheduler.timesteps.tolist(), "guidance": 0.0}
    return {"name": "dpmpp_2m", "steps": 25, "guidance": 7.5 if source.family != "sdxl" else 5.0}
