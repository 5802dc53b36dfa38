"""The images of each prompt: before and after under a slider, the difference in colours, the figures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from ...parity import compare
from ..report import number
from .difference import Difference, coloured, difference, in_words
from .markup import Html, data, join, tag

REFERENCE = "eager"
_SIDE = 512  # pixels; larger images are shown smaller
_SMALL = 200  # pixels; below it every one of them is shown


def pictures(document: Mapping[str, Any], images: Mapping[str, np.ndarray]) -> Html:
    """One block per prompt.

    Args:
        images: uint8 [N, H, W, 3] by variant; all are compared with `eager`, which may be missing.
    """
    others = [name for name in images if name != REFERENCE]
    count = max((len(batch) for batch in images.values()), default=0)
    prompts, seeds = document["work"]["prompts"], document["work"]["seeds"]
    blocks = []
    for i in range(count):
        words = f"“{prompts[i % len(prompts)]}”, seed {seeds[i % len(seeds)]}"
        one = {name: batch[i] for name, batch in images.items() if i < len(batch)}
        if REFERENCE in one and others:
            blocks.append(_compared(i, words, one, [name for name in others if name in one]))
        else:
            blocks.append(tag("div", tag("h3", words), [_plain(name, image, words) for name, image in one.items()]))
    return join(blocks)


def _compared(i: int, words: str, images: Mapping[str, np.ndarray], others: list[str]) -> Html:
    """Eager's image under each other variant's; one of them is shown, which the buttons above choose."""
    reference = images[REFERENCE]
    found = {name: difference(images[name], reference) for name in others}
    # What differs most is what a reader wants to see first.
    first = max(others, key=lambda name: found[name].most)
    choice = [
        tag(
            "label", tag("input", type="radio", name=f"shown-{i}", value=name, checked=name == first), tag("span", name)
        )
        for name in others
    ]
    small = max(reference.shape[:2]) < _SMALL
    over = [_image(images[name], f"{words}, drawn by {name}", "over", name, name != first) for name in others]
    slider = tag(
        "div",
        tag("span", REFERENCE, class_="tag left"),
        tag("span", first, class_="tag right", data_name=True),
        _image(reference, f"{words}, drawn by eager", "under"),
        over,
        tag("input", type="range", min=0, max=100, value=50, aria_label=f"{words}: eager on the left of the line"),
        tag("span", class_="handle", aria_hidden="true"),
        class_="slider",
    )
    details = [_details(name, found[name], images[name], reference, words, name != first) for name in others]
    return tag(
        "div",
        tag("h3", words),
        tag("fieldset", tag("legend", "Compare eager with"), choice, class_="choice"),
        tag("div", slider, tag("div", details, class_="details"), class_="pair"),
        class_="prompt pixels" if small else "prompt",
    )


def _details(name: str, found: Difference, image: np.ndarray, reference: np.ndarray, words: str, hidden: bool) -> Html:
    text = in_words(found)
    if found.most:
        map_ = _image(coloured(found), f"Where {name} and eager differ for {words}: {text}", "map")
        scale = tag(
            "div",
            tag("span", "0"),
            tag("i", class_="scale", aria_hidden="true"),
            tag("span", f"{found.top} of 255"),
            class_="range",
        )
        shown = tag(
            "figure", map_, tag("figcaption", f"Difference, ×{found.factor}, largest of the three channels", scale)
        )
    else:
        shown = tag("p", "✓ Identical", class_="identical")
    figures = compare(image.astype(float), reference.astype(float), 255)
    psnr = "infinite" if found.most == 0 else number(figures.psnr, "{:.1f} dB")
    facts = tag(
        "dl",
        tag("div", tag("dt", "PSNR"), tag("dd", psnr)),
        tag("div", tag("dt", "SSIM"), tag("dd", number(figures.ssim, "{:.4f}"))),
        tag("div", tag("dt", "Largest"), tag("dd", data(found.most, f"{found.most} of 255"))),
        class_="facts",
    )
    sentence = tag("p", f"{text[0].upper()}{text[1:]}.")
    return tag("div", shown, tag("div", sentence, facts), data_variant=name, hidden=hidden)


def _plain(name: str, image: np.ndarray, words: str) -> Html:
    return tag("figure", _image(image, f"{words}, drawn by {name}", "alone"), tag("figcaption", name))


def _image(pixels: np.ndarray, alt: str, kind: str, variant: str | None = None, hidden: bool = False) -> Html:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(pixels))
    height, width = pixels.shape[:2]
    if times := -(-max(height, width) // _SIDE) - 1:
        picture = picture.reduce(times + 1)
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return tag("img", src=source, alt=alt, class_=kind, width=width, height=height, data_variant=variant, hidden=hidden)
