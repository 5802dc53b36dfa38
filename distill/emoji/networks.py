"""The networks of the emoji model: SD-Tiny's UNet in small, with SD 1.5's VAE and text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from accel.models.topology import narrowed

from ..sources.emoji import SIZE

# As SD 1.5, 8 pixels to a latent cell; with twice its channels, because small drawings are mostly outlines.
LATENT_SIZE, LATENT_CHANNELS = SIZE // 8, 8
# Merges of the tokenizer: of the 2,000 words of the captions the frequent ones are one token, the others a few.
MERGES = 2000

# SD-Tiny's graph, block for block: of SD 1.5's the half that a small training can afford. Width is spent where it is
# cheap: the lower stages have most of the weights, which remember what things look like, and few of the operations.
UNET: Mapping[str, Any] = MappingProxyType(
    narrowed(
        "sd15-tiny",
        channels=(64, 128, 192),
        sample_size=LATENT_SIZE,
        cross_attention_dim=128,
        norm_num_groups=16,
        attention_head_dim=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
    )
)
VAE: Mapping[str, Any] = MappingProxyType(
    dict(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        layers_per_block=1,
        norm_num_groups=16,
        block_out_channels=(32, 64, 128, 128),  # multiples of 32 fill the tiles of AMX
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
)
TEXT: Mapping[str, Any] = MappingProxyType(
    dict(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=128,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    )
)
