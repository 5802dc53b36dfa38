"""A bundle's VAE as a VAE of ComfyUI."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from accel import UserError

from .lent import Lent


class Vae:
    """What the nodes VAEDecode and VAEEncode call. Latents are the VAE's own, as ComfyUI's LATENT has them."""

    def __init__(self, lent: Lent):
        self.lent = lent

    def decode(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        """Images [B, H, W, 3] in [0, 1] of latents [B, C, h, w]."""
        found = self._run("vae_decoder", latent_sample=samples)
        return ((found.permute(0, 2, 3, 1) + 1) / 2).clamp(0, 1)

    def encode(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        """Latents [B, C, h, w], the mean of the encoder's distribution, of images [B, H, W, 3] in [0, 1]."""
        if "vae_encoder" not in self.lent.manifest.components:
            raise UserError(f"{self.lent.bundle} has no VAE encoder", "export the model with all its components")
        found = self._run("vae_encoder", sample=pixels[..., :3].permute(0, 3, 1, 2) * 2 - 1)
        return found[:, : self.lent.manifest.pipeline["latent_channels"]]

    def decode_tiled(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        raise UserError("tiles of ComfyUI are for its own VAE", "use VAE Decode, or the node Accel Draw")

    def _run(self, component: str, **feeds: torch.Tensor) -> torch.Tensor:
        engine = self.lent.pipeline.engines[component]
        kinds = {spec.name: spec.dtype for spec in engine.component.inputs}
        arrays = {name: value.detach().float().cpu().numpy().astype(kinds[name]) for name, value in feeds.items()}
        found = next(iter(engine(**arrays).values()))
        return torch.as_tensor(np.asarray(found.cpu() if hasattr(found, "cpu") else found)).float()
