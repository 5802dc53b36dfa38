"""The whole image: a few-step student from text to pixels, as diffusers runs it and as we do.

    python benchmarks/whole_image.py digits/4step --write
    python benchmarks/random_pipeline.py sd15-tiny out/sd15-tiny-random
    python benchmarks/whole_image.py out/sd15-tiny-random --profile batch=1-2,size=256 --steps 4

exports the pipeline in float32 and in int8 into the work folder (kept for the next time), and times one image of every
way of running it, taking turns: eager and torch.compile, then our engines. `--write` keeps the result in
`whole-image.json` and puts the table into `docs/results.md`. The second one is of real size with random weights, which
decide neither speed nor how close two ways of computing the same network are; half an hour, most of it the int8 export.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pages

from accel.bundle import Bundle
from accel.engines import load_engine
from accel.errors import UserError
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.files import write_json
from accel.machine import machine
from accel.parity import psnr
from accel.pipeline import Pipeline, component_names

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "whole-image.json"
# Name -> engine and precision. The first is what everything is compared with.
WAYS = {
    "eager": ("eager", "fp32"),
    "eager bf16": ("eager", "bf16"),
    "torch.compile": ("compile", "fp32"),
    "ONNX Runtime": ("onnxruntime", "fp32"),
    "OpenVINO": ("openvino", "fp32"),
    "ONNX Runtime int8": ("onnxruntime", "int8"),
    "OpenVINO int8": ("openvino", "int8"),
}
PHASES = ("text_encoder", "unet", "vae_decoder", "total")


def bundle_of(precision: str, args: argparse.Namespace) -> Path:
    """The bundle of a precision, exported where it is not there yet."""
    work = args.work / Path(args.model).name
    out = work / precision
    if not (out / "accel.json").is_file():
        began = time.perf_counter()
        model, settings = (
            (work / "fp32", Int8Settings(images=args.calibration_images)) if precision == "int8" else (args.model, None)
        )
        how = {"int8": settings} if settings else {"profile": args.profile}
        export_pipeline(model, out, precision=precision, progress=lambda stage, done: print(stage, flush=True), **how)
        print(f"{precision}: exported in {time.perf_counter() - began:.0f} s", flush=True)
    return out


def load(way: str, args: argparse.Namespace) -> Pipeline:
    engine, precision = WAYS[way]
    bundle = Bundle.open(bundle_of("int8" if precision == "int8" else "fp32", args))
    options = {"dtype": precision} if precision == "bf16" else {}
    names = component_names(bundle)
    return Pipeline(
        bundle, {name: load_engine(bundle, name, engine, verify=False, **options) for name in names}, text_cache=0
    )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each phase of an image for every way, the median of the rounds, and its PSNR against eager's."""
    for precision in ("fp32", "int8"):
        bundle_of(precision, args)
    call = dict(prompt=args.prompt, seed=7, steps=args.steps, guidance_scale=0.0, output_type="np")
    pipelines, images, seconds, failed = {}, {}, {way: [] for way in WAYS}, {}
    for way in WAYS:
        try:
            pipelines[way] = load(way, args)
            images[way] = pipelines[way](**call).images  # and whatever is compiled on the first call
        except UserError as error:
            pipelines.pop(way, None)
            failed[way] = error.message
        print(f"{way}: {failed.get(way, 'loaded')}", flush=True)
    for number in range(args.rounds):
        for way, pipeline in pipelines.items():
            seconds[way].append(pipeline(**call).seconds)
            print(f"round {number + 1} of {args.rounds}, {way}: {seconds[way][-1]['total']:.2f} s", flush=True)
    rows = [
        {
            "way": way,
            "engine": WAYS[way][0],
            "precision": WAYS[way][1],
            "seconds": {phase: statistics.median(taken[phase] for taken in seconds[way]) for phase in PHASES},
            "psnr": None if way == "eager" else float(psnr(images[way], images["eager"], data_range=1.0)),
        }
        for way in pipelines
    ]
    own = Bundle.open(bundle_of("fp32", args)).manifest.sampler
    return {
        "schema": "accel-whole-image/1",
        "command": f"python benchmarks/whole_image.py {args.model} --rounds {args.rounds}",
        "machine": machine().as_dict(),
        "work": {
            "model": str(args.model),
            "size": int(next(iter(images.values())).shape[1]),
            "steps": args.steps or own.get("steps") or len(own["timesteps"]),
            "guidance": 0.0,
            "batch": 1,
            "rounds": args.rounds,
        },
        "rows": rows,
        "failed": failed,
    }


def table(document: Mapping[str, Any]) -> str:
    """The table of the page, fastest first, the machine below it."""
    rows, work = {row["way"]: row for row in document["rows"]}, document["work"]
    totals = {way: row["seconds"]["total"] for way, row in rows.items()}
    unit, factor = ("s", 1.0) if min(totals.values()) > 0.5 else ("ms", 1e3)
    title = f"{work['model']}, {work['steps']} steps, {work['size']} px"
    phases = f"text {unit} | UNet {unit} | decoder {unit} | image {unit}"
    lines = [f"| {title} | {phases} | vs eager | vs compile | same image |", "|---|---|---|---|---|---|---|---|"]
    for way in sorted(rows, key=totals.__getitem__):
        taken = [f"{factor * rows[way]['seconds'][phase]:.3g}" for phase in PHASES]
        versus = [
            f"{totals[base] / totals[way]:.2f}x" if base in totals else "-" for base in ("eager", "torch.compile")
        ]
        same = "reference" if rows[way]["psnr"] is None else f"{rows[way]['psnr']:.0f} dB"
        name = f"**accel: {way}**" if rows[way]["engine"] in ("onnxruntime", "openvino") else way
        lines.append(f"| {' | '.join([name, *taken, *versus, same])} |")
    here, packages = document["machine"], document["machine"]["packages"]
    isa = next((f", {name}" for name in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2") if name in here["isa"]), "")
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "onnxruntime", "openvino"))
    missing = "".join(f" {way} is not measured: {why}." for way, why in document["failed"].items())
    how = f"median of {work['rounds']} interleaved rounds; PSNR of the image against eager's"
    machine_line = f"{here['cpu']}, {here['threads']} threads{isa}; {versions}; {how}.{missing} `{document['command']}`"
    return "\n".join([*lines, "", machine_line])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="?", help="pipeline folder or shipped model; without it the kept result is written"
    )
    parser.add_argument("--work", type=Path, default=Path("out/whole-image"), help="folder of the bundles")
    parser.add_argument("--profile", default="native")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's own)")
    parser.add_argument("--prompt", default="a handwritten seven")
    parser.add_argument("--calibration-images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the result, and put the table into the page")
    args = parser.parse_args()
    document = measure(args) if args.model else json.loads(KEPT.read_text())
    print(table(document))
    if args.write:
        write_json(KEPT, document)
        pages.put(ROOT / "docs" / "results.md", "whole-image", table(document))


if __name__ == "__main__":
    main()
