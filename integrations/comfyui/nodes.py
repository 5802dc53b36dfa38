"""The nodes. ComfyUI calls the method that FUNCTION names with the inputs of INPUT_TYPES (its V1 interface)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from accel import UserError
from accel.engines import ENGINES
from accel.sampling import Sampling

from .clip import Clip
from .lent import Lent
from .model import model, sigmas_of
from .vae import Vae

_CATEGORY = "accel"
_SAMPLERS = {"dmd2": "lcm", "lcm": "lcm", "euler": "euler", "dpmpp_2m": "dpmpp_2m", "ddim": "ddim"}
_OUTPUTS = ("MODEL", "CLIP", "VAE", "ACCEL")


def _folder() -> Path:
    """Where bundles lie in ComfyUI."""
    import folder_paths

    return Path(folder_paths.models_dir) / "accel"


def _bundles() -> list[str]:
    folder = _folder()
    found = sorted(path.parent.name for path in folder.glob("*/accel.json")) if folder.is_dir() else []
    return [*found, "digits/4step-int8", "digits/1step-int8"]


def _parts(lent: Lent) -> tuple[Any, Clip, Vae, Lent]:
    return model(lent), Clip(lent), Vae(lent), lent


class AccelLoader:
    """A bundle's networks."""

    RETURN_TYPES, FUNCTION, CATEGORY = _OUTPUTS, "load", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        required = {"bundle": (_bundles(),), "engine": (["auto", *ENGINES],)}
        return {"required": required, "optional": {"hub": ("STRING", {"default": ""})}}

    def load(self, bundle: str, engine: str, hub: str = "") -> tuple[Any, ...]:
        """
        Args:
            hub: a name of the hub, `user/name@revision`, or the path of a bundle, instead of one in models/accel.
        """
        local = _folder() / bundle
        return _parts(Lent(hub.strip() or (str(local) if local.is_dir() else bundle), engine))


class AccelLora:
    """The same bundle with a LoRA file, fused into the weights of its engines when it draws."""

    RETURN_TYPES, FUNCTION, CATEGORY = _OUTPUTS, "add", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths

        strength = ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01})
        return {
            "required": {"accel": ("ACCEL",), "lora": (folder_paths.get_filename_list("loras"),), "strength": strength}
        }

    def add(self, accel: Lent, lora: str, strength: float) -> tuple[Any, ...]:
        import folder_paths

        file = folder_paths.get_full_path("loras", lora)
        return _parts(replace(accel, loras=(*accel.loras, f"{file}={strength:g}")))


class AccelSampling:
    """How the bundle is meant to be sampled: what SamplerCustom takes."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("SAMPLER", "SIGMAS", "FLOAT"), "constants", _CATEGORY
    RETURN_NAMES = ("sampler", "sigmas", "cfg")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"accel": ("ACCEL",)},
            "optional": {"steps": ("INT", {"default": 0, "min": 0, "max": 1000})},
        }

    def constants(self, accel: Lent, steps: int = 0) -> tuple[Any, torch.Tensor, float]:
        """
        Args:
            steps: instead of the bundle's own number; 0 for that.
        """
        import comfy.samplers

        from accel.sampling.samplers import grid

        own = Sampling.from_dict(accel.manifest.sampler, "the bundle's sampler")
        if own.sampler not in _SAMPLERS:
            raise UserError(f"ComfyUI has no sampler that is {own.sampler}", "use Accel Draw, or a sampler of ComfyUI")
        if own.timesteps and not steps:
            times = list(own.timesteps)
        else:
            times = grid(own.sampler, accel.pipeline.schedule, steps or own.count)
        table = sigmas_of(accel)
        sigmas = torch.as_tensor([*(float(table[round(t)]) for t in times), 0.0], dtype=torch.float32)
        return comfy.samplers.ksampler(_SAMPLERS[own.sampler]), sigmas, max(1.0, float(own.guidance))


class AccelDraw:
    """Prompt to image with accel's own pipeline: its noise, so that a seed gives the image of `accel run`."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "draw", _CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = ("STRING", {"multiline": True, "default": ""})
        number = {"default": 0, "min": 0, "max": 8192, "step": 8}
        required = {"accel": ("ACCEL",), "prompt": text, "seed": ("INT", {"default": 0, "min": 0, "max": 2**32 - 1})}
        optional = {"negative": text, "width": ("INT", number), "height": ("INT", number)}
        return {"required": required, "optional": optional | {"steps": ("INT", {"default": 0, "min": 0, "max": 1000})}}

    def draw(
        self, accel: Lent, prompt: str, seed: int, negative: str = "", width: int = 0, height: int = 0, steps: int = 0
    ) -> tuple[torch.Tensor]:
        """
        Args:
            width, height, steps: 0 for the bundle's own.
        """
        call = {name: value for name, value in dict(width=width, height=height, steps=steps).items() if value}
        call |= {"negative_prompt": negative} if negative.strip() else {}
        images = accel.pipeline(prompt, seed=seed, output_type="np", **call).images
        return (torch.as_tensor(images),)


NODE_CLASS_MAPPINGS = {
    "AccelLoader": AccelLoader,
    "AccelLora": AccelLora,
    "AccelSampling": AccelSampling,
    "AccelDraw": AccelDraw,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AccelLoader": "Accel Loader",
    "AccelLora": "Accel LoRA",
    "AccelSampling": "Accel Sampling",
    "AccelDraw": "Accel Draw",
}
