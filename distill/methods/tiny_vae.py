"""A tiny VAE distilled from a full one: in one to four steps the full decoder is the larger half of the bill.

    L = w_rec |D(z) - V(z)|^2 + w_perc mean_l |F_l(D(z)) - F_l(V(z))| / mean |F_l(V(z))| + w_enc |E(V(z)) - z|^2

D and E are the tiny decoder and encoder (the network of TAESD, diffusers' `AutoencoderTiny`), V the full decoder and
F_l the down blocks of the full encoder, which serve as perceptual features: they belong to the model, so nothing has to
be downloaded, and they see what LPIPS (arXiv 1801.03924) is used for: edges and texture that a squared error blurs.
The images are the full decoder's own, so latents are all that is needed of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from accel.dtypes import torch_dtype
from accel.errors import UserError

from ..data.encoders import Encoders
from ..diffusion.denoising import POSTERIOR, clean
from ..settings import TinyVaeRecipe
from ..training import samples
from ..training.method import OptimizerPhase, Terms, TrainedNetwork
from ..training.pipelines import assemble, write_network


def tiny_config(vae: Mapping[str, Any], width: int, blocks: int) -> dict[str, Any]:
    """Config of an `AutoencoderTiny` that stands in for a VAE: as many stages, latents as the UNet sees them."""
    stages = len(vae["block_out_channels"])
    return dict(
        encoder_block_out_channels=(width,) * stages,
        decoder_block_out_channels=(width,) * stages,
        num_encoder_blocks=(1, *[blocks] * (stages - 1)),
        num_decoder_blocks=(*[blocks] * (stages - 1), 1),
        latent_channels=vae["latent_channels"],
        in_channels=vae["in_channels"],
        out_channels=vae["out_channels"],
        scaling_factor=1.0,
        force_upcast=False,
    )


class Halves(nn.Module):
    """(latents, images) -> (images of the latents, latents of the images)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.decoder(latents), self.model.encoder(images)


class TinyVaeMethod:
    """An AutoencoderTiny learns to be the pipeline's VAE."""

    def __init__(self, recipe: TinyVaeRecipe, encoders: Encoders):
        from diffusers import AutoencoderTiny

        config = encoders.source.config("vae")
        if config.get("_class_name") != "AutoencoderKL":
            raise UserError(f"{encoders.source.name} has a {config.get('_class_name')} already", "give a full VAE")
        if not (recipe.reconstruction_weight or recipe.perceptual_weight):
            raise UserError("all weights of the decoder's loss are 0", "give --reconstruction-weight")
        self.recipe, self.encoders = recipe, encoders
        encoders.text_learns = True  # nothing reads captions here, so they need not be encoded
        torch.manual_seed(recipe.seed)
        self.tiny = AutoencoderTiny(**tiny_config(config, recipe.width, recipe.blocks)).train()
        self.networks = {"vae": TrainedNetwork(Halves(self.tiny), self.tiny)}
        self.phases = (OptimizerPhase("vae", ("vae",), draws=(POSTERIOR,)),)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.encoders.device = device

    @torch.no_grad()
    def truth(self, latents: torch.Tensor) -> torch.Tensor:
        """What the full decoder makes of latents as the UNet sees them, float32 in about [-1, 1]."""
        with torch.autocast(latents.device.type, enabled=False):
            scale, shift = self.encoders.latent_scale
            return self.encoders.vae.decode(latents.float() / scale + shift).sample.clamp(-1, 1)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """What the full encoder's down blocks make of images."""
        encoder = self.encoders.vae.encoder
        made, x = [], encoder.conv_in(images)
        for block in encoder.down_blocks:
            x = block(x)
            made.append(x)
        return made

    def loss(self, phase: OptimizerPhase, batch: Mapping[str, Any], step: int) -> tuple[torch.Tensor, Terms]:
        latents = clean(batch, self.recipe.seed)
        images = self.truth(latents)
        decoded, encoded = self.networks["vae"].module(latents, images)
        terms = {"reconstruction": F.mse_loss(decoded.float(), images), "encoder": F.mse_loss(encoded.float(), latents)}
        weights = {"reconstruction": self.recipe.reconstruction_weight, "encoder": self.recipe.encoder_weight}
        if self.recipe.perceptual_weight:
            with torch.no_grad():
                wanted = self.features(images)
            pairs = zip(self.features(decoded.float()), wanted, strict=True)
            terms["perceptual"] = torch.stack([F.l1_loss(a, b) / b.abs().mean() for a, b in pairs]).mean()
            weights["perceptual"] = self.recipe.perceptual_weight
        return sum(weights[name] * term for name, term in terms.items()), terms

    @cached_property
    def _pipeline(self) -> Any:
        self.encoders.text_learns = False
        pipeline = assemble(self.encoders, self.encoders.source.load("unet").requires_grad_(False))
        pipeline.register_modules(vae=self.tiny)
        self.encoders.text_learns = True
        return pipeline

    def samples(self) -> Any:
        how = dict(num_inference_steps=self.recipe.sample_steps, guidance_scale=self.recipe.sample_guidance)
        return samples.grid(self._pipeline, self.recipe, how)

    def save(self, folder: Path) -> None:
        """diffusers' folder of an AutoencoderTiny: what `accel export --vae` and `from_pretrained` take."""
        write_network(self.tiny, folder, torch_dtype(self.recipe.save_dtype))


@torch.no_grad()
def psnr(tiny: nn.Module, latents: torch.Tensor, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of what a tiny VAE decodes against images in [-1, 1], over all of them."""
    made = torch.cat([tiny.decode(part).sample.clamp(-1, 1) for part in latents.split(16)])
    return float(10 * torch.log10(4 / F.mse_loss(made, images)))
