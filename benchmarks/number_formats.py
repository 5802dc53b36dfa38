"""Quantized bundles in every number format: images, size on disk, memory, and what engines really run.

    python benchmarks/number_formats.py out/formats digits/4step --size 64 --rtx --write
    python benchmarks/number_formats.py out/formats out/sd-tiny --size 256 --only-unet --memory --write

`--memory` draws an image on each engine in a process of its own. `--rtx` builds TensorRT-RTX engine files, which needs
no GPU. Speed is not in the tables: what a format is worth there, `accel bench` says for your machine. Bundles that are
in the folder already are used again; `--write` makes benchmarks/number-formats.json and the tables of docs/int8.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import pages

from accel.bench import parse, probe
from accel.bundle import Bundle, is_bundle
from accel.dtypes import QUANTIZED
from accel.engines import computing_in, status
from accel.export.int8 import audit, speed
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.export.tensorrt.build import build
from accel.files import write_json
from accel.int8.formats import of_layer
from accel.machine import machine, version_of

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/number-formats.json", ROOT / "docs/int8.md"
PRECISIONS = [name for name in QUANTIZED if name != "auto"]
ENGINES = ("eager", "onnxruntime", "openvino")
SAMPLER = {"name": "dmd2", "timesteps": [999, 499], "guidance": 0.0}  # of a model that was never trained
PROMPT = "a handwritten seven"


def made(args: argparse.Namespace, precision: str) -> Bundle:
    """The bundle of a precision, of this run or an earlier one."""
    folder = args.out / Path(args.model).name
    floating, out = folder / "fp32", folder / precision
    if not is_bundle(floating):
        parts = ("text_encoder", "unet", "vae_decoder")
        sampler = SAMPLER if args.only_unet else None
        profile = f"batch=1,size={args.size}" if args.only_unet else f"batch=1-2,size={args.size}"
        export_pipeline(args.model, floating, profile=profile, components=parts, sampler=sampler)
    if precision != "fp32" and not is_bundle(out):
        few = dict(components=("unet",), images=2, evaluation_images=1) if args.only_unet else {}
        export_pipeline(floating, out, precision=precision, int8=Int8Settings(**few))
    return Bundle.open(out)


def row(args: argparse.Namespace, precision: str) -> dict[str, Any]:
    bundle = made(args, precision)
    unet = bundle.component("unet")
    found: dict[str, Any] = {
        "precision": precision,
        "weights_bytes": bundle.file(unet.weights).stat().st_size,
        "parameters": unet.parameters,
        "relative_l2": unet.parity["relative_l2"],
    }
    if unet.int8:
        forms = [of_layer(own)[0].name for own in unet.int8["layers"].values()]
        found |= {"layers": {name: forms.count(name) for name in sorted(set(forms))}}
        found |= {"psnr": unet.int8["acceptance"]["parity"]["psnr"], "audit": {}}
        for engine in set(computing_in(unet.format)) & set(ENGINES) if unet.dtype == "float32" else ():
            if status(engine).ok:
                done = audit.audit(bundle, unet, engine)
                found["audit"][engine] = {key: done[key] for key in ("int8", "float", "share")}
    if args.rtx and unet.dtype == "float16":
        (file,) = build(bundle, ["unet"], engine="tensorrt-rtx", targets=["sm89", "sm120"])
        counts = file.record["audit"]
        found["tensorrt-rtx"] = {key: counts.get(key) for key in ("heavy", "int8_share", "fused_attentions")}
        found["tensorrt-rtx"]["bytes"] = file.record["plan"]["bytes"]
    if args.memory and unet.dtype == "float32":
        found["memory"] = {}
        for engine in ENGINES:
            if status(engine).ok:
                with tempfile.TemporaryDirectory() as empty:
                    call = {"prompt": [PROMPT], "seed": 0}
                    done = probe.probe(bundle.path, parse(engine), call, {"ACCEL_CACHE": empty})
                taken = done.peak_rss_bytes - done.baseline_rss_bytes if not done.reason else None
                loaded = done.loaded_rss_bytes - done.baseline_rss_bytes if not done.reason else None
                found["memory"][engine] = {"peak_bytes": taken, "loaded_bytes": loaded, "reason": done.reason}
    return found


def table(model: str, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"| {model}'s UNet | weights MB | distance to float32 | images dB | layers | on ONNX Runtime | on OpenVINO | "
        "TensorRT-RTX: kernels by precision | nodes in the format |",
        "|" + "---|" * 9,
    ]
    for r in rows:
        layers = ", ".join(f"{count} {name}" for name, count in r.get("layers", {}).items())
        shares = [f"{own['share']:.0%}" if (own := r.get("audit", {}).get(name)) else "" for name in ENGINES[1:]]
        rtx = r.get("tensorrt-rtx", {})
        heavy = ", ".join(f"{count} {name}" for name, count in rtx.get("heavy", {}).items())
        done = "{} of {}".format(*rtx["int8_share"]) if rtx.get("int8_share") else ""
        psnr = f"{r['psnr']:.1f}" if "psnr" in r else ""
        cells = (r["precision"], f"{r['weights_bytes'] / 1e6:,.1f}", f"{r['relative_l2']:.1e}", psnr, layers)
        lines.append(f"| {' | '.join((*cells, *shares, heavy, done))} |")
    if not any("memory" in r for r in rows):
        return "\n".join(lines)
    lines += ["", f"| {model}: whole image, peak (loaded), MB | " + " | ".join(ENGINES) + " |", "|" + "---|" * 4]
    for r in (r for r in rows if "memory" in r):
        cells = [
            f"{own['peak_bytes'] / 1e6:,.0f} ({own['loaded_bytes'] / 1e6:,.0f})"
            if own.get("peak_bytes")
            else "not measured"
            for own in (r["memory"].get(engine, {}) for engine in ENGINES)
        ]
        lines.append(f"| {r['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model")
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--precisions", default=",".join(["fp32", *PRECISIONS]))
    parser.add_argument("--only-unet", action="store_true", help="two steps, and one image to compare")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rtx", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    speed.SECONDS = 0.0
    name = Path(args.model).name if Path(args.model).exists() else args.model
    kept = json.loads(RESULT.read_text())["models"] if RESULT.is_file() else {}
    rows = {r["precision"]: r for r in kept.get(name, [])}
    for precision in args.precisions.split(","):
        rows[precision] = row(args, precision)
        print(json.dumps(rows[precision]), flush=True)
        kept[name] = [rows[p] for p in ("fp32", *PRECISIONS) if p in rows]
        if args.write:
            versions = {name: version_of(name) for name in ("torch", "onnx", "onnxruntime", "openvino")}
            command = "python benchmarks/number_formats.py OUT MODEL --size PX --write"
            write_json(RESULT, {"command": command, "machine": machine().cpu, "versions": versions, "models": kept})
            pages.put(PAGE, "number-formats", "\n\n".join(table(*item) for item in kept.items()))


if __name__ == "__main__":
    main()
