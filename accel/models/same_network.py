"""Whether a torch module is the network that a bundle's component was exported from, by config and weights."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..bundle import Bundle
from ..errors import UserError
from ..files import read_json

# What decides the shapes.
_KEYS = (
    "block_out_channels",
    "cross_attention_dim",
    "in_channels",
    "down_block_types",
    "hidden_size",
    "num_hidden_layers",
    "latent_channels",
    "layers_per_block",
    "mid_block_type",
    "adapter_type",
    "channels",
    "decoder_block_out_channels",
)


def check_same_network(module: nn.Module, bundle: Bundle, component: str) -> None:
    """Refuse a module of another config or with other weights, so that a mistake is an error and not a wrong image.

    Of every weight one row is compared, to the precision of the lower dtype: a fraction of a second, whatever the size.
    Weights that are stored in int8 are not compared; what is stored beside them is.

    Raises:
        UserError: naming what differs.
    """
    record = bundle.component(component)
    theirs = read_json(bundle.file(f"{record.folder}/config.json"), "the config")
    own = module.config if isinstance(module.config, dict) else module.config.to_dict()
    for key in _KEYS:
        a, b = own.get(key), theirs.get(key)
        if (list(a) if isinstance(a, tuple) else a) != (list(b) if isinstance(b, tuple) else b):
            raise UserError(
                f"{component}: the pipeline has {key} {a}, the bundle {b}: they are different models",
                "attach a bundle that was exported from this pipeline",
            )
    if getattr(module, "peft_config", None):
        raise UserError(
            f"{component}: the pipeline has LoRA layers, which the compiled network would leave out",
            "pipeline.unload_lora_weights(), or save it with fused weights and export that",
        )
    if name := _other_weight(module, bundle, component):
        raise UserError(
            f"{component}: the pipeline and {bundle.path} have different weights, {name} for one",
            "attach a bundle that was exported from this pipeline; accel.load(BUNDLE) draws with the bundle's weights",
        )


def _other_weight(module: nn.Module, bundle: Bundle, component: str) -> str:
    """The first weight that differs, or ""."""
    record = bundle.component(component)
    packed = tuple(f"{name}." for name in record.int8.get("layers", {}))
    own = module.state_dict()
    with safe_open(bundle.file(record.weights), "pt") as file:
        for name in file.keys():
            if name in own and not own[name].is_meta and not name.startswith(packed or ("\0",)):
                if not _same(_row(own[name]), _row(file.get_slice(name))):
                    return name
    return ""


def _row(weight: Any) -> torch.Tensor:
    """The first row of a tensor, or of a slice of a file."""
    shape = weight.get_shape() if hasattr(weight, "get_shape") else weight.shape
    return weight[:1] if len(shape) else weight[...]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    b = b.to(a.device)
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() and b.is_floating_point()):
        return torch.equal(a, b)
    rounding = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    return torch.allclose(a.float(), b.float(), rtol=2 * rounding, atol=1e-7)
