"""Sensitivity of each layer and block: the error of the final image when it alone computes in int8.

It is the image's error after all steps, not the layer's own: a few-step student has no later steps to repair an early
error, and an error of a layer near the end may be invisible.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from accel.errors import UserError
from accel.errors import markdown as plain_words
from accel.files import write_bytes, write_json

from .image_parity import Evaluator

_BLOCK = re.compile(r"^((?:down|up)_blocks\.\d+|mid_block)\.?(resnets|attentions|downsamplers|upsamplers)?")


@dataclass(frozen=True)
class LayerCost:
    """What a layer or a block of layers costs: mean squared error and PSNR in dB of the images if it alone is int8."""

    name: str
    layers: tuple[str, ...]
    mse: float
    psnr: float


def measure(
    evaluator: Evaluator,
    network: str,
    groups: Mapping[str, Sequence[str]],
    progress: Callable[[float], None] = lambda done: None,
) -> list[LayerCost]:
    """The cost of each group of layers, the highest first. Draws all images once per group."""
    costs = []
    for done, (name, layers) in enumerate(groups.items()):
        psnr = evaluator.component(network, layers)["psnr"]
        costs.append(LayerCost(name, tuple(layers), 10 ** (-psnr / 10), psnr))
        progress((done + 1) / len(groups))
    return sorted(costs, key=lambda cost: -cost.mse)


def one_by_one(layers: Sequence[str]) -> dict[str, list[str]]:
    """Groups of one layer each."""
    return {layer: [layer] for layer in layers}


def by_block(layers: Sequence[str]) -> dict[str, list[str]]:
    """The layers of each block: down_blocks.0.resnets, down_blocks.0.attentions, mid_block.resnets, ..."""
    blocks: dict[str, list[str]] = {}
    for layer in layers:
        found = _BLOCK.match(layer)
        name = ".".join(part for part in found.groups() if part) if found else layer.partition(".")[0]
        blocks.setdefault(name, []).append(layer)
    return blocks


def layers_to_keep(evaluator: Evaluator, network: str, costs: Sequence[LayerCost]) -> list[str]:
    """The most sensitive layers, as few as possible, that must stay in higher precision for the budget to hold.

    Raises:
        UserError: when no single layer can be int8 within the budget.
    """

    def holds(count: int) -> bool:
        return evaluator.component(network, [cost.name for cost in costs[count:]])["ok"]

    if holds(0):
        return []
    # Apart from noise, images get better with every layer that is kept, so bisection finds the number.
    low, high = 0, len(costs)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    if high == len(costs):
        raise UserError(
            f"no layer can compute in int8 within {evaluator.budget:g} dB of float32 (the best one alone has "
            f"{costs[-1].psnr:.1f} dB)",
            "ask for a smaller --budget",
        )
    return [cost.name for cost in costs[:high]]


def write(
    folder: Path, costs: Sequence[LayerCost], blocks: Sequence[LayerCost], title: str, kept: Mapping[str, str]
) -> None:
    """Write `sensitivity.json` and `sensitivity.md` to a folder, the costs of all layers and of all blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "sensitivity.json",
        {
            "model": title,
            "kept": sorted(kept),
            "layers": [{"layer": cost.name, "psnr": cost.psnr, "mse": cost.mse} for cost in costs],
            "blocks": [
                {"block": cost.name, "layers": len(cost.layers), "psnr": cost.psnr, "mse": cost.mse} for cost in blocks
            ],
        },
    )
    write_bytes(folder / "sensitivity.md", markdown(costs, blocks, title, kept).encode())


def markdown(costs: Sequence[LayerCost], blocks: Sequence[LayerCost], title: str, kept: Mapping[str, str]) -> str:
    lines = [f"# What int8 costs {plain_words(title)}, each block and each layer alone", ""]
    lines += ["| block | layers | PSNR, dB | squared error |", "|---|---|---|---|"]
    lines += [f"| {cost.name} | {len(cost.layers)} | {cost.psnr:.1f} | {cost.mse:.2e} |" for cost in blocks]
    lines += ["", "| layer | PSNR, dB | squared error | |", "|---|---|---|---|"]
    lines += [
        f"| {cost.name} | {cost.psnr:.1f} | {cost.mse:.2e} | {'kept' if cost.name in kept else ''} |" for cost in costs
    ]
    return "\n".join(lines) + "\n"
