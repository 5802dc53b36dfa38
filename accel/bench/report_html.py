"""A benchmark document as one self-contained web page: tables, bars and the images themselves, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from types import MappingProxyType
from typing import Any

import numpy as np

from .report import NONE, headline, number, seconds, tables

_SIDE = 256  # pixels at which images are shown
_GAIN = 10

_CSS = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1f24; --soft: #59636e; --line: #d5dae0; --bar: #2f6fb7;
  --low: #b0652a; --head: #f3f5f7; }
@media (prefers-color-scheme: dark) { :root { --bg: #14171a; --ink: #e5e9ed; --soft: #99a3ad; --line: #333a41;
  --bar: #6ba6e4; --low: #e0a067; --head: #1d2226; } }
body { margin: 2rem auto; max-width: 76rem; padding: 0 1rem; background: var(--bg); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, li, figcaption { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } th { background: var(--head); } td.none { color: var(--soft); }
td.why { text-align: left; white-space: normal; color: var(--soft); }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; }
figure img { width: 256px; max-width: 45vw; image-rendering: pixelated; border: 1px solid var(--line); }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; } svg .bar { fill: var(--bar); }
svg .low { fill: var(--low); } svg .whisker { stroke: var(--soft); stroke-width: 1.5; }
"""


def page(document: Mapping[str, Any], images: Mapping[str, np.ndarray] = MappingProxyType({})) -> str:
    """The page as text.

    Args:
        document: of schema accel-bench/1.
        images: uint8 [N, H, W, 3] by variant, `eager` being the reference; the first of each batch is shown.
    """
    title = f"accel bench: {document['bundle']['name']}"
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in headline(document))]
    body.append("<h2>Time per image (p50, to p90), shorter is better</h2>")
    body.append(_bars(document["rows"], "image"))
    body.append("<h2>Time per UNet step (p50, to p90)</h2>")
    body.append(_bars(document["rows"], "unet"))
    body.append("<h2>The images, same prompt and noise</h2>")
    body.append(_images(document, images))
    for name, columns, rows in tables(document):
        body.append(f"<h2>{escape(name)}</h2>{_table(columns, rows)}")
    notes = "".join(f"<li>{escape(note)}</li>" for note in document["notes"])
    body.append(f"<h2>How to read this</h2><ul>{notes}</ul>")
    typed = f"{document['command']}; " if document["command"] else ""
    body.append(f"<p>{escape(typed)}accel {escape(document['accel'])}, {escape(document['created'])}</p>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    lines = "\n".join(body)
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{_CSS}</style></head>\n<body>{lines}</body></html>\n'


def _table(columns: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    lines = []
    for cells in rows:
        if cells[1].startswith(f"{NONE}: "):
            line = f'<td>{escape(cells[0])}</td><td class="why" colspan="{len(columns) - 1}">{escape(cells[1])}</td>'
        else:
            line = "".join(f'<td class="none">{NONE}</td>' if c == NONE else f"<td>{escape(c)}</td>" for c in cells)
        lines.append(f"<tr>{line}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _bars(rows: list[Mapping[str, Any]], scope: str) -> str:
    """One bar per variant from 0 to p50, with a line on to p90; other colour where the dtype is below float32."""
    clocks = [(row, row["scopes"][scope]["timing"]) for row in rows]
    longest = max((clock["p90_s"] for _, clock in clocks if clock), default=1.0)
    left, width, step = 190, 560, 26
    parts = []
    for i, (row, clock) in enumerate(clocks):
        y = i * step
        parts.append(f'<text x="{left - 10}" y="{y + 17}" text-anchor="end">{escape(row["variant"])}</text>')
        if clock is None:
            parts.append(f'<text x="{left}" y="{y + 17}">{NONE}</text>')
            continue
        p50, p90 = (left + width * clock[key] / longest for key in ("p50_s", "p90_s"))
        kind = "bar" if row["dtype"] == "float32" else "low"
        parts.append(f'<rect class="{kind}" x="{left}" y="{y + 4}" width="{p50 - left:.1f}" height="18" rx="2"/>')
        parts.append(f'<line class="whisker" x1="{p50:.1f}" x2="{p90:.1f}" y1="{y + 13}" y2="{y + 13}"/>')
        versus = row["scopes"][scope]["speedup"].get("eager")
        label = seconds(clock["p50_s"]) + (f", {versus['ratio']:.2f}x eager" if versus else "")
        parts.append(f'<text x="{p90 + 8:.1f}" y="{y + 17}">{escape(label)}</text>')
    height = step * len(rows) + 4
    return f'<div class="scroll"><svg width="960" height="{height}" role="img">{"".join(parts)}</svg></div>'


def _images(document: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> str:
    if not images:
        return "<p>A saved result holds only the digests of the images; give --html while measuring to see them.</p>"
    reference = images.get("eager")
    psnr = {row["variant"]: (row["parity"]["image"] or {}).get("psnr") for row in document["rows"]}
    figures = []
    for name, batch in images.items():
        pair = _figure(batch[0], f"{name}, {_quality(psnr.get(name))}" if name != "eager" else "eager")
        if reference is not None and name != "eager":
            difference = np.abs(batch[0].astype(int) - reference[0]) * _GAIN
            pair += _figure(np.clip(difference, 0, 255).astype(np.uint8), f"difference to eager, x{_GAIN}")
        figures.append(f'<div class="images">{pair}</div>')
    prompt = escape(document["work"]["prompts"][0])
    return f'<p>{prompt}</p><div class="images">{"".join(figures)}</div>'


def _quality(psnr: Any) -> str:
    return "identical" if psnr == "inf" else f"PSNR {number(psnr, '{:.1f} dB')}"


def _figure(pixels: np.ndarray, caption: str) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    text = escape(caption, quote=True)
    source = f"data:image/png;base64,{data}"
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'
