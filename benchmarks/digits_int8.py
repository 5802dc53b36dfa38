"""What int8 costs the digits models, by calibration, and what wrong calibration costs: a table for docs/int8.md.

    python benchmarks/digits_int8.py out/digits-int8 digits/tiny my-4-step-student my-1-step-student

Each model is exported in float32, quantised in several ways in torch (the arithmetic of the exported graphs), and once
as a bundle that every engine runs. Judged are `--images` pictures of the prompts of `accel.distill.digits.prompt_set`:
how many are the digit asked for, their Frechet distance to held-out real digits, and the PSNR against float32's from
the same noise.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from accel import int8
from accel.bundle import Bundle
from accel.distill import digits, digits_quality
from accel.errors import Notice
from accel.export.calibration import Calibration, calibration, default_prompts
from accel.export.int8_options import Options
from accel.export.pipeline import export_pipeline
from accel.int8_ranges import observe
from accel.int8_recipe import Int8
from accel.machine import machine
from accel.parity import psnr
from accel.pipeline import Pipeline, load

ENGINES = ("onnxruntime", "openvino")


def judged(pipeline: Pipeline, images: int) -> tuple[np.ndarray, dict[str, float]]:
    """Pictures of the prompt set from fixed noise, and what the classifier says of them."""
    texts, wanted = zip(*digits.prompt_set(images // 10), strict=True)
    pictures = Calibration(texts, 5_000_000).run(pipeline)
    tensor = torch.from_numpy(pictures).permute(0, 3, 1, 2) * 2 - 1
    return pictures, digits_quality.judge(tensor, torch.tensor(wanted))


def random_latents(pipeline: Pipeline) -> Callable[[], None]:
    """The wrong calibration of tools that never run the pipeline: normal noise at random timesteps and contexts."""
    generator = torch.Generator().manual_seed(0)
    unet = pipeline.engines["unet"]
    dims = {name: limits.min for name, limits in unet.component.dims.items()} | {"batch": 1}

    def run() -> None:
        for _ in range(64):
            feeds = {}
            for spec in unet.component.inputs:
                shape = spec.concrete(dims)
                normal = torch.randn(shape, generator=generator)
                feeds[spec.name] = torch.randint(0, 1000, shape, generator=generator).float() if not shape else normal
            unet(**feeds)

    return run


def ways(pipeline: Pipeline, right: Calibration) -> Iterator[tuple[str, Int8, Callable[[], Any]]]:
    """(name, recipe, what is run to calibrate) of everything that is compared in torch."""
    run = lambda: right.run(pipeline)  # noqa: E731
    yield "all layers", Int8(), run
    yield "convolutions only", Int8(level="conv"), run
    yield "+ feed-forward", Int8(level="ff"), run
    yield "+ queries, keys, values", Int8(level="qkv"), run
    yield "all, range: max", Int8(collector="max"), run
    yield "all, range: percentile 99.99", Int8(collector="percentile"), run
    yield "all, begin-of-text not apart", Int8(bos_apart=False), run
    yield "all, SmoothQuant 0.5", Int8(smooth=0.5), run
    yield "all, outputs of convolutions float", Int8(outputs=False), run
    few = steps_of(pipeline) < 10
    wrong = dict(sampler="dpmpp_2m", steps=25, guidance_scale=3.0) if few else dict(sampler="dmd2", steps=1)
    yield f"wrong timesteps ({wrong['steps']} steps)", Int8(), lambda: replace(right, sampling=wrong).run(pipeline)
    yield "wrong latents (random, never run)", Int8(), random_latents(pipeline)


def steps_of(pipeline: Pipeline) -> int:
    own = pipeline.bundle.manifest.sampler
    return len(own["timesteps"]) if "timesteps" in own else own["steps"]


def usual_collector(model: torch.nn.Module, right: Calibration, pipeline: Pipeline) -> None:
    """The field's collector: sums of batch maxima per step, divided by the number of steps, the least of all steps.

    (ModelOpt's PercentileCalibrator; it sees 16 batches of one picture here, as its examples do.)
    """
    sums: dict[str, dict[int, float]] = {}
    calls: dict[str, int] = {}
    steps = steps_of(pipeline)

    def collect(name: str) -> Callable[[torch.Tensor], None]:
        def see(x: torch.Tensor) -> None:
            step = calls.get(name, 0) % steps
            calls[name] = calls.get(name, 0) + 1
            own = sums.setdefault(name, {})
            own[step] = own.get(step, 0.0) + x.abs().max().item()

        return see

    for name, quantizer in int8.ranges(model):
        quantizer.observer = collect(name)
    int8.set_mode(model, "observe")
    for index in range(16):
        Calibration(right.prompts[index : index + 1], index).run(pipeline)
    for name, quantizer in int8.ranges(model):
        quantizer.set_scale(min(total / steps for total in sums[name].values()) / 127)
    int8.set_mode(model, "quantize")


def compare(model: str, out: Path, images: int, only: str = "") -> dict[str, Any]:
    """All rows of one model; `only` leaves out the ways in torch that have another name."""
    name = Path(model).name
    high, low = out / f"{name}-float32", out / f"{name}-int8"
    if not high.exists():
        export_pipeline(model, high, profile="digits")
    pipeline = load(Bundle.open(high), "eager")
    unet = pipeline.engines["unet"].module.model
    right = calibration(default_prompts("digits"), 32)
    truth, figures = judged(pipeline, images)
    rows = [{"way": "float32", **figures}]
    print(json.dumps(rows[-1]), flush=True)

    def add(way: str) -> None:
        pictures, found = judged(pipeline, images)
        rows.append({"way": way, **found, "psnr": psnr(pictures, truth, 1.0)})
        print(json.dumps(rows[-1]), flush=True)
        int8.detach(unet)

    for way, recipe, run in ways(pipeline, right):
        if only and way != only:
            continue
        int8.attach(unet, recipe)
        observe([unet], recipe, run)
        add(way)
    if not only:
        int8.attach(unet, Int8())
        usual_collector(unet, right, pipeline)
        add("the field's usual collector, 16 batches")
    if not low.exists():
        export_pipeline(str(high), low, precision="int8", int8=Options())
    bundle = Bundle.open(low)
    for engine in ENGINES:
        for folder in (high, low):
            own = load(folder, engine)
            started = time.perf_counter()
            pictures, found = judged(own, images)
            seconds = time.perf_counter() - started
            rows.append({
                "way": f"{engine}, {'float32' if folder == high else 'int8 bundle'}", **found,
                "psnr": min(psnr(pictures, truth, 1.0), 200.0), "images_per_second": images / seconds,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    size = {place.name: sum(p.stat().st_size for p in (place / "unet").glob("*.safetensors")) for place in (high, low)}
    sampler = bundle.manifest.sampler
    return {"model": name, "sampler": dict(sampler), "rows": rows, "unet_bytes": size,
            "verdict": bundle.component("unet").int8["verdict"], "audit": bundle.component("unet").int8["audit"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--only", default="", help='leave out all ways but one, such as "all layers"')
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", Notice)
    found = {"machine": machine().as_dict(), "images": args.images, "models": []}
    for model in args.models:
        print(model, flush=True)
        found["models"].append(compare(model, args.out, args.images, args.only))
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
