"""Quantisation-aware training: whatever method trains a UNet trains it with int8 rounding in its forward pass.

One recipe option, `qat`, makes the layers of the network that is kept fake-quantised (`accel.int8.fake_quant`); the
method, the loop, checkpoints, averages and LoRA know nothing of it: ranges that are learned are parameters like any
other. They start from images drawn by the network itself, with the steps and the guidance of its sample grids. In the
end the rounding is taken out again, the weights are saved as ever, and the ranges beside them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from accel.errors import UserError
from accel.int8 import fake_quant
from accel.int8.config import Int8Config
from accel.int8.observers import observe
from accel.int8.trained_scales import Trained

from ..settings import Recipe
from ..training.loop import compute_dtype
from ..training.method import Method, TrainedNetwork


def recipe_of(recipe: Recipe) -> Int8Config:
    return Int8Config(level=recipe.qat)


def network_of(method: Method) -> TrainedNetwork:
    """The network whose result is deployed: a diffusers UNet that is averaged and kept. (A critic is neither.)"""
    for network in method.networks.values():
        if network.averaged and hasattr(network.model, "down_blocks"):
            return network
    raise UserError(
        f"{type(method).__name__} trains no UNet of its own here (one under several adapters is shared)",
        "leave --qat out, or train all weights",
    )


def attach(method: Method, recipe: Recipe) -> list[str]:
    """Make the recipe's layers fake-quantised, in place; nothing without `recipe.qat`. Returns their names."""
    if not recipe.qat:
        return []
    _know_lora()
    return fake_quant.attach(network_of(method).model, recipe_of(recipe), learned=recipe.qat_ranges == "learned")


def calibrate(
    method: Method, recipe: Recipe, device: torch.device, say: Callable[[str], None] = lambda text: None
) -> None:
    """Give the layers their first ranges, from sample images. The same images, so the same ranges, on every start:
    a run that goes on replaces them by its checkpoint's."""
    if not recipe.qat:
        return
    model, dtype = network_of(method).model.to(device), compute_dtype(recipe)
    # The sampler of few steps draws from the global state, which belongs to the training.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            (dead,) = observe([model], recipe_of(recipe), method.samples)
    count = sum(1 for _ in fake_quant.fake_layers(model))
    say(
        f"int8: {count} layers round, their ranges are {recipe.qat_ranges}"
        + (f"; {len(dead)} see nothing but zeros and do not" if dead else "")
    )


def detach(method: Method, recipe: Recipe) -> Trained | None:
    """Take the rounding out again; returns what was learned."""
    if not recipe.qat:
        return None
    return Trained(recipe_of(recipe), fake_quant.detach(network_of(method).model))


# ---------------------------------------------------------------------------------------------------------------- LoRA


def _know_lora() -> None:
    """A LoRA layer rounds the weight that it will be fused into, not the two parts of it each for itself."""
    if importlib.util.find_spec("peft") is None:
        return
    from peft.tuners.lora import layer as lora

    if lora.Linear in fake_quant.FAKE:
        return

    class FakeQuantLoraLinear(_Fused, fake_quant.FakeQuantLinear, lora.Linear):
        pass

    class FakeQuantLoraConv2d(_Fused, fake_quant.FakeQuantConv2d, lora.Conv2d):
        def _conv_forward(self, *args: Any) -> torch.Tensor:
            return self.base_layer._conv_forward(*args)

    fake_quant.FAKE[lora.Linear], fake_quant.FAKE[lora.Conv2d] = FakeQuantLoraLinear, FakeQuantLoraConv2d


class _Fused:
    """W + alpha / r B A of the adapters that are active."""

    base_layer: nn.Module

    def effective_weight(self) -> torch.Tensor:
        weight = self.base_layer.weight
        for adapter in () if self.disable_adapters else self.active_adapters:
            if adapter in self.lora_A:
                weight = weight + self.get_delta_weight(adapter)
        return weight if self.smooth is None else weight * self.smooth
