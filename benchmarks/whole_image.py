"""The whole image: a real-size few-step student from text to pixels, as diffusers runs it and as we do.

    python benchmarks/random_pipeline.py sd15-tiny out/sd15-tiny-random
    python benchmarks/whole_image.py out/sd15-tiny-random --work out/whole-image --write

exports the pipeline in float32 and in int8 into the work folder (kept for the next time), and times one image of every
way of running it, taking turns: eager and torch.compile, then our engines. `--write` keeps the result in
`whole-image.json` and puts the table into the README. Weights are random, which decides neither speed nor how close
two ways of computing the same network are; the images show nothing.
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
PROFILE, STEPS, PROMPT = "batch=1-2,size=256", 4, "a photo of a lighthouse on a cliff at dusk"
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


def bundle_of(precision: str, source: Path, work: Path) -> Path:
    """The bundle of a precision, exported where it is not there yet."""
    out = work / precision
    if not (out / "accel.json").is_file():
        began = time.perf_counter()
        model, settings = (work / "fp32", Int8Settings(images=4)) if precision == "int8" else (source, None)
        how = {"int8": settings} if settings else {"profile": PROFILE}
        export_pipeline(model, out, precision=precision, progress=lambda stage, done: print(stage, flush=True), **how)
        print(f"{precision}: exported in {time.perf_counter() - began:.0f} s", flush=True)
    return out


def load(way: str, source: Path, work: Path) -> Pipeline:
    engine, precision = WAYS[way]
    bundle = Bundle.open(bundle_of("int8" if precision == "int8" else "fp32", source, work))
    options = {"dtype": precision} if precision == "bf16" else {}
    names = component_names(bundle)
    return Pipeline(bundle, {name: load_engine(bundle, name, engine, verify=False, **options) for name in names})


def measure(source: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Seconds of each phase of an image for every way, the median of the rounds, and its PSNR against eager's."""
    for precision in ("fp32", "int8"):
        bundle_of(precision, source, work)
    call = dict(prompt=PROMPT, seed=7, steps=STEPS, guidance_scale=0.0, output_type="np")
    pipelines, images, seconds, failed = {}, {}, {way: [] for way in WAYS}, {}
    for way in WAYS:
        try:
            pipelines[way] = load(way, source, work)
            images[way] = pipelines[way](**call).images  # and whatever is compiled on the first call
        except UserError as error:
            pipelines.pop(way, None)
            failed[way] = error.message
        print(f"{way}: {failed.get(way, 'loaded')}", flush=True)
    for number in range(rounds):
        for way, pipeline in pipelines.items():
            seconds[way].append(pipeline(**call).seconds)
            print(f"round {number + 1} of {rounds}, {way}: {seconds[way][-1]['total']:.2f} s", flush=True)
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
    return {
        "schema": "accel-whole-image/1",
        "command": f"python benchmarks/whole_image.py out/{source.name} --rounds {rounds} --write",
        "machine": machine().as_dict(),
        "work": {"model": source.name, "size": 256, "steps": STEPS, "guidance": 0.0, "batch": 1, "rounds": rounds},
        "rows": rows,
        "failed": failed,
    }


def table(document: Mapping[str, Any]) -> str:
    """The README's table, fastest first, the machine below it."""
    rows = {row["way"]: row for row in document["rows"]}
    totals = {way: row["seconds"]["total"] for way, row in rows.items()}
    lines = [
        "| SD-Tiny, 4 steps, 256 px | text s | UNet s | decoder s | image s | vs eager | vs compile | same image |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in sorted(rows, key=totals.__getitem__):
        phases = [f"{rows[way]['seconds'][phase]:.2f}" for phase in PHASES]
        versus = [
            f"{totals[base] / totals[way]:.2f}x" if base in totals else "-" for base in ("eager", "torch.compile")
        ]
        same = "reference" if rows[way]["psnr"] is None else f"{rows[way]['psnr']:.0f} dB"
        name = f"**accel: {way}**" if rows[way]["engine"] in ("onnxruntime", "openvino") else way
        lines.append(f"| {' | '.join([name, *phases, *versus, same])} |")
    here, packages = document["machine"], document["machine"]["packages"]
    isa = next((f", {name}" for name in ("amx_int8", "avx512_vnni", "avx_vnni", "avx2") if name in here["isa"]), "")
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "onnxruntime", "openvino"))
    rounds = document["work"]["rounds"]
    missing = "".join(f" {way} is not measured: {why}." for way, why in document["failed"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{here['cpu']}, {here['threads']} threads{isa}; {versions}; median of {rounds} interleaved rounds, "
            f"random weights at real size; PSNR of the image against eager's.{missing} `{document['command']}`",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="pipeline folder; without it the kept result is written")
    parser.add_argument("--work", type=Path, default=Path("out/whole-image"), help="folder of the bundles")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the result, and put the table into the README")
    args = parser.parse_args()
    document = measure(args.source, args.work, args.rounds) if args.source else json.loads(KEPT.read_text())
    print(table(document))
    if args.write:
        write_json(KEPT, document)
        pages.put(ROOT / "README.md", "results", table(document))


if __name__ == "__main__":
    main()
