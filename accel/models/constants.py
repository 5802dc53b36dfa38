"""The constants that an app needs to run a pipeline: sizes, factors, and how it is meant to be sampled."""

from __future__ import annotations

from typing import Any

from ..errors import UserError
from ..sampling import Sampling
from ..sampling.samplers import SAMPLERS
from .source import Source


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
            raise UserError(f"{source.path}/{name}/config.json: {key} is invalid: {value!r}", "get the file again")
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


def own_sampling(source: Source) -> Sampling:
    """How a pipeline is meant to be sampled: by the constants that it carries along, else by its scheduler."""
    constants = source.sampler()
    return checked_sampling(default_sampler(source) if constants is None else constants)


def checked_sampling(constants: Any) -> Sampling:
    """Sampling constants that a bundle can be run with.

    Raises:
        UserError: for anything else, see `Sampling.from_dict`.
    """
    return Sampling.from_dict(constants, "the sampling constants", SAMPLERS)


def default_sampler(source: Source) -> dict[str, Any]:
    """The sampling constants of a pipeline that carries none along: by the class of its scheduler."""
    if source.index["scheduler"][1] == "LCMScheduler":
        from diffusers import LCMScheduler

        scheduler = LCMScheduler.from_config(source.config("scheduler"))
        scheduler.set_timesteps(4)
        return {"name": "dmd2", "timesteps": scheduler.timesteps.tolist(), "guidance": 0.0}
    return {"name": "dpmpp_2m", "steps": 25, "guidance": 7.5 if source.family != "sdxl" else 5.0}
