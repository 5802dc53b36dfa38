"""Self-attention with its two products in int8: scores = q k^T, and mix = softmax(scores) v.

The products have no weights: both sides are activations, each with a range of its own. For large images they take most
of the time that is left in float once every layer is int8: 40 % of SD-Tiny's UNet at 512 px. Cross-attention stays in
float: its 77 keys cost next to nothing, and the begin-of-text token's key is an outlier (MixDQ, arXiv 2405.17873).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from .config import PRODUCTS


def products_of(model: nn.Module) -> Iterator[str]:
    """Names of the products that can be int8: <self-attention>.scores and .mix, in the order of the network."""
    known = sys.modules.get("diffusers.models.attention_processor")
    if known is None:  # then nothing of diffusers is in the model
        return
    for name, module in model.named_modules():
        if type(module) is known.Attention and _is_plain(module):
            yield from (f"{name}.{product}" for product in PRODUCTS)


def put(model: nn.Module, name: str, product: nn.Module) -> None:
    """Make an attention compute a product by `product` (left [..., n, k], right [..., k, m]) while that is `active`."""
    path, _, leaf = name.rpartition(".")
    attention = model.get_submodule(path)
    attention.add_module(leaf, product)
    attention.__class__ = _with_products()


def take(model: nn.Module, name: str) -> None:
    """Undo `put`."""
    path, _, leaf = name.rpartition(".")
    attention = model.get_submodule(path)
    delattr(attention, leaf)
    if not any(hasattr(attention, other) for other in PRODUCTS):
        attention.__class__ = _with_products().__base__


def _is_plain(attention: Any) -> bool:
    """Self-attention of a transformer block: nothing between the layers and the two products."""
    norms = (attention.group_norm, attention.spatial_norm, attention.norm_q, attention.norm_k)
    return (
        not attention.is_cross_attention
        and not attention.residual_connection
        and attention.scale_qk
        and attention.inner_kv_dim == attention.inner_dim
        and attention.rescale_output_factor == 1
        and all(norm is None for norm in norms)
    )


@cache
def _with_products() -> type[nn.Module]:
    from diffusers.models.attention_processor import Attention

    class Int8SelfAttention(Attention):
        """While no product is active it computes as before, with whatever processor it has."""

        def forward(self, hidden_states: torch.Tensor, encoder_hidden_states=None, attention_mask=None, **others):
            own = [getattr(self, name, None) for name in PRODUCTS]
            if not any(product is not None and product.active for product in own):
                return super().forward(hidden_states, encoder_hidden_states, attention_mask, **others)
            if encoder_hidden_states is not None or attention_mask is not None:
                raise UserError(
                    "self-attention in int8 does not support a mask or a context",
                    "use level all instead of scores or attention",
                )
            scores, mix = (product or torch.matmul for product in own)
            query, key, value = (
                layer(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for layer in (self.to_q, self.to_k, self.to_v)
            )
            weights = scores(query * self.scale, key.transpose(-1, -2)).softmax(-1)
            return self.to_out[1](self.to_out[0](mix(weights, value).transpose(1, 2).flatten(2)))

    return Int8SelfAttention
