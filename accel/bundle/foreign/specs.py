"""Inputs and outputs of somebody's network, with our names for their dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..shape_profiles import Range, fixed

_TOKENS = 77
# What our pipeline passes to, and takes from, a network of this name.
_KNOWN = {
    "text_encoder": {"input_ids"},
    "unet": {"sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids", "timestep_cond"},
    "vae_decoder": {"latent_sample"},
}
_SIDES = {"unet": ("latent_height", "latent_width"), "vae_decoder": ("latent_height", "latent_width")}


@dataclass(frozen=True)
class Tensor:
    """Name, dtype and shape of an input or output, None for a free dimension."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Network:
    """What `taken` needs of a network that was put into the new folder.

    Attributes:
        graph, weights: file names in its folder.
        inputs, outputs: in graph order.
        parameters: how many.
        opset: of ONNX; 0 for IR.
    """

    graph: str
    weights: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    parameters: int
    opset: int = 0


def strange(component: str, network: Network) -> list[str]:
    """Inputs that our pipeline knows nothing of, and those that it has to have and that are missing."""
    known = _KNOWN[component.removesuffix("_2")]
    names = [tensor.name for tensor in network.inputs]
    first = "latent_sample" if component == "vae_decoder" else "input_ids" if "text" in component else "sample"
    return [name for name in names if name not in known] + [f"no {first}"] * (first not in names)


def described(component: str, network: Network, dims: Mapping[str, Range]) -> dict[str, Any]:
    """Inputs, outputs and dims of a component, as a manifest has them."""
    used: dict[str, Range] = {}

    def spec(tensor: Tensor, output: bool) -> dict[str, Any]:
        shape: list[int | str] = []
        for axis, size in enumerate(tensor.shape):
            name = _dimension(component, tensor, axis, output)
            if name is None:
                shape.append(_TOKENS if size is None else size)
            else:
                used.setdefault(name, dims[name] if size is None else fixed(size))
                shape.append(name)
        return {"name": tensor.name, "dtype": tensor.dtype, "shape": shape}

    inputs = [spec(tensor, False) for tensor in network.inputs]
    outputs = [spec(tensor, True) for tensor in network.outputs]
    return {"inputs": inputs, "outputs": outputs, "dims": {name: vars(limits) for name, limits in used.items()}}


def _dimension(component: str, tensor: Tensor, axis: int, output: bool) -> str | None:
    """Our name of an axis; None for one that is a number."""
    if axis == 0:
        return "batch" if component == "unet" else "images"
    if len(tensor.shape) == 4 and axis in (2, 3):
        sides = ("height", "width") if component == "vae_decoder" and output else _SIDES[component]
        return sides[axis - 2]
    return None
