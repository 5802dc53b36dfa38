"""The page of several benchmark documents side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..report import NONE, number, seconds
from ..results import comparison
from .charts import Bar, bars
from .markup import Html, data, join, section, table, tag
from .shell import whole

Found = Mapping[str, Any]


def compared(found: Found) -> str:
    """The page as text.

    Args:
        found: what `comparison.compare` returns; the page carries it.
    """
    parts = [_speed(found), _parts(found), _sameness(found), _machines(found), _runs(found)]
    above = f"{len(found['runs'])} runs"
    return whole("accel report", above, comparison.sentence(found), parts, found)


def _speed(found: Found) -> Html:
    names, blocks = [run["name"] for run in found["runs"]], []
    for variant in found["variants"]:
        lines = []
        for i, (name, entry) in enumerate(zip(names, variant["runs"], strict=True)):
            if entry is None or entry["p50_s"] is None:
                why = entry["reason"] if entry else ""
                lines.append(Bar(name=name, parts=[], value=NONE, note=why))
                continue
            took = data(entry["p50_s"], seconds(entry["p50_s"]))
            versus = entry["speedup"] if found["same_work"] else None
            note = f"{comparison.times(entry, True)} · {comparison.outcome(versus)}" if versus else ""
            kind = "ours" if i else "theirs"
            lines.append(Bar(name=name, parts=[(kind, entry["p50_s"])], value=took, note=note))
        blocks.append(tag("div", tag("h3", variant["variant"]), bars(lines, variant["variant"]), class_="group"))
    lead = (
        f"Median seconds per image. Ratios are against {names[0]}, with a 95 % interval; “no difference” means that "
        "the interval holds 1."
    )
    return section("speed", "Speed", blocks, lead=lead)


def _parts(found: Found) -> Html:
    rows = []
    for variant in found["variants"]:
        for run, entry in zip(found["runs"], variant["runs"], strict=True):
            if entry and entry["p50_s"] is not None:
                took = [seconds(value) if value else "–" for value in entry["parts_s"].values()]
                rows.append([f"{variant['variant']}, {run['name']}", *took, comparison.memory(entry)])
    names = next((list(e["parts_s"]) for v in found["variants"] for e in v["runs"] if e), [])
    rows = [row for row in rows if len(row) == len(names) + 2]
    columns = ["variant, run", *(name.replace("_", " ") for name in names), "peak memory"]
    return section("parts", "Each part", table(columns, rows, "Median seconds of one call of each part"))


def _sameness(found: Found) -> Html:
    rows = []
    for variant in found["variants"]:
        cells = []
        for entry in variant["runs"]:
            psnr = entry and entry["psnr"]
            cells.append("–" if psnr is None else "identical" if psnr == "inf" else number(psnr, "{:.1f} dB"))
        rows.append([variant["variant"], *cells])
    columns = ["variant", *(run["name"] for run in found["runs"])]
    lead = "PSNR of each run’s image against the eager float32 image of the same run."
    return section("same", "The same image?", table(columns, rows, "PSNR against eager float32"), lead=lead)


def _machines(found: Found) -> Html:
    if not found["differences"]:
        return section("differences", "What differs", tag("p", "Nothing: the same work on the same machine."))
    columns = ["setting", *(run["name"] for run in found["runs"])]
    rows = [
        [key, *("–" if value is None else str(value) for value in values)]
        for key, values in found["differences"].items()
    ]
    return section("differences", "What differs", table(columns, rows, "Settings and versions that are not equal"))


def _runs(found: Found) -> Html:
    items = [
        tag(
            "li",
            tag("b", run["name"]),
            f": {run['bundle']}, accel {run['accel']}, {run['created']}, {run['machine']}. ",
            join(tag("code", run["command"])) if run["command"] else None,
        )
        for run in found["runs"]
    ]
    return section("runs", "The runs", tag("ul", items, class_="notes"))
