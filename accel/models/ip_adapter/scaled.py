"""The scale of an image prompt as an input of the UNet, so that it is chosen at run time.

diffusers' attention adds scale * softmax(q k^T) v for the image's tokens, with a scale that is a number of Python. That
is softmax(q k^T) (scale * v), so it is enough that the values come out scaled. The scale travels with the tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from torch import nn


class ImagePrompt(NamedTuple):
    """What cross-attentions are given of the images.

    Attributes:
        tokens: [batch, images, tokens, width].
        scale: [batch], how strongly they count.
    """

    tokens: torch.Tensor
    scale: torch.Tensor


class Projection(MultiIPAdapterImageProjection):
    """(image embeddings [batch, images, ...], scale [batch]) -> [`ImagePrompt`], for the processors of one adapter."""

    def forward(self, image_embeds):
        embeds, scale = image_embeds
        (tokens,) = super().forward([embeds])
        return [ImagePrompt(tokens, scale)]


class Keys(nn.Linear):
    """The keys of an image prompt."""

    def forward(self, prompt: ImagePrompt) -> torch.Tensor:
        return super().forward(prompt.tokens)


class Values(nn.Linear):
    """The values of an image prompt, times its scale."""

    def forward(self, prompt: ImagePrompt) -> torch.Tensor:
        return super().forward(prompt.tokens) * prompt.scale.reshape(-1, 1, 1, 1)


def linear(cls: type[nn.Linear], like: nn.Linear) -> nn.Linear:
    """A layer of this class with the weights of another, without bias."""
    with torch.device("meta"):
        made = cls(like.in_features, like.out_features, bias=False)
    made.weight = like.weight
    return made
