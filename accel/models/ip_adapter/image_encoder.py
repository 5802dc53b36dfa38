"""The image encoder of an IP-Adapter (CLIP's vision tower) as a thin torch module with named tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...bundle.tensor_spec import TensorSpec
from ..config_files import built

FLOAT = "float32"


class ImageEncoder(nn.Module):
    """pixel_values [images, 3, S, S], normalised as CLIP's -> image_embeds, or the last but one hidden states."""

    def __init__(self, model: nn.Module, outputs: Sequence[TensorSpec]):
        super().__init__()
        self.model = model
        self.hidden_states = outputs[0].name != "image_embeds"

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor]:
        out = self.model(pixel_values, output_hidden_states=self.hidden_states)
        return (out.hidden_states[-2] if self.hidden_states else out.image_embeds,)


def shape_of(config: Mapping[str, Any], path: Path) -> nn.Module:
    """The image encoder without weights.

    Args:
        path: of the config, for messages.

    Raises:
        UserError: for a config that describes none.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"):
        return built(
            path,
            CLIPVisionModelWithProjection.__name__,
            lambda: CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(dict(config))),
        )


def tokens_of(config: Any) -> int:
    """Length of the hidden states: one for each patch, and the class token."""
    return (config.image_size // config.patch_size) ** 2 + 1


def parts(model: nn.Module, hidden_states: bool) -> tuple[nn.Module, tuple, tuple]:
    """Module, inputs and outputs.

    Args:
        hidden_states: whether the adapter takes the last but one hidden states [images, tokens, width] in place of
            `image_embeds` [images, width].
    """
    config = model.config
    side = config.image_size
    output = TensorSpec("image_embeds", FLOAT, ("images", config.projection_dim))
    if hidden_states:
        tokens = tokens_of(config)
        name = f"hidden_states.{config.num_hidden_layers - 1}"
        output = TensorSpec(name, FLOAT, ("images", tokens, config.hidden_size))
    inputs = (TensorSpec("pixel_values", FLOAT, ("images", config.num_channels, side, side)),)
    return ImageEncoder(model, (output,)), inputs, (output,)
