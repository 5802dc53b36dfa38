"""The document around the sections: head, style, script, and the data itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from .difference import gradient
from .markup import Html, join, tag


@cache
def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def whole(title: str, above: str, verdict: str, parts: Sequence[Html | None], embedded: Any, extra: Any = None) -> str:
    """The page as text.

    Args:
        title: of the window, and the small line over the verdict with `above`.
        verdict: the heading, one sentence.
        parts: sections; None is left out.
        embedded: JSON data that the page carries under the id `document`.
        extra: what stands between the verdict and the sections.
    """
    shown = [part for part in parts if part is not None]
    data = json.dumps(embedded).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    theme = tag("button", "Dark", type="button", id="theme", aria_pressed="false", hidden=True)
    save = tag("button", "Save the JSON", type="button", id="save", hidden=True)
    head = tag(
        "header",
        tag("div", tag("p", tag("b", title), f" {above}", class_="eyebrow"), theme, class_="top"),
        tag("h1", verdict),
        extra,
    )
    foot = tag("footer", tag("p", "This file holds all that it shows: no network is asked for anything."), save)
    body = join(head, tag("main", shown, id="main"), foot)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{tag('title', f'{title}: {verdict}')}<style>:root {{ --scale: {gradient()}; }}\n{_asset('page.css')}</style>"
        f'</head>\n<body>{body}\n<script type="application/json" id="document">{data}</script>\n'
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )
