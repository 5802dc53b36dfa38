"""Encode images to latents and captions to the UNet's conditions: the frozen half of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from accel.dtypes import torch_dtype
from accel.errors import UserError
from accel.models.config_files import clip_tokenizer
from accel.models.constants import latent_scale
from accel.models.source import Source, open_source


@dataclass
class Encoders:
    """The VAE, text encoders and tokenizers of a pipeline folder; loaded when first used, frozen, float32.

    Attributes:
        source: the pipeline folder.
        device: where they run.
        dtype: dtype the text encoders run in. The VAE stays in float32: SDXL's overflows in float16.
        vae_dtype: what the VAE encodes in, by autocast: its weights and what it decodes stay in float32.
        text_learns: the text encoders are trained, so captions are encoded in the loss and not ahead of it.
        open: how another pipeline of this kind is opened, a teacher's.
        by_class: captions are class numbers; never here, see `edm.source.ClassEncoders`.
    """

    by_class = False

    source: Source
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    vae_dtype: torch.dtype = torch.float32
    text_learns: bool = False
    open: Callable[[str], Source] = open_source

    @cached_property
    def vae(self) -> nn.Module:
        return self.source.load("vae").requires_grad_(False).to(self.device)

    @cached_property
    def text(self) -> list[tuple[Any, nn.Module]]:
        """(tokenizer, text encoder): one for SD1.x and SD2.x, two for SDXL."""
        names = [name for name in ("", "_2") if self.source.has(f"text_encoder{name}")]
        return [
            (
                clip_tokenizer(self.source.path / f"tokenizer{name}"),
                self.source.load(f"text_encoder{name}").requires_grad_(False).to(self.device, self.dtype),
            )
            for name in names
        ]

    def encode_in(self, dtype: str) -> None:
        """Choose what the VAE encodes in.

        Raises:
            UserError: for float16 and SDXL's VAE, which overflows in it, unless its config says that it does not.
        """
        if dtype == "float16" and self.sdxl and self.source.config("vae").get("force_upcast", True):
            fix = "--vae-dtype bfloat16, or a VAE whose config has force_upcast false"
            raise UserError(f"the VAE of {self.source.name} overflows in float16", fix)
        self.vae_dtype = torch_dtype(dtype)

    def autocast(self) -> Any:
        """What a pipeline samples in: its text encoders' dtype, which networks in float32 do not take without it."""
        kind = torch.device(self.device).type
        return torch.autocast(kind, self.dtype, enabled=self.dtype != torch.float32)

    @property
    def sdxl(self) -> bool:
        return self.source.family == "sdxl"

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.source.config("vae")["block_out_channels"]) - 1)

    @property
    def latent_channels(self) -> int:
        return self.source.config("vae").get("latent_channels", 4)

    @cached_property
    def inpaints(self) -> bool:
        """Whether the UNet takes a mask and the latents of the masked image beside x_t: see `inpainting`."""
        return self.source.config("unet").get("in_channels", 4) == 2 * self.latent_channels + 1

    @property
    def uncached(self) -> str:
        """Why a cache would not help; "" where it does."""
        return "this model is for inpainting, and what its masks leave is encoded every time" if self.inpaints else ""

    @cached_property
    def digest(self) -> str:
        """sha256 over the weights that decide what comes out."""
        names = [name for name in ("vae", "text_encoder", "text_encoder_2") if self.source.has(name)]
        return self.source.digest(names)

    @cached_property
    def latent_scale(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Factor and shift, [C or 1, 1, 1], with x = (z - shift) * factor of the VAE's latents z and the UNet's x."""
        both = latent_scale(self.source.config("vae"), self.source.family)
        factor, shift = (torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in both)
        return factor.to(self.device), shift.to(self.device)

    @torch.no_grad()
    def images(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Pixels [n, 3, h, w] in -1..1 to `latent_mean` and `latent_std`, float32 [n, 4, h/factor, w/factor].

        Both are scaled as the UNet sees them: mean + std * noise is a draw of the encoder's posterior.
        """
        half = self.vae_dtype != torch.float32
        with torch.autocast(torch.device(self.device).type, self.vae_dtype, enabled=half):
            posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        scale, shift = self.latent_scale
        return {"latent_mean": (posterior.mean.float() - shift) * scale, "latent_std": posterior.std.float() * scale}

    @torch.no_grad()
    def prompts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Captions to `context` [n, 77, D] and, for SDXL, `pooled` [n, P]; float32.

        The empty caption is what guidance compares with: SDXL's is all zeros where the pipeline says so
        (`force_zeros_for_empty_prompt`), SD1.x and SD2.x encode it like any other.
        """
        return self.conditions(texts, [model for _, model in self.text])

    def conditions(self, texts: Sequence[str], models: Sequence[nn.Module]) -> dict[str, torch.Tensor]:
        """As `prompts`, through text encoders that are given, one per tokenizer, and with gradients."""
        hidden, pooled = [], None
        for (tokenizer, _), model in zip(self.text, models, strict=True):
            out = model(sent(token_ids(tokenizer, texts), self.device), output_hidden_states=self.sdxl)
            hidden.append(out.hidden_states[-2] if self.sdxl else out.last_hidden_state)
            pooled = getattr(out, "text_embeds", pooled)
        context = {"context": torch.cat(hidden, -1).float()}
        if self.sdxl:
            context["pooled"] = pooled.float()
            if self.source.index.get("force_zeros_for_empty_prompt", True):
                full = sent(torch.tensor([bool(text) for text in texts]), self.device)
                context = {name: value * full.view(-1, *[1] * (value.dim() - 1)) for name, value in context.items()}
        return context


def token_ids(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """Token ids [n, 77], cut and padded as the pipeline does it."""
    return tokenizer(
        list(texts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


def sent(value: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor on its way to a device; a GPU fetches it from pinned memory, for which the host does not wait."""
    if torch.device(device).type == "cuda" and not value.is_cuda and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def encoded(batch: dict[str, Any], encoders: Encoders) -> dict[str, Any]:
    """A batch with `latent_mean`, `latent_std` and `context` on the device, whether it came from a cache or not."""
    made = {
        key: sent(value, encoders.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()
    }
    if "latent_mean" not in made:
        made |= encoders.images(made["pixels"])
        if not encoders.inpaints:  # which hides parts of them
            del made["pixels"]
    if "context" not in made and not encoders.text_learns:
        made |= encoders.prompts(made["caption"])
    return {
        key: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in made.items()
    }
