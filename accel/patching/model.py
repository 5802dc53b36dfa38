"""Put kernels into a model, and take them out."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import UserError, unknown
from .layers import ROUNDED, forget, linears, replacements, round_weight

_PARTS = ("unet", "vae", "controlnet")


class Patched:
    """Layers that were exchanged; `undo()`, or the end of a `with`, puts them back.

    Attributes:
        layers: how many of each kind, by the name of diffusers' class.
    """

    def __init__(self, before: dict[nn.Module, type[nn.Module]]):
        self._before = before
        names = [kind.__name__ for kind in before.values()]
        self.layers = {name: names.count(name) for name in sorted(set(names))}

    def undo(self) -> None:
        """Put diffusers' own layers back, bit for bit; a second time nothing happens."""
        for layer, kind in self._before.items():
            layer.__class__ = kind
            forget(layer)
        self._before = {}

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        if not self._before:
            return "<Patched: undone>"
        return f"<Patched: {', '.join(f'{count} {name}' for name, count in self.layers.items())}>"


def patch(model: Any, *, linear: str | None = None) -> Patched:
    """Put our kernels into a diffusers UNet, VAE or ControlNet, or into those of a pipeline, in place.

    Residual blocks (group norm + time embedding + SiLU), last norms and GEGLU gates become one operation each: Triton
    kernels on a GPU, torch elsewhere. It holds in eager mode, under `torch.compile` and in training; weights and their
    names stay. The kernels work in channels-last memory format: `model.to(memory_format=torch.channels_last)` first
    saves a copy for each. Exports are not affected: they read models from files.

    Args:
        model: a `torch.nn.Module`, or a diffusers pipeline.
        linear: "int8" or "fp8" also multiplies the linear layers of transformer blocks in eight bits, with a scale for
            each row of the input and of the weight (W8A8): for inference, images differ, and fp8 on a GPU needs
            compute capability 8.9. The rounded copies of the weights take half the memory of float16 on top. Cast the
            model before, not after.

    Returns:
        What was exchanged; its `undo()` takes it out again.

    Raises:
        UserError: where there is nothing that a kernel could take over, a model has been patched already, or `linear`
            cannot run where the model is.
    """
    parts = [model] if isinstance(model, nn.Module) else [getattr(model, name, None) for name in _PARTS]
    parts = [part for part in parts if isinstance(part, nn.Module)]
    found = {layer: kind for part in parts for layer, kind in replacements(part).items()}
    rounded = {layer: kind for part in parts for layer, kind in linears(part).items()} if linear else {}
    _check_linear(linear, rounded)
    found |= rounded
    if not found:
        name = type(model).__name__
        raise UserError(
            f"{name} has no layer that a kernel could take over",
            "give a UNet, VAE or pipeline of diffusers that has not been patched yet",
        )
    before = {layer: type(layer) for layer in found}
    for layer, kind in found.items():
        layer.__class__ = kind
    for layer in rounded:
        round_weight(layer, ROUNDED[str(linear)])
    return Patched(before)


def _check_linear(linear: str | None, layers: dict[nn.Module, type[nn.Module]]) -> None:
    """Refuse a precision of linear layers that there is none for, or that the GPU has no products in."""
    if linear is None:
        return
    if linear not in ROUNDED:
        raise unknown("linear", linear, ROUNDED)
    if not layers:
        raise UserError("this model has no linear layer to multiply in eight bits", "leave linear out")
    device = next(iter(layers)).weight.device
    if linear == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("this GPU has no fp8 products (compute capability 8.9 has)", 'linear="int8"')
