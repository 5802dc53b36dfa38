"""Pipelines around a network that learns: assembled in memory for samples, written to a folder as the result."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from accel.dtypes import torch_dtype
from accel.models.constants import latent_scale
from accel.models.few_step import scheduler_of
from accel.models.source import Source

from ..data.encoders import Encoders

SAVE_DTYPES = ("float32", "float16")


def assemble(encoders: Encoders, unet: nn.Module) -> Any:
    """A diffusers pipeline that samples with DPM-Solver++(2M), made of the parts that are in memory already."""
    import diffusers
    from diffusers import DPMSolverMultistepScheduler

    task = "Inpaint" if encoders.inpaints else ""
    scheduler = DPMSolverMultistepScheduler.from_config(encoders.source.config("scheduler"))
    parts = dict(vae=encoders.vae, unet=unet, scheduler=scheduler)
    (parts["tokenizer"], parts["text_encoder"]), *more = encoders.text
    if more:
        ((parts["tokenizer_2"], parts["text_encoder_2"]),) = more
        force = encoders.source.index.get("force_zeros_for_empty_prompt", True)
        cls = getattr(diffusers, f"StableDiffusionXL{task}Pipeline")
        made = cls(**parts, force_zeros_for_empty_prompt=force, add_watermarker=False)
    else:
        made = getattr(diffusers, f"StableDiffusion{task}Pipeline")(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    made.set_progress_bar_config(disable=True)
    return made


@torch.no_grad()
def draw(pipeline: Any, prompts: Sequence[str], latents: torch.Tensor, **sampling: Any) -> np.ndarray:
    """Images of an assembled pipeline, uint8 [n, h, w, 3], the UNet under whatever autocast is on.

    The VAE decodes outside of it: SDXL's overflows in float16, and the images would be black. An inpainting pipeline
    paints the whole image.

    Args:
        latents: the noise, [n, 4, h/8, w/8].
        sampling: steps and guidance, as the pipeline calls them.
    """
    vae, pixels = pipeline.vae, pipeline.vae_scale_factor
    family = "sdxl" if "XL" in type(pipeline).__name__ else ""
    scale, shift = (
        torch.tensor(value, dtype=vae.dtype, device=vae.device).reshape(-1, 1, 1)
        for value in latent_scale({"_class_name": type(vae).__name__, **vae.config}, family)
    )
    height, width = (pixels * cells for cells in latents.shape[2:])
    if pipeline.unet.config.in_channels != latents.shape[1]:
        blank = torch.zeros(1, 3, height, width, device=vae.device)
        with torch.autocast(vae.device.type, enabled=False):
            seen = (vae.encode(blank).latent_dist.mean - shift) * scale
        sampling |= dict(image=blank, mask_image=blank[:, :1] + 1, masked_image_latents=seen, strength=1.0)
    made = pipeline(
        list(prompts), latents=latents.to(vae.device), height=height, width=width, output_type="latent", **sampling
    ).images
    with torch.autocast(vae.device.type, enabled=False):
        decoded = vae.decode(made.to(vae.dtype) / scale + shift).sample
    return (pipeline.image_processor.postprocess(decoded, "np") * 255).round().astype(np.uint8)


def save_pipeline(
    source: Source,
    folder: Path,
    networks: Mapping[str, nn.Module],
    *,
    dtype: str = "float32",
    sampler: Mapping[str, Any] | None = None,
) -> None:
    """Write a complete diffusers pipeline: the source's files, but for the networks that were trained.

    Args:
        source: the pipeline that the networks belong to.
        folder: must exist; files are added.
        networks: component name -> network.
        dtype: of the stored weights; the config asks diffusers for float32 as ever.
        sampler: sampling constants to store beside it, as `sampler.json`; the source's own where None.
    """
    stored = torch_dtype(dtype, SAVE_DTYPES, "save dtype")
    index = dict(source.index)
    for name in ("safety_checker", "feature_extractor", "image_encoder"):
        if name in index:
            index[name] = [None, None]
    if "safety_checker" in index:
        index["requires_safety_checker"] = False
    for name in [name for name in index if source.has(name)]:
        if name not in networks:
            source.copy(name, folder / name)
    for name, network in networks.items():
        write_network(network, folder / name, stored)
    constants = sampler or source.sampler()
    if constants:
        (folder / "sampler.json").write_text(json.dumps(dict(constants)) + "\n")
        if scheduler := scheduler_of(source.scheduler(), constants):  # so that diffusers draws the same
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")
            index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_network(network: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """One network as its own library would write it, in one safetensors file of a dtype."""
    network.save_pretrained(folder, safe_serialization=True, max_shard_size="100GB")
    config = json.loads((folder / "config.json").read_text())
    if config.pop("_name_or_path", None):  # the folder that it was trained from, which is nobody else's business
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    renamed = type(network).__name__ == "CLIPTextModel"
    if dtype == torch.float32 and not renamed:
        return
    for path in folder.glob("*.safetensors"):
        tensors = {
            _published(name) if renamed else name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})


def _published(name: str) -> str:
    """The name of a CLIP text model's weight in published folders. transformers 5 leaves its prefix out, and older
    versions then draw such weights at random, with a warning and no error."""
    prefix = "text_model."
    return name if name.startswith(prefix) else f"{prefix}{name}"
