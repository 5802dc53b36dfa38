"""A benchmark document for people: tables for a terminal. A cell that was not measured says so; it is never 0."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from . import clocks

NONE = "not measured"
Document = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]


def seconds(value: float | None) -> str:
    """Three digits, in s or ms."""
    if value is None:
        return NONE
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def ratio(value: Mapping[str, Any] | None) -> str:
    """`2.31x [2.20, 2.44]`, without the interval where there are too few rounds for one."""
    if value is None:
        return NONE
    interval = "" if value["low"] is None else f" [{value['low']:.2f}, {value['high']:.2f}]"
    return f"{value['ratio']:.2f}x{interval}"


def number(value: Any, form: str = "{:.3g}") -> str:
    """A figure that may be missing or infinite."""
    return NONE if value is None else value if isinstance(value, str) else form.format(value)


def size(value: float | None) -> str:
    """Bytes in GB, MB or kB, three digits."""
    if value is None:
        return NONE
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB")) if abs(value) >= u), (1e3, "kB"))
    return f"{value / unit:.3g} {name}"


def headline(document: Document) -> list[str]:
    """What was measured, on what work, on what machine."""
    bundle, work, environment = document["bundle"], document["work"], document["environment"]
    here = environment.get("machine")
    lines = [
        f"{bundle['name']}: {bundle['family']}, topology {bundle['topology']}, {bundle['precision']}, "
        f"digest {bundle['digest'][:12]}",
        f"{work['sampler']}, {number(work['steps'], '{}')} steps, guidance {work['guidance']:g}, "
        f"batch {work['batch']}, {number(work['width'], '{}')} x {number(work['height'], '{}')} px, "
        f"seeds {', '.join(map(str, work['seeds']))}; "
        f"{work['rounds_done']} of {work['rounds']} rounds after {work['warmup']} warm-up calls",
    ]
    if here:
        gpus = ", ".join(gpu["name"] for gpu in here["gpus"]) or "no GPU"
        versions = ", ".join(
            f"{name} {here['packages'][name]}"
            for name in ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt")
            if here["packages"].get(name)
        )
        lines.append(
            f"{here['cpu']}, {here['threads']} threads, {gpus}, {here['os']}; {versions}; "
            f"load average {', '.join(map(str, environment.get('load_average') or [NONE]))}"
        )
        peaks = environment["peak_flop_per_s"]
        if peaks:
            rates = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in peaks.items())
            lines.append(f"measured matrix peak: {rates}")
    if found := environment.get("gpu_clocks"):
        lines.append(clocks.sentence(found))
    return lines


def summary(document: Document) -> Table:
    """The table that answers the two questions, faster and the same image, within 80 columns."""
    columns = ["variant", "text", "UNet step", "VAE", "image", "vs eager", "PSNR dB", "memory"]
    cells = []
    for row in document["rows"]:
        if row["status"] == NONE:
            continue  # the reason stands below
        scopes, image = row["scopes"], row["parity"]["image"]
        clocks = [(scopes.get(name) or {}).get("timing") for name in ("text_encoder", "unet", "vae_decoder", "image")]
        times = [seconds(clock["p50_s"]) if clock else "-" for clock in clocks]
        versus = (scopes["image"]["speedup"] or {}).get("eager")
        same = "-" if image is None else "NaN" if not image["finite"] else number(image["psnr"], "{:.1f}")
        peak = row["process"]["peak_rss_bytes"]
        cells.append(
            [row["variant"], *times, f"{versus['ratio']:.2f}x" if versus else "-", same, size(peak) if peak else "-"]
        )
    return "p50 of the rounds; PSNR of the image against eager fp32's", columns, cells


def tables(document: Document) -> Iterator[Table]:
    """Title, column names and rows of cells of every table."""
    rows = document["rows"]
    yield _speed("Whole image", "image", rows, [("images/s", lambda s: number(s["images_per_s"]))])
    rate = [
        ("GFLOP/s", lambda s: number(s["flop_per_s"] and s["flop_per_s"] / 1e9)),
        ("% of peak", lambda s: number(s["peak_fraction"] and 100 * s["peak_fraction"])),
    ]
    for name, component in document["bundle"]["components"].items():
        flop = component["flop"] and component["flop"]["total"]
        work = f"{flop / 1e9:,.3g} GFLOP" if flop else f"FLOPs {NONE}"
        scope = document["work"]["scopes"].get(name)
        calls = scope and scope["calls_per_image"]
        often = f", {calls} {'call' if calls == 1 else 'calls'} per image" if calls else ""
        title = "one UNet step" if name == "unet" else name.replace("_", " ")
        yield _speed(f"{title} ({work}{often})", name, rows, rate)
    yield _parity(document)
    if any(row["process"]["load_s"] is not None for row in rows):
        yield _process(rows)
    yield _files(document["bundle"])


def _speed(title: str, scope: str, rows: list, extra: list[tuple[str, Callable]]) -> Table:
    if any(row["scopes"][scope].get("busy_s") for row in rows):
        extra = [*extra, ("GPU busy", lambda measured: seconds(measured["busy_s"]) if measured["busy_s"] else "-")]
    columns = ["variant", "p50", "p90", "min", "n", "vs eager", "vs compile", *(name for name, _ in extra)]
    cells = []
    for row in rows:
        measured = row["scopes"][scope]
        clock = measured["timing"]
        if clock is None:
            cells.append([row["variant"], f"{NONE}: {row['reason']}", *[NONE] * (len(columns) - 2)])
            continue
        versus = [ratio(measured["speedup"].get(name)) for name in ("eager", "compile")]
        times = [seconds(clock[key]) for key in ("p50_s", "p90_s", "min_s")]
        cells.append([row["variant"], *times, str(clock["n"]), *versus, *(show(measured) for _, show in extra)])
    return title, columns, cells


def _parity(document: Document) -> Table:
    columns = [
        "variant",
        "UNet rel. L2",
        "UNet cosine",
        "UNet max abs",
        "image PSNR dB",
        "image SSIM",
        "image max abs /255",
        "image cosine",
    ]
    cells = [_parity_row(f"noise floor: {row['what']}", row) for row in document["noise_floor"]]
    cells += [_parity_row(row["variant"], row) for row in document["rows"]]
    return "Same image? Against eager fp32", columns, cells


def _parity_row(name: str, row: Mapping[str, Any]) -> list[str]:
    unet, image = row["parity"]["unet"], row["parity"]["image"]
    if unet is None or image is None:
        return [name, f"{NONE}: {row.get('reason') or 'no reference'}", *[NONE] * 6]
    if not (unet["finite"] and image["finite"]):
        return [name, "NaN or infinite", *[NONE] * 6]
    return [
        name,
        number(unet["relative_l2"], "{:.1e}"),
        number(unet["cosine"], "{:.7f}"),
        number(unet["max_abs"], "{:.1e}"),
        number(image["psnr"], "{:.1f}"),
        number(image["ssim"], "{:.5f}"),
        number(image["max_abs"], "{:.2f}"),
        number(image["cosine"], "{:.7f}"),
    ]


def _process(rows: list) -> Table:
    columns = ["variant", "load", "first image", "second image", "peak memory", "libraries", "the model's share", "GPU"]
    cells = []
    for row in rows:
        alone = row["process"]
        if alone["load_s"] is None:
            cells.append([row["variant"], f"{NONE}: {alone['reason']}", *[NONE] * 6])
            continue
        peak, base = alone["peak_rss_bytes"], alone["baseline_rss_bytes"]
        times = [seconds(alone[key]) for key in ("load_s", "first_image_s", "second_image_s")]
        memory = [size(peak), size(base), size(peak - base), size(alone["device_bytes"])]
        cells.append([row["variant"], *times, *memory])
    return "Alone in a fresh process, cold engine caches", columns, cells


def _files(bundle: Mapping[str, Any]) -> Table:
    columns = ["component", "parameters", "stored as", "graph", "weights", "export", "GFLOP per call"]
    cells = [
        [
            name,
            f"{part['parameters'] / 1e6:,.2f} M",
            part["dtype"],
            size(part["graph_bytes"]),
            size(part["weights_bytes"]),
            seconds(part["export_seconds"]),
            number(part["flop"] and part["flop"]["total"] / 1e9),
        ]
        for name, part in bundle["components"].items()
    ]
    return "Files of the bundle", columns, cells


def show(document: Document, console: Any = None, *, heading: str = "", full: bool = False) -> None:
    """Print a document: the summary, or every table.

    Args:
        heading: a sentence above.
        console: a rich Console; by default one on stdout, for full tables in a pipe one that is wide enough.
    """
    from rich.console import Console
    from rich.text import Text

    if console is None:
        console = Console()
        if full and not console.is_terminal:
            console = Console(width=160)
    for line in [heading, ""] * bool(heading) + headline(document):
        console.print(Text(line))
    for table in tables(document) if full else [summary(document)]:
        _print(console, table, full)
    for note in [*_reasons(document["rows"]), *(document["notes"] if full else ())]:
        console.print(Text(f"- {note}"))
    if not full and document["notes"]:
        console.print(Text("- --full shows every table, and how it was measured"))


def show_tables(heading: str, tables: Iterable[Table], console: Any = None) -> None:
    """Print a sentence and short tables."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(Text(heading))
    for table in tables:
        _print(console, table, full=False, wrap=True)


def _print(console: Any, table: Table, full: bool, wrap: bool = False) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable
    from rich.text import Text

    title, columns, rows = table
    how = dict(title=title, title_justify="left", title_style="bold", header_style="bold")
    drawn = RichTable(**how) if full else RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), **how)
    for i, column in enumerate(columns):
        drawn.add_column(column, justify="left" if i == 0 else "right", no_wrap=not (full or wrap))
    for cells in rows:
        # A reason would stretch its column out of the window: it goes below the tables, once.
        reason = full and cells[1].startswith(f"{NONE}: ")
        drawn.add_row(*map(Text, [cells[0], NONE, *cells[2:]] if reason else cells))
    console.print()
    console.print(drawn)


def _reasons(rows: list) -> Iterator[str]:
    """Why something was not measured, each reason once, after the variants that it stopped."""
    stopped: dict[str, list[str]] = {}
    for row in rows:
        if row["reason"]:
            stopped.setdefault(f"{row['status']}: {row['reason']}", []).append(row["variant"])
        elif row["process"]["load_s"] is None:
            stopped.setdefault(f"load time and memory {NONE}: {row['process']['reason']}", []).append(row["variant"])
    yield from (f"{', '.join(names)}: {reason}" for reason, names in stopped.items())
