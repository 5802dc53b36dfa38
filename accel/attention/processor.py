"""One attention processor for diffusers' models, on any kernel of the table."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import UserError
from .kernels import KERNELS, function_of

_PLAIN = (AttnProcessor, AttnProcessor2_0)


class AttentionOn:
    """diffusers' attention on one kernel: what `AttnProcessor2_0` computes, but for rounding.

    Args:
        name: a row of `KERNELS`.
    """

    def __init__(self, name: str):
        self.name, kernel = name, KERNELS[name]
        self.function = function_of(name) if kernel.function else None
        self.backend = getattr(SDPBackend, kernel.backend) if kernel.backend else None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = x.shape if x.ndim == 4 else None
        if image is not None:
            x = x.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attention_mask is not None:
            attention_mask = self._mask(attn, attention_mask, context)
        # [batch, tokens, heads, width]
        made = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        q, k, v = (part.unflatten(-1, (attn.heads, -1)) for part in made)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        mixed = self.mix(q, k, v, attention_mask).flatten(2)
        out = attn.to_out[1](attn.to_out[0](mixed))
        if image is not None:
            out = out.transpose(1, 2).reshape(image)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """softmax(q k^T / sqrt(width)) v of [batch, tokens, heads, width], in the same layout."""
        if self.function is not None:
            out = self.function(q, k, v)
            return out[0] if isinstance(out, tuple) else out  # some versions return the sums of the softmax as well
        with nullcontext() if self.backend is None else sdpa_kernel(self.backend):
            q, k, v = (value.transpose(1, 2) for value in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def _mask(self, attn: Any, mask: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        if self.function is not None:
            raise UserError(f"{self.name} takes no attention mask", "--attention sdpa")
        mask = attn.prepare_attention_mask(mask, context.shape[1], len(context))
        return mask.unflatten(0, (len(context), attn.heads))


def set_attention(model: Any, name: str) -> int:
    """Let the attention layers of a diffusers UNet or ControlNet run on a kernel that `check` allows.

    Layers with a processor of their own kind (IP-Adapter) keep it.

    Returns:
        How many layers run on it.

    Raises:
        UserError: where there is no layer that could.
    """
    kinds = (*_PLAIN, AttentionOn)
    layers = [layer for layer in model.modules() if isinstance(getattr(layer, "processor", None), kinds)]
    if not layers:
        raise UserError(f"--attention {name} has no effect on {type(model).__name__}", "leave it out")
    for layer in layers:
        layer.set_processor(AttnProcessor2_0() if name == "sdpa" else AttentionOn(name))
    return len(layers)
