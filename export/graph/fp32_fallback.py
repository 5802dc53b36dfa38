"""fp32 fallback blocks: the parts of a VAE that stay in float32 when the rest of it computes in float16.

Some activations of SDXL's VAE exceed float16's largest number, 65,504, and the image would be black. A scan in float32
finds the modules whose inputs or outputs are too large; those, and the residual blocks around them, fall back to
float32. If the output of a block is itself too large, it stays float32 and the block that reads it falls back too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

# Containers only hand tensors from child to child, so the dtype may change between any two of their children.
_CONTAINERS = (
    "Sequential",
    "ModuleList",
    "Encoder",
    "Decoder",
    "DownEncoderBlock2D",
    "UpDecoderBlock2D",
    "UNetMidBlock2D",
    "EncoderTiny",
    "DecoderTiny",
)
MOST = 0.5  # share of the weights; above it the whole network stays in float32


class Peak(NamedTuple):
    """Largest magnitude among a module's inputs and outputs."""

    inputs: float = 0.0
    outputs: float = 0.0


class Fallback(NamedTuple):
    """Modules that compute in float32, and those of them whose output stays float32 too."""

    float32: tuple[str, ...]
    fp32_output: tuple[str, ...]


def find(model: nn.Module, peaks: Mapping[str, Peak], limit: float) -> Fallback | None:
    """The fp32 fallback blocks of a model.

    Args:
        model: a VAE encoder or decoder.
        peaks: by module name relative to the model; NaN counts as too large.
        limit: smallest magnitude that a float16 tensor must not reach.

    Returns:
        None if fallback blocks do not help: the model's own output is too large, no block is to blame, or the blocks
        would hold most of the weights.
    """
    if any("." not in name and not _fits(peak.outputs, limit) for name, peak in peaks.items()):
        return None
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    for name, peak in peaks.items():
        if name not in modules or _fits(peak.inputs, limit) and _fits(peak.outputs, limit):
            continue
        while type(modules[parent := name.rpartition(".")[0]]).__name__ not in _CONTAINERS and parent:
            name = parent
        if type(modules[name]).__name__ not in _CONTAINERS:
            chosen.add(name)
    outermost = sorted(name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen))
    fp32_output = tuple(name for name in outermost if not _fits(peaks.get(name, Peak()).outputs, limit))
    weights = sum(p.numel() for name in outermost for p in modules[name].parameters())
    if weights > MOST * sum(p.numel() for p in model.parameters()) or not outermost:
        return None
    return Fallback(tuple(outermost), fp32_output)


def _fits(peak: float, limit: float) -> bool:
    return peak < limit
