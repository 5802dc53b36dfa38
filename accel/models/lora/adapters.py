"""The adapters that peft put into a diffusers pipeline's network, as tensors of the bundle that it runs on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ...bundle import Bundle
from .. import weight_files
from .for_bundle import Weights


def adapted(module: nn.Module, bundle: Bundle, component: str) -> dict[str, np.ndarray]:
    """What the active adapters of a module make of a component's tensors; {} where none is active.

    Whatever peft can merge is followed, in float32: LoRA, DoRA, LoHa, LoKr, several at once at any scale.

    Args:
        module: the network as diffusers has it, its base weights being those of the bundle.
    """
    if not getattr(module, "peft_config", None):
        return {}
    record = bundle.component(component)
    weights = Weights(weight_files.stored(bundle.file(record.weights)), record)
    made = {}
    for name, layer in _adapted_layers(module):
        merged = copy.deepcopy(layer).float()
        merged.merge(safe_merge=True)
        base = merged.get_base_layer()
        own = next(alias for alias in weight_files.aliases(name) if f"{alias}.weight" in weights.shapes)
        made[f"{own}.weight"] = _numpy(base.weight)
        if getattr(base, "bias", None) is not None:
            made[f"{own}.bias"] = _numpy(base.bias)
    return weights.as_stored(made)


def _adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and not layer.disable_adapters and not layer.merged:
            if set(layer.active_adapters) & _names(layer):
                yield name, layer


def _names(layer: Any) -> set[str]:
    """The adapters that a layer has."""
    return {name for kind in layer.adapter_layer_names for name in getattr(layer, kind, {})}


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
