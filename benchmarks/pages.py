"""What benchmarks put into pages: text between markers, so that no figure there is written by hand; bars; images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def put(path: Path, name: str, text: str) -> None:
    """Replace what stands between `<!-- name -->` and `<!-- /name -->`, which must be there once."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def between(path: Path, name: str) -> str:
    """What stands between `<!-- name -->` and `<!-- /name -->`."""
    return path.read_text().split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


def bars(
    path: Path,
    rows: Sequence[tuple[str, float, str, str]],
    title: str,
    axis: str,
    *,
    ranges: Sequence[tuple[float, float]] = (),
    line: tuple[float, str] | None = None,
) -> None:
    """A horizontal bar for each row (label, value, text beside it, colour), the first one on top.

    Args:
        path: PNG file to write.
        axis: what the values are.
        ranges: least and largest value of each row, drawn as a line over its bar.
        line: a value to compare all with, and its label.
    """
    plt = pyplot()
    labels, values, texts, colours = zip(*rows, strict=True)
    spread: dict[str, Any] = {}
    if ranges:
        below = [value - least for value, (least, _) in zip(values, ranges, strict=True)]
        above = [most - value for value, (_, most) in zip(values, ranges, strict=True)]
        spread = dict(xerr=[below, above], ecolor="#4a5568", capsize=2)
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.6))
    axes.bar_label(axes.barh(labels, values, color=colours, **spread), [f"   {text}" for text in texts], fontsize=9)
    if line:
        axes.axvline(line[0], color="#c05621", linestyle="--", linewidth=1)
        axes.text(line[0], len(rows) - 0.35, f" {line[1]}", color="#c05621")
    figure.suptitle(title, fontsize=10)
    axes.set_xlabel(axis)
    axes.set_xlim(0, 1.25 * max([*values, *(most for _, most in ranges)]))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
