"""The attention kernel of a UNet that trains: the one that was chosen, or an error that says why not."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any

import torch

from accel.errors import MissingPackage, UserError, unknown

from ..settings import ATTENTIONS
from .method import TrainedNetwork


def set_attention(unet: Any, name: str, *, device: torch.device, half: bool) -> None:
    """Choose the attention of a diffusers UNet: see `check_attention`."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    check_attention(name, device=device, half=half)
    if name in ("auto", "sdpa"):
        unet.set_attn_processor(AttnProcessor2_0())
    elif name == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    else:
        unet.set_attn_processor(FlashAttention())


def check_attention(name: str, *, device: torch.device, half: bool) -> None:
    """Check that an attention kernel can run here.

    Args:
        name: a member of ATTENTIONS. `auto` is torch's scaled_dot_product_attention, which takes the fastest kernel
            that fits; `flash-attn` and `xformers` are the packages of these names.
        device: where the UNet runs.
        half: whether attention runs in float16 or bfloat16.

    Raises:
        UserError: when an explicit choice cannot be honoured here.
    """
    if name not in ATTENTIONS:
        raise unknown("attention", name, ATTENTIONS)
    if name in ("auto", "sdpa"):
        return
    module = name.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        raise MissingPackage(name, f"--attention {name}", extra=name)
    if device.type != "cuda":
        raise UserError(f"--attention {name} needs a CUDA device, this run is on {device.type}", "--attention sdpa")
    if name == "flash-attn" and not half:
        raise UserError("--attention flash-attn computes in half precision only", "add --mixed-precision bf16")


def check_networks(name: str, networks: Collection[TrainedNetwork]) -> None:
    """Refuse a kernel that no network of a run can be given.

    Raises:
        UserError: for any choice but `auto`.
    """
    kinds = [type(network.core).__name__ for network in networks if not hasattr(network.core, "set_attn_processor")]
    if name != "auto" and len(kinds) == len(networks):
        raise UserError(f"--attention {name} has no effect on {' and '.join(kinds)}", "leave it out")


class FlashAttention:
    """diffusers attention processor on `flash_attn_func` (Dao 2023, arXiv 2307.08691); no masks, half precision."""

    def __call__(self, attn: Any, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, **_):
        from flash_attn import flash_attn_func

        if attention_mask is not None:
            raise UserError("flash-attn takes no attention mask", "--attention sdpa")
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(states: torch.Tensor) -> torch.Tensor:  # [b, tokens, heads, width]
            return states.unflatten(-1, (attn.heads, -1))

        mixed = flash_attn_func(
            heads(attn.to_q(hidden_states)),
            heads(attn.to_k(context)),
            heads(attn.to_v(context)),
            softmax_scale=attn.scale,
        )
        out = attn.to_out[1](attn.to_out[0](mixed.flatten(2)))
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor
