"""What makes a step fast on a device, decided where the recipe leaves it open, and put into the networks."""

from __future__ import annotations

import dataclasses
import os
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from accel.errors import UserError

from ..settings import Recipe

WORKERS = 4  # loading processes of a GPU, if there are processors for them

R = TypeVar("R", bound=Recipe)


def device_of_process() -> torch.device:
    """Where this process will train: what accelerate decides, without the process group that it makes on the way."""
    from accelerate.utils import parse_flag_from_env

    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def settled(recipe: R, device: torch.device, *, sharded: bool = False) -> R:
    """The recipe with every choice that it leaves open (`auto`, workers -1) made for a device. Decides nothing twice.

    On a GPU of compute capability 8.0 or more: bfloat16, TF32 for what stays in float32, and channels-last; on any GPU
    fused AdamW with foreach averages, and loading processes. On a CPU none of these, so that results stay the same bit
    for bit.

    Args:
        sharded: FSDP2 divides the networks; it takes contiguous weights alone, and no fused kernels.

    Raises:
        UserError: for a choice that the device does not have, or that would have no effect.
    """
    gpu = device.type == "cuda"
    new = gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    precision = recipe.mixed_precision
    if precision == "auto":
        precision = "bf16" if new else "no"
    half = precision != "no"
    open_ = {"tf32": new, "channels_last": new and half and not sharded, "fused": gpu and not sharded}
    chosen: dict[str, Any] = {"mixed_precision": precision}
    chosen |= {name: _switch(on) for name, on in open_.items() if getattr(recipe, name) == "auto"}
    if recipe.workers < 0:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        chosen["workers"] = max(1, min(WORKERS, (os.cpu_count() or 1) // processes - 1)) if gpu else 0
    made = dataclasses.replace(recipe, **chosen)
    if made.tf32 == "on" and not gpu:
        raise UserError(f"--tf32 on needs a CUDA device, this is {device.type}", "leave it out")
    if made.channels_last == "on" and sharded:
        raise UserError("FSDP2 does not take weights that are channels-last", "leave out --channels-last")
    if made.fused == "on" and sharded:
        raise UserError("fused kernels do not go with FSDP2 here", "leave out --fused")
    if made.half_norms and not half:
        raise UserError("--half-norms has no effect in float32", "--mixed-precision bf16, or leave it out")
    return made


def _switch(on: bool) -> str:
    return "on" if on else "off"


def described(recipe: Recipe, device: torch.device) -> str:
    """A line that says what was chosen."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    said = [{"no": "float32"}.get(recipe.mixed_precision, recipe.mixed_precision)]
    said += ["TF32"] * (recipe.tf32 == "on")
    said += ["channels-last"] * (recipe.channels_last == "on")
    said += ["half-precision norms"] * recipe.half_norms
    said += [f"fused {'AdamW, ' if recipe.optimizer == 'adamw' else ''}foreach averages"] * (recipe.fused == "on")
    said += [f"{recipe.workers} loading process{'es' * (recipe.workers > 1)}"] * bool(recipe.workers)
    return f"{name}: {', '.join(said)}"


def lay_out(network: nn.Module, recipe: Recipe) -> None:
    """Channels-last convolution weights, if the recipe says so; activations follow."""
    if recipe.channels_last == "on":
        network.to(memory_format=torch.channels_last)


def contiguous(network: nn.Module) -> None:
    """Undo `lay_out`: files hold contiguous weights."""
    network.to(memory_format=torch.contiguous_format)


# ---------------------------------------------------------------------------------------------------------------- norms


class HalfGroupNorm(nn.GroupNorm):
    """Group norm in the dtype of its input; its statistics are float32 in torch's kernels all the same."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, _as(self.weight, input), _as(self.bias, input), self.eps)


class HalfLayerNorm(nn.LayerNorm):
    """Layer norm in the dtype of its input, likewise."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, _as(self.weight, input), _as(self.bias, input), self.eps)


_HALF = {nn.GroupNorm: HalfGroupNorm, nn.LayerNorm: HalfLayerNorm}


def norms_in_half(network: nn.Module) -> None:
    """Let a network's norms read and write what autocast computes in: it would convert to float32 and keep both."""
    for layer in network.modules():
        if type(layer) in _HALF:
            layer.__class__ = _HALF[type(layer)]


def _as(weight: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    return None if weight is None else weight.to(like.dtype)
