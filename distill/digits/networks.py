"""The networks of the digits model, SD 1.5's in miniature."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from accel.models.topology import narrowed

from ..sources.digits import SIZE

LATENT_SIZE = SIZE // 4

# SD 1.5's graph, block for block. Four heads and not eight, because eight heads of the 16 channels of the first stage
# would be two wide, less than any fused attention kernel takes.
UNET: Mapping[str, Any] = MappingProxyType(
    narrowed(
        "sd15",
        channels=(16, 32, 64, 64),
        sample_size=LATENT_SIZE,
        cross_attention_dim=64,
        norm_num_groups=8,
        attention_head_dim=4,
    )
)
# One stage less than SD 1.5's VAE, so 4 pixels to a latent cell and not 8: the digits are small images.
VAE: Mapping[str, Any] = MappingProxyType(
    dict(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=SIZE,
        layers_per_block=1,
        norm_num_groups=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
)
TEXT: Mapping[str, Any] = MappingProxyType(
    dict(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=64,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    )
)
