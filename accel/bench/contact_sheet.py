"""Images side by side: one row per engine, one column per image, with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

_MARGIN, _INK, _PAPER = 8, (30, 30, 30), (255, 255, 255)


def contact_sheet(rows: Mapping[str, np.ndarray], columns: Sequence[str] = (), *, cell: int = 96) -> Image.Image:
    """Draw a contact sheet.

    Args:
        rows: label -> uint8 images [N, H, W, 3]; all rows have N images.
        columns: N labels, or none.
        cell: pixels per image side; images are enlarged without smoothing, so that every pixel can be seen.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=15)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 2 * _MARGIN + max(int(probe.textlength(label, font=font)) for label in rows)
    top = _MARGIN + (22 if columns else 0)
    count = max(len(images) for images in rows.values())
    step = cell + 4
    sheet = Image.new("RGB", (left + count * step + _MARGIN, top + len(rows) * step + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(columns):
        draw.text((left + i * step + cell / 2, _MARGIN + 8), text, _INK, font=font, anchor="mm")
    for row, (name, images) in enumerate(rows.items()):
        y = top + row * step
        draw.text((_MARGIN, y + cell / 2), name, _INK, font=font, anchor="lm")
        for i, image in enumerate(images):
            enlarged = Image.fromarray(np.asarray(image, np.uint8)).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + i * step, y))
    return sheet
