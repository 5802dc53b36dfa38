"""A UNet with an IP-Adapter: built from a published file by diffusers' methods, and again from a bundle's config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models import embeddings
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import nn

from ...bundle.limits import LARGEST
from ...bundle.tensor_spec import TensorSpec
from ...errors import UserError
from .files import State
from .scaled import Keys, Projection, Values, linear

KEY = "ip_adapter"  # of a UNet's config.json in a bundle
WEIGHTS = ("encoder_hid_proj.", ".processor.to_k_ip.", ".processor.to_v_ip.")  # in the names of an adapter's weights
# Classes of diffusers that make tokens of an image's embedding: what their constructors take, read off a module.
PROJECTIONS: Mapping[str, Mapping[str, Callable[[Any], int]]] = {
    "ImageProjection": {
        "image_embed_dim": lambda it: it.image_embeds.in_features,
        "cross_attention_dim": lambda it: it.norm.normalized_shape[0],
        "num_image_text_embeds": lambda it: it.num_image_text_embeds,
    },
    "IPAdapterFullImageProjection": {
        "image_embed_dim": lambda it: it.ff.net[0].proj.in_features,
        "cross_attention_dim": lambda it: it.norm.normalized_shape[0],
    },
    "IPAdapterPlusImageProjection": {
        "embed_dims": lambda it: it.proj_in.in_features,
        "output_dims": lambda it: it.proj_out.out_features,
        "hidden_dims": lambda it: it.latents.shape[2],
        "depth": lambda it: len(it.layers),
        "heads": lambda it: it.layers[0].attn.heads,
        "num_queries": lambda it: it.latents.shape[1],
    },
}
_MOST_BLOCKS = 64


def add(unet: nn.Module, state: State, name: str) -> None:
    """Put an adapter into a UNet, as diffusers' `load_ip_adapter` does, with its scale as an input.

    Args:
        state: as `files.read` returns it, of an adapter that fits (`files.match`).
        name: of its file, for messages.

    Raises:
        UserError: for weights that are missing or of another shape.
    """
    try:
        with _quiet():
            unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    except (RuntimeError, KeyError, IndexError, ValueError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"{name} does not fit this UNet: {' '.join(lines[:2])[:300]}", "get the file again") from None
    projection = unet.encoder_hid_proj.image_projection_layers
    _place(unet, projection, {key: (it.to_k_ip[0], it.to_v_ip[0]) for key, it in processors(unet).items()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warning about a change of dtype that is none."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def has(unet: Any) -> bool:
    """Whether a UNet of ours has an adapter."""
    return isinstance(getattr(unet, "encoder_hid_proj", None), Projection)


def processors(unet: Any) -> dict[str, IPAdapterAttnProcessor2_0]:
    """The attention processors of an adapter by name; none for a UNet without one."""
    return {name: it for name, it in unet.attn_processors.items() if isinstance(it, IPAdapterAttnProcessor2_0)}


def described(unet: nn.Module) -> dict[str, Any]:
    """What the config of a bundle's UNet keeps of its adapter."""
    (projection,) = unet.encoder_hid_proj.image_projection_layers
    kind = type(projection).__name__
    return {"projection": kind} | {key: read(projection) for key, read in PROJECTIONS[kind].items()}


def rebuild(unet: nn.Module, record: Any) -> None:
    """Put the modules of an adapter into a UNet, without memory for weights: they are on the meta device.

    Args:
        record: as `described` returns it, from a file.

    Raises:
        ValueError: for a record that describes none.
    """
    kind = record.get("projection") if isinstance(record, dict) else None
    if kind not in PROJECTIONS:
        raise ValueError(f"{KEY} names no image projection (one of: {', '.join(PROJECTIONS)})")
    values = {key: value for key, value in record.items() if key != "projection"}
    if set(values) != set(PROJECTIONS[kind]):
        raise ValueError(f"{KEY} of a {kind} has exactly: {', '.join(PROJECTIONS[kind])}")
    for key, value in values.items():
        most = _MOST_BLOCKS if key == "depth" else LARGEST
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ValueError(f"{KEY}.{key} is {value!r:.40}, not 1 to {most}")
    with torch.device("meta"):
        projection = getattr(embeddings, kind)(**values)
        layers = {}
        for name in unet.attn_processors:
            if name.endswith("attn2.processor"):
                like = unet.get_submodule(name.removesuffix(".processor")).to_k
                layers[name] = tuple(nn.Linear(like.in_features, like.out_features, bias=False) for _ in "kv")
    _place(unet, [projection], layers)


def _place(unet: nn.Module, projection: Sequence[nn.Module], layers: Mapping[str, tuple[nn.Linear, nn.Linear]]) -> None:
    """Give a UNet the projection, and the cross-attentions of these names their keys and values."""
    unet.encoder_hid_proj = None  # the resampler of `plus` has attention processors too
    made = dict(unet.attn_processors)
    for name, (keys, values) in layers.items():
        with torch.device("meta"):
            made[name] = IPAdapterAttnProcessor2_0(keys.out_features, keys.in_features, num_tokens=[1], scale=1.0)
        made[name].to_k_ip = nn.ModuleList([linear(Keys, keys)])
        made[name].to_v_ip = nn.ModuleList([linear(Values, values)])
    unet.set_attn_processor(made)
    unet.encoder_hid_proj = Projection(projection)
    unet.config.encoder_hid_dim_type = "ip_image_proj"  # as diffusers does: an attribute, which is not saved


def specs(unet: Any, tokens: int | None, dtype: str = "float32") -> list[TensorSpec]:
    """The inputs of a UNet that are its adapter's; none for a UNet without one.

    Args:
        tokens: of the image encoder's hidden states, where the adapter takes those.
    """
    if not has(unet):
        return []
    kind = described(unet)
    width = kind["embed_dims"] if "embed_dims" in kind else kind["image_embed_dim"]
    shape = (width,) if kind["projection"] == "ImageProjection" else (tokens, width)
    return [
        TensorSpec("image_embeds", dtype, ("batch", "prompt_images", *shape)),
        TensorSpec("ip_adapter_scale", dtype, ("batch",)),
    ]
