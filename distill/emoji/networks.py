"""The networks of the emoji model, SD 1.5's in small."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from accel.models.topology import narrowed

from ..sources.emoji import SIZE

LATENT_SIZE = SIZE // 4
# Merges of the tokenizer: of the 2,000 words of the captions the frequent ones are one token, the others a few.
MERGES = 2000

# SD 1.5's graph, block for block. Width is spent where it is cheap: the lower half of the stages has most of the
# weights, which remember what things look like, and hardly any of the operations.
UNET: Mapping[str, Any] = MappingProxyType(
    narrowed(
        "sd15",
        channels=(48, 96, 128, 128),
        sample_size=LATENT_SIZE,
        cross_attention_dim=128,
        norm_num_groups=16,
        attention_head_dim=4,
    )
)
# One stage less than SD 1.5's VAE, so 4 pixels to a latent cell and not 8, as digits has it.
VAE: Mapping[str, Any] = MappingProxyType(
    dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=SIZE,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
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
