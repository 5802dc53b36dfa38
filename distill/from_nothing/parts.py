"""What the small models that are trained from nothing have in common: losses of their parts, and how they are written.

`fit.py` is the loop; `distill/digits` and `distill/emoji` say which networks, which images and in which order.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save as serialized
from torch import nn

# SD 1.5's own scheduler file, but for v instead of epsilon (see `v_loss`). PNDM does not read
# clip_sample; schedulers made from this config, such as DDIM, do.
SCHEDULER: Mapping[str, Any] = MappingProxyType(
    dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        num_train_timesteps=1000,
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
        clip_sample=False,
        timestep_spacing="leading",
    )
)


def pick(count: int, batch: int, generator: torch.Generator) -> torch.Tensor:
    """Rows [batch] of one step, out of `count`."""
    return torch.randint(count, (batch,), generator=generator)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def text_encoder(config: Mapping[str, Any], tokenizer: Any) -> Any:
    """A CLIP text encoder of random weights for a tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return CLIPTextModel(CLIPTextConfig(**config, **ids, vocab_size=len(tokenizer)))


def reconstructed(vae: Any, images: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images through the VAE, by one draw of their latents, and the KL divergence of these from the unit normal."""
    posterior = vae.encode(images).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=generator)
    decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    return decoded, 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()


@torch.no_grad()
def encode_all(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Latents [n, c, h, w] of all images, once and for all, not yet scaled."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])


def v_loss(
    unet: Any, alphas: torch.Tensor, latents: torch.Tensor, context: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Squared error of the predicted v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 at random times.

    (Salimans and Ho 2022, arXiv 2202.00512.) latents [b, c, h, w], context [b, tokens, d]. Not of the noise: at the
    highest noise levels, the ones at which the subject is decided, x_t is the answer to within a percent, so what a
    small network learns there is to copy its input, and never to read the prompt.
    """
    times = torch.randint(len(alphas), (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    alpha = alphas[times].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
    v = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    return F.mse_loss(unet(noisy, times, context).sample.float(), v)


def assembled(vae: Any, encoder: Any, tokenizer: Any, unet: Any, scheduler: Any) -> Any:
    """The parts as a diffusers pipeline."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_pipeline(pipeline: Any, folder: Path, tokenizer: Path) -> None:
    """Write a pipeline, and the tokenizer's files as they are in `tokenizer`, so that any transformers finds its own.

    The weights are stored in half precision and the configs say full: half the size on disk, and the same arithmetic
    as ever once loaded.
    """
    pipeline.save_pretrained(folder, safe_serialization=True)
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    for path in folder.glob("*/*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        halved = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
        path.write_bytes(serialized(halved, metadata={"format": "pt"}))


def load(folder: Path) -> Any:
    """A written pipeline as anyone would load it, with the sampler the figures are measured with."""
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    return pipeline
