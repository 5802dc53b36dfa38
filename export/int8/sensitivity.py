"""What each layer and block costs: the error of the final image when it alone computes in int8.

The error that counts is the image's after all steps, not the layer's own: few-step students have no later steps to
repair an early error, and a layer near the end may be wrong without anybody seeing it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accel.errors import UserError
from accel.files import write_bytes, write_json

from .image_parity import Judge

_BLOCK = re.compile(r"^((?:down|up)_blocks\.\d+|mid_block)\.?(resnets|attentions|downsamplers|upsamplers)?")


@dataclass(frozen=True)
class Row:
    """Layers, by their own or their block's name; the mean squared error and the PSNR in dB of the images when they
    alone are in int8."""

    name: str
    layers: tuple[str, ...]
    mse: float
    psnr: float


def measure(
    judge: Judge,
    network: str,
    groups: Mapping[str, Sequence[str]],
    progress: Callable[[float], None] = lambda done: None,
) -> list[Row]:
    """One row per group of layers, the most sensitive first. Draws all images once per group."""
    rows = []
    for done, (name, layers) in enumerate(groups.items()):
        psnr = judge.component(network, layers)["psnr"]
        rows.append(Row(name, tuple(layers), 10 ** (-psnr / 10), psnr))
        progress((done + 1) / len(groups))
    return sorted(rows, key=lambda row: -row.mse)


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


def leave(judge: Judge, network: str, rows: Sequence[Row]) -> list[str]:
    """The fewest of the most sensitive layers that must stay in higher precision for the budget to hold.

    Raises:
        UserError: when a single layer in int8 is too much already.
    """

    def holds(count: int) -> bool:
        return judge.component(network, [row.name for row in rows[count:]])["ok"]

    if holds(0):
        return []
    # Images get better as layers leave, but for noise; so halve, then make sure of the place that was found.
    low, high = 0, len(rows)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    if high == len(rows):
        raise UserError(
            f"no layer can compute in int8 within {judge.budget:g} dB of float32 (the best one alone has "
            f"{rows[-1].psnr:.1f} dB)",
            "ask for a smaller --budget",
        )
    return [row.name for row in rows[:high]]


def write(folder: Path, rows: Sequence[Row], blocks: Sequence[Row], title: str, kept: Mapping[str, str]) -> None:
    """`sensitivity.json`, `sensitivity.md` and `sensitivity.png` in a folder, of all layers and of all blocks."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "sensitivity.json",
        {
            "model": title,
            "kept": sorted(kept),
            "layers": [{"layer": row.name, "psnr": row.psnr, "mse": row.mse} for row in rows],
            "blocks": [
                {"block": row.name, "layers": len(row.layers), "psnr": row.psnr, "mse": row.mse} for row in blocks
            ],
        },
    )
    write_bytes(folder / "sensitivity.md", markdown(rows, blocks, title, kept).encode())
    write_bytes(folder / "sensitivity.png", plot(rows, kept))


def markdown(rows: Sequence[Row], blocks: Sequence[Row], title: str, kept: Mapping[str, str]) -> str:
    lines = [f"# What int8 costs {title}, each block and each layer alone", ""]
    lines += ["| block | layers | PSNR, dB | squared error |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {len(row.layers)} | {row.psnr:.1f} | {row.mse:.2e} |" for row in blocks]
    lines += ["", "| layer | PSNR, dB | squared error | |", "|---|---|---|---|"]
    lines += [f"| {row.name} | {row.psnr:.1f} | {row.mse:.2e} | {'kept' if row.name in kept else ''} |" for row in rows]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], kept: Mapping[str, str], count: int = 40) -> bytes:
    """Bars of the most sensitive layers, on a logarithmic scale; those that are kept in another colour. A PNG."""
    import io

    from PIL import Image, ImageDraw

    shown = rows[:count]
    logs = np.log10([max(row.mse, 1e-10) for row in shown])
    low, high = np.floor(logs.min()), np.ceil(logs.max() + 1e-9)
    left, bar, width = 420, 18, 980
    image = Image.new("RGB", (width, bar * len(shown) + 60), "white")
    draw = ImageDraw.Draw(image)
    span = width - left - 30
    for power in range(int(low), int(high) + 1):
        x = left + span * (power - low) / max(high - low, 1)
        draw.line([(x, 20), (x, image.height - 35)], fill="#dddddd")
        draw.text((x - 12, image.height - 30), f"1e{power}", fill="#555555")
    for place, (row, value) in enumerate(zip(shown, logs, strict=True)):
        y = 22 + place * bar
        end = left + max(2, span * (value - low) / max(high - low, 1))
        draw.rectangle([left, y, end, y + bar - 5], fill="#d9822b" if row.name in kept else "#3a6ea5")
        draw.text((left - 8 - draw.textlength(row.name), y), row.name, fill="black")
    draw.text((left, 4), "squared error of the image, this layer alone in int8 (orange: kept in float)", fill="black")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()
