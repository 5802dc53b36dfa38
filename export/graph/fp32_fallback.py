"""Which parts of a VAE must stay in float32 when the rest of it computes in float16.

SDXL's VAE carries activations beyond float16's 65,504 in some blocks, which would come out as black images. A scan in
float32 says which modules take or give tensors that are too large; those, and the residual blocks around them, become
islands of float32. An island whose own output is too large hands it on in float32, and its reader is an island as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

# Containers that only pass tensors from child to child, so that a border between two children is a border of dtypes.
_PASSING = (
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
MOST = 0.5  # of the weights: beyond that the whole network may as well stay in float32


class Peak(NamedTuple):
    """Largest magnitude that a module took in and gave out."""

    taken: float = 0.0
    given: float = 0.0


class Islands(NamedTuple):
    """Modules that compute in float32, and those of them whose outputs stay float32 too."""

    float32: tuple[str, ...]
    wide: tuple[str, ...]


def find(model: nn.Module, peaks: Mapping[str, Peak], limit: float) -> Islands | None:
    """The islands of a model.

    Args:
        model: a VAE, or one half of it.
        peaks: by module name relative to the model; NaN counts as too large.
        limit: magnitude from which on a tensor must not be float16.

    Returns:
        None where islands do not help: the model's own input or output is too large, or most of it would be one.
    """
    if any("." not in name and not _quiet(peak.given, limit) for name, peak in peaks.items()):
        return None
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    for name, peak in peaks.items():
        if name not in modules or _quiet(peak.taken, limit) and _quiet(peak.given, limit):
            continue
        while type(modules[parent := name.rpartition(".")[0]]).__name__ not in _PASSING and parent:
            name = parent
        if type(modules[name]).__name__ not in _PASSING:
            chosen.add(name)
    outermost = sorted(name for name in chosen if not any(name.startswith(f"{other}.") for other in chosen))
    wide = tuple(name for name in outermost if not _quiet(peaks.get(name, Peak()).given, limit))
    weights = sum(p.numel() for name in outermost for p in modules[name].parameters())
    if weights > MOST * sum(p.numel() for p in model.parameters()) or not outermost:
        return None
    return Islands(tuple(outermost), wide)


def _quiet(peak: float, limit: float) -> bool:
    return peak < limit
