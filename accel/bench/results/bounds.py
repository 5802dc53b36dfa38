"""What bounds a network on a machine: the roofline of a saved result (Williams et al. 2009).

A call has to do its arithmetic and to move its weights, inputs and outputs at least once. Its arithmetic intensity is
FLOPs over those bytes; the machine's balance is its measured FLOP/s over its measured bytes/s. Below the balance the
memory bounds the network, above it the arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...dtypes import BYTES
from ..roofline import roofline_seconds
from .verdict import clock, int8

COMPUTE, MEMORY = "compute-bound", "memory-bound"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One call of one network.

    Attributes:
        name: of the component.
        calls: of it for an image.
        flop, bytes: of a call: its matrix arithmetic, and what it has to move at least.
        intensity, balance: FLOP per byte, of the network and of the machine.
        kind: `COMPUTE` or `MEMORY`.
        least_s: seconds at that bound.
        took_s: seconds that a call took; None where that was not measured.
    """

    name: str
    calls: int
    flop: float
    bytes: float
    intensity: float
    balance: float
    kind: str
    least_s: float
    took_s: float | None

    @property
    def share(self) -> float | None:
        """Of the bound that is reached: 1 is as fast as the machine can."""
        return self.least_s / self.took_s if self.took_s else None


def bounds(document: Mapping[str, Any], row: Mapping[str, Any]) -> list[Bound]:
    """The bounds of a variant's networks; empty where rates or work were not measured.

    A network that a compiled engine runs in int8 is bounded as if all of it were; it is left out where the machine's
    rate of int8 was not measured, and where it has another number format.
    """
    here = document["environment"]
    peaks = here.get("peak_flop_per_s") or {}
    bandwidth = here.get("bandwidth_bytes_per_s")
    elsewhere = row["scopes"]["image"].get("peak_fraction") is None  # on another device than the one with these rates
    if not bandwidth or elsewhere:
        return []
    accepted = [] if row["engine"] == "eager" else [entry for entry in int8(document) if entry[1] != "rejected"]
    quantized = {name: lines[0].partition(":")[0] for name, _, lines in accepted}
    found = []
    for name, part in document["bundle"]["components"].items():
        scope = document["work"]["scopes"].get(name) or {}
        peak = peaks.get(quantized.get(name, row["dtype"]))
        if not peak or not part["flop"] or "io_bytes" not in scope:
            continue
        weights = min(part["weights_bytes"] or float("inf"), part["parameters"] * BYTES[row["dtype"]])
        flop, moved = float(part["flop"]["total"]), float(weights + scope["io_bytes"])
        found.append(
            Bound(
                name=name,
                calls=scope["calls_per_image"],
                flop=flop,
                bytes=moved,
                intensity=flop / moved,
                balance=peak / bandwidth,
                kind=COMPUTE if flop / moved > peak / bandwidth else MEMORY,
                least_s=roofline_seconds(flop, moved, peak=peak, bandwidth=bandwidth),
                took_s=clock(row, name),
            )
        )
    return found


def limit(document: Mapping[str, Any], row: Mapping[str, Any]) -> float | None:
    """Least seconds of an image: what a faster kernel cannot beat.

    The sum of the networks' bounds; without the memory's rate, as in documents of 0.1, that of the arithmetic alone.
    None where neither is known.
    """
    parts = bounds(document, row)
    if len(parts) == len(document["bundle"]["components"]):
        return sum(part.calls * part.least_s for part in parts)
    share, took = row["scopes"]["image"].get("peak_fraction"), clock(row)
    return share * took if share and took else None
