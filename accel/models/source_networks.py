"""The networks of a model's source, ready to be exported: one function for each kind of component.

Every function takes the source, the name of the component and what the UNet takes, and loads the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from . import control_networks, networks
from .networks import Network
from .source import Source


@dataclass(frozen=True)
class UNetInputs:
    """What the UNet of a bundle takes, beside what its config says.

    Attributes:
        tokens: length of its text context.
        adapter: number of T2I-Adapter features.
        control: whether it takes the residuals of a ControlNet.
    """

    tokens: int = 77
    adapter: int = 0
    control: bool = False


def text_encoder(source: Source, name: str, inputs: UNetInputs) -> Network:
    hidden_states = source.family == "sdxl"
    return networks.text_encoder(source.load(name), name, hidden_states=hidden_states, tokens=own_tokens(source))


def unet(source: Source, name: str, inputs: UNetInputs) -> Network:
    return networks.unet(source.load(name), tokens=inputs.tokens, adapter=inputs.adapter, control=inputs.control)


def vae_decoder(source: Source, name: str, inputs: UNetInputs) -> Network:
    return networks.vae_decoder(source.load("vae"))


def vae_encoder(source: Source, name: str, inputs: UNetInputs) -> Network:
    return networks.vae_encoder(source.load("vae"))


def t2i_adapter(source: Source, name: str, inputs: UNetInputs) -> Network:
    shapes = control_networks.unet_adapter_shapes(unet_config(source))[: inputs.adapter]
    return Network(name, name, *control_networks.t2i_adapter(source.load(name), shapes))


def controlnet(source: Source, name: str, inputs: UNetInputs) -> Network:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(source.config("unet"))
    shared = networks.unet(model, tokens=inputs.tokens).inputs
    return Network(name, name, *control_networks.controlnet(source.load(name), shared))


def own_tokens(source: Source) -> int:
    """Length of one context of the text encoder, start and end included."""
    return source.config("text_encoder").get("max_position_embeddings", 77)


def unet_config(source: Source) -> dict[str, Any]:
    """The UNet's config, with diffusers' defaults for fields that are younger than some configs."""
    return {"mid_block_type": "UNetMidBlock2DCrossAttn", "addition_embed_type": None} | source.config("unet")
