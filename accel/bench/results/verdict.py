"""What a benchmark document says, in words: faster or not, and the same image or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import NONE, number, seconds

SAME, NEAR, DIFFERS, UNKNOWN = "same", "near", "differs", "unknown"
_ONE = 1.0  # of 255: two images that round to equal pixels lie this near
_DECIBEL = 1.0  # nearer to the noise floor than this is at the floor

Document = Mapping[str, Any]
Row = Mapping[str, Any]


def likeness(document: Document, row: Row) -> tuple[str, str]:
    """Whether a row's image is eager's: one of SAME, NEAR, DIFFERS, UNKNOWN, and the reason in words.

    SAME is no value further than 1/255 from eager's; NEAR is as near as its dtype alone comes in torch, by PSNR.
    """
    image = row["parity"]["image"]
    if image is None:
        return UNKNOWN, "not compared with eager"
    if not image["finite"]:
        return DIFFERS, "NaN or infinite values, no image"
    if image["psnr"] == "inf":
        return SAME, "identical to eager's"
    if image["max_abs"] <= _ONE:
        return SAME, f"no value further than {image['max_abs']:.2g} of 255 from eager's"
    words = f"{number(image['psnr'], '{:.1f}')} dB PSNR from eager's"
    floors = [floor for floor in document["noise_floor"] if floor["what"].startswith("eager:")]
    for floor in floors:
        limit = (floor["parity"]["image"] or {}).get("psnr")
        short = floor["what"].partition(":")[2]
        if isinstance(limit, float) and row["variant"].endswith(f":{short}") and image["psnr"] >= limit - _DECIBEL:
            return NEAR, f"{words}, what rounding to {short} does alone ({limit:.1f} dB)"
    return DIFFERS, words


def clock(row: Row, scope: str = "image") -> float | None:
    """Seconds of the median call; None where it was not measured."""
    timing = (row["scopes"].get(scope) or {}).get("timing")
    return timing["p50_s"] if timing else None


def per_call(document: Document) -> str:
    """What one timed call makes."""
    batch = document["work"]["batch"]
    return "an image" if batch == 1 else f"a call of {batch} images"


def fastest(document: Document) -> Row | None:
    """The fastest compiled row whose image is eager's; where there is none, the fastest compiled row."""
    rows = [row for row in document["rows"] if row["engine"] != "eager" and clock(row) is not None]
    same = [row for row in rows if likeness(document, row)[0] in (SAME, NEAR)]
    return min(same or rows, key=clock, default=None)


def sentence(document: Document) -> str:
    """The whole document in one sentence."""
    best = fastest(document)
    if best is None:
        reasons = {row["reason"] for row in document["rows"] if row["engine"] != "eager" and row["reason"]}
        why = f" ({'; '.join(sorted(reasons))})" if reasons else ""
        return f"No compiled engine was measured, so there is nothing to compare{why}."
    name, took = best["variant"], seconds(clock(best))
    speedups = best["scopes"]["image"]["speedup"]
    versus = speedups.get("eager")
    if versus is None:
        alone = f"{name} is the fastest, {took} {per_call(document)}"
        return f"{alone}; eager was not timed, so nothing says how much faster that is."
    kind, why = likeness(document, best)
    same = kind == SAME
    image = "" if same else f"; its image is {why}"
    eager = next((clock(row) for row in document["rows"] if row["variant"] == "eager"), None)
    instead = f"{took} instead of {seconds(eager)}" if eager else took
    instead += "" if document["work"]["batch"] == 1 else f" {per_call(document)}"
    ratio, low, high = versus["ratio"], versus["low"], versus["high"]
    if low is not None and low <= 1 <= high:
        draws = "draws the same image" if same else "draws"
        spread = f"{ratio:.2f} times, with a spread of {low:.2f} to {high:.2f}"
        return f"{name} {draws} about as fast as eager: {spread}{image}."
    if ratio < 1:
        return f"No engine is faster than eager here: {name}, the nearest, takes {instead}{image}."
    other = speedups.get("compile") if best["engine"] != "compile" else None
    compiled = f" and {other['ratio']:.2f} times as fast as torch.compile" if other else ""
    draws = "draws the same image" if same else "is"
    return f"{name} {draws} {ratio:.2f} times as fast as eager{compiled}: {instead}{image}."


def int8(document: Document) -> list[tuple[str, str, list[str]]]:
    """Component, verdict and what the export measured, of each part that is int8 or was tried in int8.

    The verdict is "accepted", "outside its budget" or "rejected". Documents of 0.1 say it in their notes alone.
    """
    found = {name: list(part.get("int8") or ()) for name, part in document["bundle"]["components"].items()}
    for note in document["notes"]:
        name, is_int8, rest = note.partition(" is int8, ")
        if is_int8 and not found.get(name):
            found[name] = (rest.partition("float32: ")[2] or rest).split("; ")
    return [(name, _int8_verdict(lines), lines) for name, lines in found.items() if lines]


def _int8_verdict(lines: list[str]) -> str:
    if lines[0].startswith("not "):
        return "rejected"
    return "outside its budget" if "NOT MET" in lines[0] else "accepted"


def seconds_per_part(document: Document, row: Row) -> dict[str, float]:
    """Seconds of one image by component, calls counted, and `rest`: sampler, noise and tokenizer. Empty if unknown."""
    whole, parts = clock(row), {}
    for name in document["bundle"]["components"]:
        took, scope = clock(row, name), document["work"]["scopes"].get(name)
        if took is None or not scope:
            continue
        parts[name] = took * scope["calls_per_image"]
    if whole is None or not parts:
        return {}
    return parts | {"rest": max(0.0, whole - sum(parts.values()))}


def missing(document: Document) -> list[tuple[str, str]]:
    """Variant and reason of what was not measured."""
    return [(row["variant"], row["reason"]) for row in document["rows"] if row["status"] == NONE]
