"""Several results side by side: what changed between two versions, two settings or two machines, and what did not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..report import NONE, Table, seconds, size
from ..timing import apart
from .verdict import clock

SCHEMA = "accel-report/1"
Document = Mapping[str, Any]


def compare(documents: Sequence[Document], names: Sequence[str]) -> dict[str, Any]:
    """The comparison as data. The first document is the baseline of every ratio.

    Args:
        names: what each document is called, such as its file; made unique here.

    Returns:
        `runs`, `same_work` (whether times may be compared at all), `differences` of the settings and machines, and
        `variants`: for each name of a variant one entry per run, None where a run does not have it. `speedup` is the
        baseline's median over this run's, with a bootstrap 95 % interval over unpaired rounds.
    """
    runs = [_run(document, name) for document, name in zip(documents, _unique(names), strict=True)]
    variants = {row["variant"]: None for document in documents for row in document["rows"]}
    facts = [_facts(document) for document in documents]
    differences = {
        key: [fact.get(key) for fact in facts]
        for key in dict.fromkeys(key for fact in facts for key in fact)
        if any(fact.get(key) != facts[0].get(key) for fact in facts)
    }
    return {
        "schema": SCHEMA,
        "runs": runs,
        "same_work": not set(differences) & set(_WORK),
        "differences": differences,
        "variants": [{"variant": name, "runs": _entries(name, documents)} for name in variants],
    }


_WORK = ("topology", "height", "width", "batch", "steps", "sampler", "guidance")


def _unique(names: Sequence[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]


def _run(document: Document, name: str) -> dict[str, Any]:
    here = document["environment"].get("machine") or {}
    return {
        "name": name,
        "created": document["created"],
        "accel": document["accel"],
        "bundle": document["bundle"]["name"],
        "digest": document["bundle"]["digest"],
        "machine": f"{here['cpu']}, {here['threads']} threads" if here else NONE,
        "command": document["command"],
    }


def _facts(document: Document) -> dict[str, Any]:
    """What may differ between two runs, by name."""
    work, here = document["work"], document["environment"].get("machine") or {}
    facts = {"weights": document["bundle"]["digest"][:12], "precision": document["bundle"]["precision"]}
    facts |= {"topology": document["bundle"]["topology"]} | {key: work[key] for key in _WORK if key in work}
    facts |= {"prompts": " | ".join(work["prompts"]), "seeds": ", ".join(map(str, work["seeds"]))}
    facts |= {key: here.get(key) for key in ("cpu", "threads", "os", "python")}
    facts |= {"GPU": ", ".join(gpu["name"] for gpu in here.get("gpus") or ()) or "none"}
    facts |= {name: version for name, version in (here.get("packages") or {}).items() if version}
    return facts | {"accel": document["accel"]}


def _entries(name: str, documents: Sequence[Document]) -> list[dict[str, Any] | None]:
    entries: list[dict[str, Any] | None] = []
    first: list[float] | None = None
    for document in documents:
        row = next((row for row in document["rows"] if row["variant"] == name), None)
        if row is None:
            entries.append(None)
            continue
        timing = row["scopes"]["image"]["timing"]
        samples = timing["samples_s"] if timing else []
        if first is None:
            first = samples if not entries else []
        versus = apart(first, samples) if entries else None
        image = row["parity"]["image"] or {}
        entries.append(
            {
                "p50_s": clock(row),
                "speedup": None if versus is None else {"ratio": versus.ratio, "low": versus.low, "high": versus.high},
                "parts_s": {scope: clock(row, scope) for scope in row["scopes"] if scope != "image"},
                "psnr": image.get("psnr"),
                "peak_rss_bytes": row["process"]["peak_rss_bytes"],
                "reason": row["reason"],
            }
        )
    return entries


def outcome(speedup: Mapping[str, Any] | None) -> str:
    """faster, slower, the same within the spread, or not known."""
    if speedup is None or speedup["low"] is None:
        return "not known"
    return "faster" if speedup["low"] > 1 else "slower" if speedup["high"] < 1 else "no difference"


def sentence(found: Mapping[str, Any]) -> str:
    """The comparison in one sentence: the last run against the first."""
    runs = found["runs"]
    if len(runs) == 1:
        return f"{runs[0]['name']} is one run: there is nothing to compare it with."
    here, there = runs[-1]["name"], runs[0]["name"]
    if not found["same_work"]:
        keys = ", ".join(key for key in found["differences"] if key in _WORK)
        return f"{here} and {there} did different work ({keys} differ), so their times say nothing about each other."
    by_outcome: dict[str, list[str]] = {}
    for variant in found["variants"]:
        entry = variant["runs"][-1]
        if entry is None or entry["speedup"] is None:
            continue
        kind = outcome(entry["speedup"])
        amount = entry["speedup"]["ratio"] if kind != "slower" else 1 / entry["speedup"]["ratio"]
        shown = variant["variant"] if kind == "no difference" else f"{variant['variant']} ({amount:.2f} times)"
        by_outcome.setdefault(kind, []).append(shown)
    if not by_outcome:
        return f"{here} and {there} have no variant in common that both measured."
    words = {
        "faster": "faster: {}",
        "slower": "slower: {}",
        "no difference": "no different within the spread: {}",
        "not known": "measured in too few rounds to tell: {}",
    }
    said = [words[kind].format(", ".join(by_outcome[kind])) for kind in words if kind in by_outcome]
    return f"Against {there}, {here} is {'; '.join(said)}."


def table(found: Mapping[str, Any]) -> Table:
    """Time per image by variant and run, for a terminal."""
    runs = found["runs"]
    columns = ["variant", runs[0]["name"]]
    for run in runs[1:]:
        columns += [run["name"], "times as fast"]
    cells = []
    for variant in found["variants"]:
        line = [variant["variant"]]
        for i, entry in enumerate(variant["runs"]):
            line.append("-" if entry is None or entry["p50_s"] is None else seconds(entry["p50_s"]))
            if i:
                line.append(times(entry, found["same_work"]))
        cells.append(line)
    return "Seconds per image, p50", columns, cells


def changes(found: Mapping[str, Any]) -> Table:
    """What is not equal in settings and machines, for a terminal."""
    columns = ["what differs", *(run["name"] for run in found["runs"])]
    cells = [
        [key, *("-" if value is None else str(value) for value in values)]
        for key, values in found["differences"].items()
    ]
    return "", columns, cells or [["nothing", *("" for _ in found["runs"])]]


def times(entry: Mapping[str, Any] | None, same_work: bool) -> str:
    """`1.20x [1.15, 1.25]`; nothing where the ratio would mean nothing."""
    if entry is None or entry["speedup"] is None or not same_work:
        return "-"
    versus = entry["speedup"]
    spread = "" if versus["low"] is None else f" [{versus['low']:.2f}, {versus['high']:.2f}]"
    return f"{versus['ratio']:.2f}x{spread}"


def memory(entry: Mapping[str, Any] | None) -> str:
    """Peak memory, or a dash."""
    return size(entry["peak_rss_bytes"]) if entry and entry["peak_rss_bytes"] else "-"
