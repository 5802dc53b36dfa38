"""The attention kernel of a UNet that trains: the one that was chosen, or an error that says why not."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from accel import attention
from accel.errors import UserError

from .method import TrainedNetwork


def set_attention(unet: Any, name: str, *, device: torch.device, half: bool) -> None:
    """Choose the attention of a diffusers UNet: see `accel.attention.check`."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    from accel.attention.processor import AttentionOn

    kernel = attention.check(name, device=device, half=half)
    unet.set_attn_processor(AttnProcessor2_0() if kernel == "sdpa" else AttentionOn(kernel))


def check_networks(name: str, networks: Collection[TrainedNetwork]) -> None:
    """Refuse a kernel that no network of a run can be given.

    Raises:
        UserError: for any choice but `auto`.
    """
    kinds = [type(network.core).__name__ for network in networks if not hasattr(network.core, "set_attn_processor")]
    if name != "auto" and len(kinds) == len(networks):
        raise UserError(f"--attention {name} has no effect on {' and '.join(kinds)}", "leave it out")
