"""Put the saved benchmark results into docs/results.md, so that no figure there is written by hand.

    python benchmarks/readme_table.py

rewrites what stands between the markers of that page.
"""

from __future__ import annotations

import json
from pathlib import Path

import pages

ROOT = Path(__file__).parents[1]
RESULTS = ("digits.json", "sd15-tiny-256.json")
NONE = "not measured"


def milliseconds(row: dict, scope: str) -> str:
    timing = row["scopes"].get(scope, {}).get("timing")
    return f"{timing['p50_s'] * 1e3:,.1f}" if timing else NONE


def speedup(row: dict, baseline: str) -> str:
    found = row["scopes"].get("image", {}).get("speedup", {}).get(baseline)
    return f"{found['ratio']:.2f}x" if found else NONE


def figure(value, form: str) -> str:
    return NONE if value is None else value if isinstance(value, str) else form.format(value)


def table(document: dict) -> str:
    """One result as a Markdown table, with the machine and the command above it."""
    bundle, work, here = document["bundle"], document["work"], document["environment"]["machine"]
    parameters = sum(component["parameters"] for component in bundle["components"].values())
    versions = ", ".join(f"{name} {here['packages'][name]}" for name in ("torch", "onnxruntime", "openvino"))
    lines = [
        f"**{bundle['name']}** ({parameters / 1e6:,.1f} M parameters), batch {work['batch']}, "
        f"{work['width']} x {work['height']} px, {work['sampler']} {work['steps']} steps, "
        f"guidance {work['guidance']:g}; p50 of {work['rounds_done']} interleaved rounds. {here['cpu']}, "
        f"{here['threads']} threads; {versions}. `{document['command']}`",
        "",
        "| engine | text encoder ms | UNet step ms | VAE decode ms | image ms | vs eager | vs compile "
        "| largest difference, 1/255 | PSNR dB | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        if not row["scopes"]["image"]["timing"]:
            continue
        image = (row["parity"] or {}).get("image") or {}
        peak = (row["process"] or {}).get("peak_rss_bytes")
        cells = [
            row["variant"],
            *(milliseconds(row, scope) for scope in ("text_encoder", "unet", "vae_decoder", "image")),
            speedup(row, "eager"),
            speedup(row, "compile"),
            figure(image.get("max_abs"), "{:.2g}"),
            figure(image.get("psnr"), "{:.1f}"),
            NONE if peak is None else f"{peak / 2**20:,.0f} MiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for floor in document["noise_floor"]:
        image = (floor["parity"] or {}).get("image") or {}
        cells = [
            f"*floor: {floor['what']}*",
            *[""] * 6,
            figure(image.get("max_abs"), "{:.2g}"),
            figure(image.get("psnr"), "{:.1f}"),
            "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    missing = [f"{row['variant']}: {row['reason']}" for row in document["rows"] if not row["scopes"]["image"]["timing"]]
    return "\n".join(lines + [f"\nNot measured: {'; '.join(missing)}."] * bool(missing))


def tables() -> str:
    """All of them, as the page has them."""
    return "\n\n".join(table(json.loads((ROOT / "benchmarks" / name).read_text())) for name in RESULTS)


def main() -> None:
    pages.put(ROOT / "docs" / "results.md", "results", tables())


if __name__ == "__main__":
    main()
