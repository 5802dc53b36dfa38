"""The networks of a model's source, ready to be exported: one function for each kind of component.

Every function takes the source, the name of the component and what the UNet takes, and loads the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

import torch

from ..bundle.kinds import KINDS, kind_of
from . import control_networks, networks
from .constants import pipeline_constants
from .ip_adapter import files as ip_adapter_files
from .ip_adapter import image_encoder as image_encoders
from .networks import Network
from .source import Source


@dataclass(frozen=True)
class UNetInputs:
    """What the UNet of a bundle takes, beside what its config says.

    Attributes:
        tokens: length of its text context.
        adapter: number of T2I-Adapter features.
        control: whether it takes the residuals of ControlNets, summed.
        time_ids: how many numbers SDXL's size conditioning has; a refiner's has five.
        image_tokens: length of the image encoder's hidden states that its IP-Adapter takes; 0 for one that takes the
            embedding, and without an IP-Adapter.
    """

    tokens: int = 77
    adapter: int = 0
    control: bool = False
    time_ids: int = 6
    image_tokens: int = 0


def clip_skips(source: Source) -> range:
    """How many layers before the last one the outputs of a text encoder can lie; SDXL's has all of them anyway."""
    return range(0) if source.family == "sdxl" else range(1, source.config("text_encoder")["num_hidden_layers"])


def network_of(source: Source, name: str, inputs: UNetInputs) -> Network:
    """The network of a component, by the function that its kind names."""
    kind = kind_of(name)
    return resolve_name(kind.network or f"{__name__}:{kind.names[0]}")(source, name, inputs)


def unet_inputs(source: Source, tokens: int, adapter: bool = False) -> UNetInputs:
    """Which inputs the UNet gets.

    Args:
        adapter: whether it gets those of a T2I-Adapter although the source has none.

    Raises:
        UserError: for a control network or an IP-Adapter that does not fit the UNet.
    """
    unet = unet_config(source)
    features = len(unet["block_out_channels"]) if adapter else 0
    if source.has("t2i_adapter"):
        scale = pipeline_constants(source)["vae_scale"]
        features = len(control_networks.match_adapter(source.config("t2i_adapter"), unet, scale))
    nets = [name for name in KINDS["controlnet"].names if source.has(name)]
    for name in nets:
        control_networks.match_controlnet({"addition_embed_type": None} | source.config(name), unet)
    image_tokens = 0
    if source.ip_adapter is not None:
        state, encoder = ip_adapter_files.read(source.ip_adapter), _config_of_image_encoder(source)
        kind = ip_adapter_files.match(state, source.ip_adapter.name, _shape_of_unet(source), encoder)
        image_tokens = image_encoders.tokens_of(encoder) if kind.hidden_states else 0
    return UNetInputs(tokens, features, bool(nets), 5 if source.refines else 6, image_tokens)


def text_encoder(source: Source, name: str, inputs: UNetInputs) -> Network:
    hidden_states = source.family == "sdxl"
    return networks.text_encoder(
        source.load(name), name, hidden_states=hidden_states, tokens=own_tokens(source), clip_skips=source.clip_skips
    )


def unet(source: Source, name: str, inputs: UNetInputs) -> Network:
    return networks.unet(source.load(name), **vars(inputs))


def image_encoder(source: Source, name: str, inputs: UNetInputs) -> Network:
    return Network(name, name, *image_encoders.parts(source.load(name), bool(inputs.image_tokens)))


def vae_decoder(source: Source, name: str, inputs: UNetInputs) -> Network:
    return networks.vae_decoder(source.load("vae"))


def vae_encoder(source: Source, name: str, inputs: UNetInputs) -> Network:
    return networks.vae_encoder(source.load("vae"))


def t2i_adapter(source: Source, name: str, inputs: UNetInputs) -> Network:
    shapes = control_networks.unet_adapter_shapes(unet_config(source))[: inputs.adapter]
    return Network(name, name, *control_networks.t2i_adapter(source.load(name), shapes))


def controlnet(source: Source, name: str, inputs: UNetInputs) -> Network:
    shared = networks.unet(_shape_of_unet(source), tokens=inputs.tokens, time_ids=inputs.time_ids).inputs
    return Network(name, "controlnet", *control_networks.controlnet(source.load(name), shared))


def _shape_of_unet(source: Source) -> Any:
    """The UNet without weights."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel.from_config(source.config("unet"))


def _config_of_image_encoder(source: Source) -> Any:
    path = source.folder("image_encoder") / "config.json"
    return image_encoders.shape_of(source.config("image_encoder"), path).config


def own_tokens(source: Source) -> int:
    """Length of one context of the text encoder, start and end included."""
    first = next(name for name in KINDS["text_encoder"].names if source.has(name))
    return source.config(first).get("max_position_embeddings", 77)


def unet_config(source: Source) -> dict[str, Any]:
    """The UNet's config, with diffusers' defaults for fields that are younger than some configs."""
    return {"mid_block_type": "UNetMidBlock2DCrossAttn", "addition_embed_type": None} | source.config("unet")
