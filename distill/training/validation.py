"""The validation loss: what a method's loss is on images that training never shows, at the same noise every time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..data.encoders import encoded
from .method import Method


@torch.no_grad()
def losses(
    method: Method, batches: Iterable[tuple[Mapping[str, Any], int]], encoders: Any, accelerator: Any, step: int
) -> dict[str, float]:
    """The terms of a method's first phase, each a mean over all images held out, as `validation/NAME`.

    All processes call it, with as many batches each.

    Args:
        batches: (batch, images in it that count).
    """
    modules = [network.module for network in method.networks.values()]
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    sums: dict[str, torch.Tensor] = {}
    count = 0
    try:
        for batch, images in batches:
            total, terms = method.loss(method.phases[0], encoded(batch, encoders), step)
            for name, value in {"loss": total, **terms}.items():
                sums[name] = sums.get(name, 0) + value.detach().double() * images
            count += images
    finally:
        for module, was in zip(modules, training, strict=True):
            module.train(was)
    stacked = torch.stack([*sums.values(), torch.tensor(float(count), dtype=torch.float64, device=accelerator.device)])
    *whole, images = accelerator.reduce(stacked, reduction="sum").tolist()
    return {f"validation/{name}": value / images for name, value in zip(sums, whole, strict=True)}
