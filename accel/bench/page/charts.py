"""Charts as inline SVG. Lengths are percentages of the window's width and words are HTML, so a phone can read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Html, tag

_HEIGHT = 20


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One line of a chart, in the chart's own unit.

    Attributes:
        name: of the line.
        parts: class and length of what the bar consists of, from left to right.
        value: the figure beside the name.
        note: smaller, under the bar.
        whisker: where a thin line from the end of the bar leads to.
        limit: where a mark stands.
        kind: class of the line.
    """

    name: str
    parts: Sequence[tuple[str, float]]
    value: Html | str
    note: Html | str = ""
    whisker: float | None = None
    limit: float | None = None
    kind: str = ""


def bars(lines: Sequence[Bar], label: str) -> Html:
    """A bar chart from zero: names and figures as text, the longest bar or whisker over the whole width."""
    ends = [max(sum(length for _, length in bar.parts), bar.whisker or 0, bar.limit or 0) for bar in lines]
    longest = max([*ends, 1e-12])
    return tag("ol", [_line(bar, longest) for bar in lines], class_="bars", aria_label=label)


def _line(bar: Bar, longest: float) -> Html:
    share = lambda length: f"{100 * length / longest:.2f}%"  # noqa: E731
    drawn, start = [tag("rect", class_="track", width="100%", height=_HEIGHT, rx=3)], 0.0
    for kind, length in bar.parts:
        drawn.append(tag("rect", class_=f"fill {kind}", x=share(start), width=share(length), height=_HEIGHT, rx=3))
        start += length
    if bar.whisker is not None and bar.whisker > start:
        middle = _HEIGHT / 2
        drawn.append(tag("line", class_="whisker", x1=share(start), x2=share(bar.whisker), y1=middle, y2=middle))
    if bar.limit is not None:
        drawn.append(tag("line", class_="limit", x1=share(bar.limit), x2=share(bar.limit), y1=-3, y2=_HEIGHT + 3))
    return tag(
        "li",
        tag("span", bar.name, class_="name"),
        tag("span", bar.value, class_="value"),
        tag("svg", drawn, width="100%", height=_HEIGHT, aria_hidden="true", focusable="false"),
        tag("span", bar.note, class_="note") if bar.note else None,
        class_=bar.kind or None,
    )


def legend(entries: Sequence[tuple[str, str]]) -> Html:
    """What the colours mean: class and words."""
    return tag("ul", [tag("li", tag("i", class_=kind), words) for kind, words in entries], class_="legend")
