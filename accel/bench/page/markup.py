"""HTML as text: everything is escaped unless a function here made it."""

from __future__ import annotations

from html import escape
from typing import Any

_VOID = ("img", "input", "meta")


class Html(str):
    """Text that is HTML already."""


def tag(kind: str, *children: Any, **attributes: Any) -> Html:
    """An element. Attributes lose a trailing `_` and have `-` for `_`; None and False leave one out, True names it."""
    words = [kind]
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(key)
        elif value is not None and value is not False:
            words.append(f'{key}="{escape(str(value), quote=True)}"')
    inside = join(*children)
    return Html(f"<{' '.join(words)}>" if kind in _VOID else f"<{' '.join(words)}>{inside}</{kind}>")


def join(*children: Any) -> Html:
    """Elements and texts behind each other; lists are opened, None is left out."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else escape(str(child)))
    return Html("".join(parts))


def data(value: Any, text: str, **attributes: Any) -> Html:
    """A figure as it is shown, with the document's own value for programs and tests."""
    return tag("data", text, value=value, **attributes)


def section(name: str, title: str, *children: Any, lead: str = "") -> Html:
    """A part of the page with a heading, which is the label of its landmark."""
    heading = f"{name}-title"
    above = tag("p", lead, class_="lead") if lead else None
    return tag("section", tag("h2", title, id=heading), above, *children, id=name, aria_labelledby=heading)


def table(columns: list[str], rows: list[list[Any]], caption: str, *, cards: bool = False) -> Html:
    """A table in a box that scrolls by itself, which the keyboard reaches. The first cell of a row names it.

    Args:
        cards: whether a narrow window shows each row as a card, which needs no scrolling.
    """
    head = tag("tr", [tag("th", column, scope="col") for column in columns])
    body = []
    for first, *cells in rows:
        named = zip(columns[1:], cells, strict=False)  # a row of what was not measured has the reason alone
        body.append(
            tag("tr", tag("th", first, scope="row"), [tag("td", cell, data_column=name) for name, cell in named])
        )
    inside = tag(
        "table", tag("caption", caption), tag("thead", head), tag("tbody", body), class_="cards" if cards else None
    )
    return tag("div", inside, class_="scroll", tabindex="0", role="region", aria_label=caption)
