"""The prediction in words: a table, and what fits into a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...bundle import Bundle
from ...engines import facts
from ...errors import UserError
from ..variants import Variant, parse
from .estimate import Call, Need, need, sparing

CONTEXT = 500_000_000  # bytes that CUDA's own context is taken to need; it was never measured here
_USUAL = ("eager", "eager:fp16", "onnxruntime", "openvino", "tensorrt")


def usual(bundle: Bundle) -> list[Variant]:
    """The variants that are predicted by default: whether they can run here does not matter."""
    graphs = bool(bundle.component("unet").graph)
    return [variant for variant in map(parse, _USUAL) if graphs or not facts(variant.engine).reads_graph]


def predicted(bundle: Bundle, variants: Sequence[Variant], call: Call, device_memory: float | None) -> dict[str, Any]:
    """The prediction as a JSON document.

    Args:
        device_memory: GB of a card, to say what fits into it; None for no card.
    """
    needs = [need(bundle, variant, call) for variant in variants]
    found: dict[str, Any] = {"call": vars(call), "engines": [own.as_dict() for own in needs]}
    if device_memory is not None:
        if not device_memory > 0:
            raise UserError(f"invalid device memory: {device_memory:g} GB", "such as --device-memory 8")
        found["device_memory_gb"] = device_memory
        found["fits"] = {
            variant.name: _fits(list(sparing(bundle, variant, call)), device_memory) for variant in variants
        }
    return found


def _fits(tried: list[Need], device_memory: float) -> dict[str, Any]:
    tried = [replace(own, itself=0, copies=1) for own in tried]  # those are host memory
    able = [own for own in tried if own.peak + CONTEXT <= device_memory * 1e9]
    chosen = able[0] if able else min(tried, key=lambda own: own.peak)
    found = {"fits": bool(able), "options": list(chosen.options), "peak_bytes": chosen.peak}
    return found | {"plain_bytes": tried[0].peak}


def text(title: str, found: dict[str, Any]) -> str:
    """`predicted` for people."""
    rows = [("engine", "weights", "activations", "peak")]
    for own in found["engines"]:
        activations = max(part["activations_bytes"] for part in own["components"].values())
        rows.append((own["engine"], *map(_size, (own["weights_bytes"], activations, own["peak_bytes"]))))
    wide = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [title]
    lines += [
        "  ".join([row[0].ljust(wide[0]), *(c.rjust(w) for c, w in zip(row[1:], wide[1:], strict=True))])
        for row in rows
    ]
    lines.append("predicted; without libraries and CUDA's own context (docs/memory.md says how near it is)")
    for engine, own in found.get("fits", {}).items():
        lines.append(f"{engine}: {_sentence(own, found['device_memory_gb'])}")
    return "\n".join(lines)


def _sentence(own: dict[str, Any], device_memory: float) -> str:
    card, options = f"{device_memory:g} GB", " and ".join(own["options"])
    if own["fits"] and not options:
        return f"fits into {card}"
    if own["fits"]:
        return f"needs {_size(own['plain_bytes'])}; fits into {card} with {options} ({_size(own['peak_bytes'])})"
    return f"does not fit into {card}: the least is {_size(own['peak_bytes'])}" + (
        f" with {options}" if options else ""
    )


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
