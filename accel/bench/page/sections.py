"""The parts of a page about one document, each a pure function from the document to HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..report import NONE, number, seconds, size, tables
from ..results.bounds import bounds, limit
from ..results.verdict import DIFFERS, NEAR, SAME, clock, fastest, int8, likeness, missing, per_call, seconds_per_part
from .charts import Bar, bars, legend
from .markup import Html, data, join, section, table, tag
from .pictures import pictures

Document = Mapping[str, Any]
MARKS = {SAME: "✓ same image", NEAR: "≈ at the noise floor", DIFFERS: "≠ differs"}
PARTS = {"text_encoder": "text", "text_encoder_2": "text", "unet": "unet", "vae_decoder": "decoder", "rest": "rest"}
_WORDS = {"text": "text encoder", "unet": "UNet, all steps", "decoder": "VAE decoder", "rest": "the rest", "other": ""}


def timed(document: Document) -> list[Mapping[str, Any]]:
    """The rows with a time, fastest first."""
    return sorted((row for row in document["rows"] if clock(row) is not None), key=clock)


def heroes(document: Document) -> Html | None:
    """The four figures of the verdict, large."""
    best = fastest(document)
    if best is None:
        return None
    speedup, image = best["scopes"]["image"]["speedup"], best["parity"]["image"] or {}
    tiles = [_tile(per_call(document), data(clock(best), seconds(clock(best))), best["variant"])]
    for name, words in (("eager", "as fast as eager"), ("compile", "as fast as torch.compile")):
        versus = speedup.get(name)
        if versus and best["engine"] != name:
            spread = "" if versus["low"] is None else f"95 %: {versus['low']:.2f} to {versus['high']:.2f}"
            tiles.append(_tile(words, data(versus["ratio"], f"{versus['ratio']:.2f}×"), spread))
    psnr = image.get("psnr")
    if psnr is not None:
        text = "identical" if psnr == "inf" else f"{psnr:.0f} dB"
        tiles.append(_tile("image against eager’s", data(psnr, text), f"SSIM {number(image['ssim'], '{:.4f}')}"))
    if peak := best["process"]["peak_rss_bytes"]:
        tiles.append(_tile("memory at its peak", data(peak, size(peak)), "alone in a process"))
    return tag("ul", tiles, class_="heroes")


def _tile(label: str, figure: Html, below: str) -> Html:
    return tag("li", tag("strong", figure), tag("span", label), tag("small", below))


def speed(document: Document) -> Html:
    rows, lines = timed(document), []
    limits = [limit(document, row) for row in rows]
    for row, least in zip(rows, limits, strict=True):
        timing = row["scopes"]["image"]["timing"]
        versus = row["scopes"]["image"]["speedup"].get("eager")
        kind, why = likeness(document, row)
        ratio = f" · {versus['ratio']:.2f}× eager" if versus and row["variant"] != "eager" else ""
        mark = "reference" if row["variant"] == "eager" else MARKS.get(kind, "")
        notes = [words for words in (mark, "" if kind == SAME or row["variant"] == "eager" else why) if words]
        if share := row["scopes"]["image"]["peak_fraction"]:
            notes.append(f"{100 * share:.2g} % of the peak rate")
        lines.append(
            Bar(
                name=row["variant"],
                parts=[("ours" if row["engine"] != "eager" else "theirs", timing["p50_s"])],
                value=join(data(timing["p50_s"], seconds(timing["p50_s"])), ratio),
                note=" · ".join(notes),
                whisker=timing["p90_s"],
                limit=least,
                kind=kind,
            )
        )
    keys = [("fill ours", "compiled"), ("fill theirs", "eager"), ("key-whisker", "from the median to p90")]
    if any(limits):
        keys.append(("key-limit", "roofline: what the rates measured here allow at best"))
    absent = [
        tag("p", tag("strong", name), f" was not measured: {why}", class_="why") for name, why in missing(document)
    ]
    lead = (
        f"From prompt to pixels, {per_call(document)}: the median of rounds in which all take turns. Shorter is better."
    )
    return section("speed", "Speed", bars(lines, "Time per image"), legend(keys), absent, lead=lead)


def roofline(document: Document) -> Html | None:
    """What bounds each network of the fastest variant that it can be said of."""
    best = next((found for row in timed(document) if (found := (row, bounds(document, row)))[1]), None)
    if best is None:
        return None
    row, parts = best
    rates = document["environment"]
    bandwidth = rates["bandwidth_bytes_per_s"]
    used = {name: rate for name, rate in rates["peak_flop_per_s"].items() if name in (row["dtype"], "int8")}
    products = " and ".join(f"{number(rate / 1e9)} GFLOP/s of {name}" for name, rate in used.items())
    balance = " or ".join(number(rate / bandwidth) for rate in used.values())
    columns = ["network", "bound", "FLOP a byte", "GFLOP a call", "moves", "at best", "took", "of the bound"]
    cells = [
        [
            part.name.replace("_", " "),
            part.kind,
            data(part.intensity, number(part.intensity)),
            number(part.flop / 1e9),
            size(part.bytes),
            seconds(part.least_s),
            seconds(part.took_s),
            NONE if part.share is None else data(part.share, f"{100 * part.share:.0f} %"),
        ]
        for part in parts
    ]
    lead = (
        f"{row['variant']} against what this machine gave just before: {products} matrix products and "
        f"{number(bandwidth / 1e9)} GB/s of memory, so {balance} FLOP a byte are in balance. A network with "
        "fewer waits for the memory, one with more for the arithmetic. It moves at least its weights, inputs and "
        "outputs; weights that stay in a cache can beat the memory’s bound."
    )
    return section(
        "roofline", "What bounds it", table(columns, cells, "Roofline of each network", cards=True), lead=lead
    )


def split(document: Document) -> Html | None:
    lines, seen = [], {}
    for row in timed(document):
        parts = seconds_per_part(document, row)
        if not parts:
            continue
        kinds = [(PARTS.get(name, "other"), took) for name, took in parts.items()]
        seen |= {PARTS.get(name, "other"): _WORDS[PARTS.get(name, "other")] or name for name in parts}
        words = [f"{name.replace('_', ' ')} {seconds(took)}" for name, took in parts.items() if took]
        whole = clock(row)
        lines.append(Bar(name=row["variant"], parts=kinds, value=data(whole, seconds(whole)), note=" · ".join(words)))
    if not lines:
        return None
    lead = "Each part is timed by itself on the inputs it gets while an image is made, times its calls per image."
    keys = [(f"fill {kind}", words) for kind, words in seen.items()]
    return section("split", "Where the time goes", bars(lines, "Time per part"), legend(keys), lead=lead)


def sameness(document: Document, images: Mapping[str, np.ndarray]) -> Html:
    columns = ["variant", "verdict", "PSNR dB", "SSIM", "largest of 255", "UNet rel. L2"]
    floors = [
        [f"floor: {floor['what']}", tag("span", "noise floor"), *_parity(floor)] for floor in document["noise_floor"]
    ]
    rows = []
    for row in document["rows"]:
        if row["variant"] != "eager":
            kind, _ = likeness(document, row)
            rows.append([row["variant"], tag("span", MARKS.get(kind, NONE), class_=f"mark {kind}"), *_parity(row)])
    lead = (
        "Same weights, prompts and noise, against eager in float32. The noise floor is what repetition, and rounding "
        "to a lower precision, do by themselves in torch."
    )
    shown = (
        pictures(document, images)
        if images
        else tag(
            "p",
            "The images are in the page that is written while measuring: accel bench MODEL --out bench.html.",
            class_="why",
        )
    )
    return section(
        "same",
        "The same image?",
        shown,
        table(columns, rows + floors, "Distance from eager float32", cards=True),
        lead=lead,
    )


def _parity(row: Mapping[str, Any]) -> list[Any]:
    image, unet = row["parity"]["image"], row["parity"]["unet"]
    if image is None or unet is None:
        return [NONE] * 4
    if not (image["finite"] and unet["finite"]):
        return ["NaN or infinite"] + ["–"] * 3
    psnr = "∞" if image["psnr"] == "inf" else number(image["psnr"], "{:.1f}")
    return [
        data(image["psnr"], psnr),
        number(image["ssim"], "{:.5f}"),
        number(image["max_abs"], "{:.3g}"),
        number(unet["relative_l2"], "{:.1e}"),
    ]


def int8_verdict(document: Document) -> Html | None:
    found = int8(document)
    if not found:
        return None
    items = [
        tag(
            "li",
            tag("b", f"{name.replace('_', ' ')}: "),
            tag("span", verdict, class_=f"mark {'accepted' if verdict == 'accepted' else 'rejected'}"),
            tag("ul", [tag("li", line) for line in lines]),
        )
        for name, verdict, lines in found
    ]
    lead = "int8 is kept where the export measured it faster and its images near enough to float32’s."
    return section("int8", "int8", tag("ul", items, class_="verdicts"), lead=lead)


def memory(document: Document) -> Html | None:
    lines = []
    for row in document["rows"]:
        alone = row["process"]
        if alone["peak_rss_bytes"] is None:
            continue
        peak, base = alone["peak_rss_bytes"], alone["baseline_rss_bytes"]
        note = f"libraries {size(base)} · model and work {size(peak - base)} · loads in {seconds(alone['load_s'])}"
        note += f" · first image {seconds(alone['first_image_s'])}"
        parts = [("rest", base), ("unet", max(0, peak - base))]
        lines.append(Bar(name=row["variant"], parts=parts, value=data(peak, size(peak)), note=note))
    if not lines:
        return None
    keys = [("fill rest", "the libraries"), ("fill unet", "the model and its work")]
    lead = "Highest resident memory of a fresh process that makes two images."
    return section("memory", "Memory", bars(lines, "Peak memory"), legend(keys), lead=lead)


def files(document: Document) -> Html:
    lines = []
    for name, part in document["bundle"]["components"].items():
        stored = (part["graph_bytes"] or 0) + (part["weights_bytes"] or 0)
        work = f" · {number(part['flop']['total'] / 1e9)} GFLOP a call" if part["flop"] else ""
        note = f"{part['parameters'] / 1e6:,.2f} M parameters, {part['dtype']}{work}"
        kind = PARTS.get(name, "other")
        lines.append(Bar(name=name.replace("_", " "), parts=[(kind, stored)], value=size(stored or None), note=note))
    return section("files", "Files", bars(lines, "Size of each part"), lead="Graph and weights of each part on disk.")


def figures(document: Document) -> Html:
    """Every table that the terminal prints with --full."""
    made = []
    for title, columns, rows in tables(document):
        cells = [[cells[0], cells[1]] if cells[1].startswith(f"{NONE}: ") else cells for cells in rows]
        made.append(tag("details", tag("summary", title), table(columns, cells, title)))
    return section("figures", "Every figure", made)


def method(document: Document) -> Html:
    work, environment = document["work"], document["environment"]
    here = environment.get("machine") or {}
    packages = ", ".join(f"{name} {version}" for name, version in (here.get("packages") or {}).items() if version)
    gpus = ", ".join(gpu["name"] for gpu in here.get("gpus") or ()) or "none"
    rates = ", ".join(
        f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in environment.get("peak_flop_per_s", {}).items()
    )
    pairs = {
        "model": f"{document['bundle']['name']}: {document['bundle']['topology']}, {document['bundle']['precision']}",
        "digest": document["bundle"]["digest"],
        "work": f"{number(work['width'], '{}')} × {number(work['height'], '{}')} px, batch {work['batch']}, "
        f"{number(work['steps'], '{}')} steps of {work['sampler']}, guidance {work['guidance']:g}",
        "rounds": f"{work['rounds_done']} of {work['rounds']} after {work['warmup']} warm-up calls",
        "processor": f"{here['cpu']}, {here['threads']} threads" if here else NONE,
        "instructions": ", ".join(here.get("isa") or ()) or NONE,
        "GPU": gpus if here else NONE,
        "system": f"{here['os']}, Python {here['python']}" if here else NONE,
        "packages": packages or NONE,
        "load before": ", ".join(map(str, environment.get("load_average") or [NONE])),
        "matrix peak": rates or NONE,
        "memory": f"{moved / 1e9:,.1f} GB/s" if (moved := environment.get("bandwidth_bytes_per_s")) else NONE,
        "made by": f"accel {document['accel']}, {document['created']}",
    }
    facts = tag(
        "dl", [tag("div", tag("dt", key), tag("dd", value)) for key, value in pairs.items()], class_="facts wide"
    )
    notes = tag("ul", [tag("li", note) for note in document["notes"]], class_="notes")
    return section("method", "How it was measured", command(document["command"]), facts, notes)


def command(typed: str) -> Html | None:
    """The command line with a button that copies it."""
    if not typed:
        return None
    button = tag("button", "Copy", type="button", data_copy="command")
    return tag("div", tag("code", typed, id="command"), button, class_="command")
