"""Add LoRA files to the weights of a network: one function for torch modules, and for what lies in a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from .. import weight_files
from . import names, updates
from .files import LoraFile
from .reading import fits_fix, made_for, read, some

if TYPE_CHECKING:
    from torch import nn


def fused_weights(
    component: str,
    shapes: Mapping[str, tuple[int, ...]],
    value: Callable[[str], np.ndarray],
    files: Sequence[LoraFile],
    unet_config: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The weights of a network that LoRA files change, with the change, in float32.

    Equals diffusers' `load_lora_weights`, `set_adapters` with the scales, and `fuse_lora`.

    Args:
        component: unet, text_encoder or text_encoder_2.
        shapes: of all the network's weights by name (LAYER.weight, LAYER.bias).
        value: name -> the weight in float32.
        files: what to add, in this order; those without weights for this component change nothing.
        unet_config: of the model, to say what fits it.

    Raises:
        UserError: as `read`; or when a file names layers that the network does not have, or of other shapes.
    """
    table = names.places(name.removesuffix(".weight") for name in shapes if name.endswith(".weight"))
    made: dict[str, np.ndarray] = {}
    for file in files:
        parts = read(file)
        misfits, own, taken = [], parts.get(component, {}), {}
        for layer, update in own.items():
            module = names.place(layer, table)
            text = "no such layer" if module is None else _add(made, module, update, shapes, value, component, file)
            if module in taken:
                text = f"{taken[module]} is the same layer"
            if text:
                misfits.append(f"{component}.{layer} ({text})")
            elif module is not None:
                taken[module] = layer
        if misfits:
            raise UserError(
                f"{file.path} does not fit this model: {len(misfits)} of its {len(own)} modules of the {component} "
                f"have no place, first {some(misfits)}; {made_for(weight_files.shapes(file.path))}",
                fits_fix(unet_config),
            )
        file.check_blocks(component, taken)
    return made


def _add(
    made: dict[str, np.ndarray],
    module: str,
    update: updates.Update,
    shapes: Mapping[str, tuple[int, ...]],
    value: Callable[[str], np.ndarray],
    component: str,
    file: LoraFile,
) -> str:
    """Put the changed weight and bias of one layer into `made`; returns why it cannot be, or ""."""
    weight, bias = f"{module}.weight", f"{module}.bias"
    try:
        delta, change = update.delta(), update.bias()
    except ValueError:
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in update.tensors.items())
        return f"its tensors do not fit each other: {found}"
    if text := updates.misfit(update, delta, shapes[weight], shapes.get(bias)):
        return text
    scale = file.strength(component, module)
    if scale == 0:
        return ""
    if delta is not None:
        made[weight] = update.applied(made[weight] if weight in made else value(weight), delta, scale)
    if change is not None:
        made[bias] = (made[bias] if bias in made else value(bias)) + np.float32(scale) * change
    return ""


def fuse(
    model: nn.Module, component: str, files: Sequence[LoraFile], *, unet_config: Mapping[str, Any] | None = None
) -> nn.Module:
    """Add LoRA files to a component's weights, in place (`fused_weights`). Nothing is changed when one does not fit.

    Args:
        model: the UNet or a text encoder, float32.
        unet_config: needed for a text encoder; the UNet's own by default.
    """
    import torch

    state = model.state_dict()
    made = fused_weights(
        component,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: state[name].detach().float().cpu().numpy(),
        files,
        unet_config if unet_config is not None else dict(model.config),  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for name, tensor in made.items():
            state[name].copy_(torch.from_numpy(tensor))
    return model
