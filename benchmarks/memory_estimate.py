"""The predicted peak of memory beside the measured one, of whole images in processes of their own.

    python benchmarks/memory_estimate.py digits/4step BUNDLE ... --engines eager,onnxruntime --sizes 256,512 --write

The measured figure is the highest resident memory of a process that loads the model and draws an image twice, without
what the libraries took before. `--write` makes benchmarks/memory-estimate.json (figures that are there already and were
not measured again stay) and the table of docs/memory.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pages

from accel.bench import parse, probe
from accel.bench.memory import estimate
from accel.engines import facts, status
from accel.errors import UserError
from accel.files import write_json
from accel.machine import machine, version_of
from accel.pipeline import opened

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/memory-estimate.json", ROOT / "docs/memory.md"
PROMPT = "a handwritten seven"


def row(model: str, engine: str, size: int | None, batch: int) -> dict[str, Any]:
    """One model on one engine at one size: bytes predicted, and measured."""
    bundle, variant = opened(model, safety_checker=False), parse(engine)
    size = size or estimate.sizes_of(bundle, bundle.component("vae_decoder"), estimate.Call())["height"]
    found = estimate.need(bundle, variant, estimate.Call(batch, size, size))
    call: dict[str, Any] = {"prompt": [PROMPT] * batch, "seed": 0, "height": size, "width": size, "steps": 2}
    with tempfile.TemporaryDirectory() as empty:
        done = probe.probe(Path(model) if Path(model).exists() else bundle.path, variant, call, {"ACCEL_CACHE": empty})
    if done.reason:
        raise UserError(f"{model} on {engine}: {done.reason}", "see the message")
    measured = done.peak_rss_bytes - done.baseline_rss_bytes
    return {
        "model": Path(model).name if Path(model).exists() else model,
        "engine": engine,
        "size": size,
        "batch": batch,
        "predicted": found.as_dict(),
        "measured_bytes": measured,
        "libraries_bytes": done.baseline_rss_bytes,
        "error": found.peak / measured - 1,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| model | px | images | engine | weights MB | predicted MB | measured MB | error |", "|" + "---|" * 8]
    for r in rows:
        weights, peak = (r["predicted"][f"{what}_bytes"] / 1e6 for what in ("weights", "peak"))
        lines.append(
            f"| {r['model']} | {r['size']} | {r['batch']} | {r['engine']} | {weights:,.0f} | {peak:,.0f} | "
            f"{r['measured_bytes'] / 1e6:,.0f} | {r['error']:+.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--engines", default="eager,onnxruntime,openvino")
    parser.add_argument("--sizes", default="", help="pixels with commas between them (default: the model's own)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    kept = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    for model in args.models:
        for size in [int(s) for s in args.sizes.split(",") if s] or [None]:
            for engine in args.engines.split(","):
                graphs = facts(parse(engine).engine).reads_graph
                if not status(parse(engine).engine).ok or graphs and not opened(model).component("unet").graph:
                    continue
                new = row(model, engine, size, args.batch)
                print(
                    json.dumps({k: new[k] for k in ("model", "engine", "size", "measured_bytes", "error")}), flush=True
                )
                same = ("model", "engine", "size", "batch")
                kept = [r for r in kept if any(r[k] != new[k] for k in same)] + [new]
    if args.write:
        kept.sort(key=lambda r: (r["model"], r["size"], r["batch"], r["engine"]))
        versions = {name: version_of(name) for name in ("torch", "diffusers", "onnxruntime", "openvino")}
        command = "python benchmarks/memory_estimate.py MODEL ... --write"
        write_json(RESULT, {"command": command, "machine": machine().cpu, "versions": versions, "rows": kept})
        pages.put(PAGE, "memory-estimate", table(kept))


if __name__ == "__main__":
    main()
