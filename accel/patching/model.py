"""Put kernels into a model, and take them out."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import UserError
from .layers import replacements

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
        self._before = {}

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        if not self._before:
            return "<Patched: undone>"
        return f"<Patched: {', '.join(f'{count} {name}' for name, count in self.layers.items())}>"


def patch(model: Any) -> Patched:
    """Put our kernels into a diffusers UNet, VAE or ControlNet, or into those of a pipeline, in place.

    Residual blocks (group norm + time embedding + SiLU), last norms and GEGLU gates become one operation each: Triton
    kernels on a GPU, torch elsewhere. It holds in eager mode, under `torch.compile` and in training; weights and their
    names stay. The kernels work in channels-last memory format: `model.to(memory_format=torch.channels_last)` first
    saves a copy for each. Exports are not affected: they read models from files.

    Args:
        model: a `torch.nn.Module`, or a diffusers pipeline.

    Returns:
        What was exchanged; its `undo()` takes it out again.

    Raises:
        UserError: where there is nothing that a kernel could take over, or a model has been patched already.
    """
    parts = [model] if isinstance(model, nn.Module) else [getattr(model, name, None) for name in _PARTS]
    found = {layer: kind for part in parts if isinstance(part, nn.Module) for layer, kind in replacements(part).items()}
    if not found:
        name = type(model).__name__
        raise UserError(
            f"{name} has no layer that a kernel could take over",
            "give a UNet, VAE or pipeline of diffusers that has not been patched yet",
        )
    before = {layer: type(layer) for layer in found}
    for layer, kind in found.items():
        layer.__class__ = kind
    return Patched(before)
