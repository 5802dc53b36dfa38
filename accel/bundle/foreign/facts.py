"""What a manifest needs, out of the configs of a pipeline folder; and what had to be assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...files import OPENVINO_GENAI, read_json
from ...sampling.samplers import own_sampler
from ..shape_profiles import Profile, Range, profile

_AGAIN = "get the folder again, or export the model with accel"
_TOKENS = 77


@dataclass(frozen=True)
class Facts:
    """Of a folder.

    Attributes:
        family: sd1, sd2 or sdxl.
        pipeline, sampler: as in a manifest.
        profile: what is taken to be accepted.
        assumed: what no file says, in words.
    """

    family: str
    pipeline: Mapping[str, Any]
    sampler: Mapping[str, Any]
    profile: Profile
    assumed: tuple[str, ...]

    def dims(self, component: str) -> dict[str, Range]:
        sizes = {key: self.pipeline[key] for key in ("vae_scale", "latent_multiple")}
        return self.profile.dims(**sizes, guidance=float(self.sampler["guidance"]) > 1, component=component)


def read(folder: Path) -> Facts:
    """The facts of a folder.

    Raises:
        UserError: for a config that is missing or damaged, or a scheduler that no sampler equals.
    """
    unet, vae, index = (
        _config(folder, name) for name in ("unet/config.json", "vae_decoder/config.json", "model_index.json")
    )
    try:
        family = _family(unet)
        sides = unet["sample_size"] if isinstance(unet["sample_size"], list) else [unet["sample_size"]] * 2
        scale, multiple = 2 ** (len(vae["block_out_channels"]) - 1), 2 ** (len(unet["block_out_channels"]) - 1)
        usual = 0.13025 if family == "sdxl" else 0.18215
        native = [int(side) * scale for side in sides]
        pipeline = {
            "vae_scale": scale,
            "latent_channels": int(vae["latent_channels"]),
            "scaling_factor": float(vae.get("scaling_factor") or usual),
            "shift_factor": float(vae.get("shift_factor") or 0.0),
            "latent_multiple": multiple,
            "native_size": native[0] if native[0] == native[1] else native,
            "zero_empty_prompt": bool(index.get("force_zeros_for_empty_prompt", family == "sdxl")),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: a config of it is not one of diffusers ({error!r:.80})", _AGAIN) from None
    sampler, assumed = _sampler(folder, unet, family)
    step = scale * multiple
    spans = [
        f"{name}={max(step, side // 2 // step * step)}-{2 * side}"
        for name, side in zip(("height", "width"), native, strict=True)
    ]
    chosen = profile(",".join(["batch=1-4", *spans, f"tokens={_TOKENS}"]))
    words = [f"images of {spans[0]}, {spans[1]}, one to four at once", *assumed]
    return Facts(family, pipeline, sampler, chosen, tuple(words))


def _config(folder: Path, name: str) -> dict[str, Any]:
    found = read_json(folder / name, name)
    if not isinstance(found, dict):
        raise UserError(f"{folder / name} is not a JSON object", _AGAIN)
    return found


def _family(unet: Mapping[str, Any]) -> str:
    if unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _sampler(folder: Path, unet: Mapping[str, Any], family: str) -> tuple[dict[str, Any], list[str]]:
    """Name, steps and guidance; and which of them are diffusers' usual ones, because no file says them."""
    config = _config(folder, "scheduler/scheduler_config.json")
    if (name := own_sampler(config)) is None:
        fix = "put the config of one of diffusers' schedulers into scheduler/, such as DDIMScheduler"
        raise UserError(f"{folder}: there is no sampler that equals {config.get('_class_name')}", fix)
    if (folder / OPENVINO_GENAI).is_file():  # one of our own says it
        record = _config(folder, OPENVINO_GENAI)
        return {"name": name, "steps": record["num_inference_steps"], "guidance": record["guidance_scale"]}, []
    few = name == "lcm"
    embeds = unet.get("time_cond_proj_dim") is not None
    guidance = (8.5 if embeds else 0.0) if few else 5.0 if family == "sdxl" else 7.5
    made = {"name": name, "steps": 4 if few else 25, "guidance": guidance}
    return made, [f"{made['steps']} steps", f"guidance {guidance:g}"]
