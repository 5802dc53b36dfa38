"""LoRA at run time: how long a switch takes on each engine, and how far the result is from exporting the LoRA anew.

    python benchmarks/lora_switch.py out/lora-switch --write
    python benchmarks/lora_switch.py out/lora-switch --models digits --engines onnxruntime openvino

`digits` draws images with the shipped few-step model, in float32 and in int8; `sd-tiny` is the SD-Tiny UNet at real
size (323 million parameters, random weights, latents of 64 x 64), one call of it. Two LoRA files are made: A, rank 16,
for attention and convolutions; B, rank 8, for attention. They are random, and as large as a tenth of the weights.

For each engine: the seconds of the first switch to A (with fusing), of a switch to A when the fused tensors are in the
cache, and of the one back to the bundle's own weights; whether A, B, A gives the same bits; how far A's output is from
that of a bundle exported with A (relative L2), and from the output without it. Rows are kept in the out folder: a run
that was interrupted goes on. `--write` makes benchmarks/lora-switch.json and the table of docs/lora.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch
from safetensors.torch import load_file, save_file
from sd_tiny_int8 import write_pipeline

import accel
from accel.engines import load_engine
from accel.export.graph.trace import example
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.files import cache_dir, write_json
from accel.machine import machine
from accel.models.lora import for_bundle
from accel.parity import relative_l2

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/lora-switch.json", ROOT / "docs/lora.md"
ENGINES = ("eager", "compile", "onnxruntime", "openvino")
MODELS = {"digits": "digits/4step, float32", "digits-int8": "digits/4step, int8", "sd-tiny": "SD-Tiny UNet, float32"}
ATTENTION = tuple(f"{name}.weight" for name in ("to_q", "to_k", "to_v", "to_out.0"))
CONVOLUTIONS = ("conv1.weight", "conv2.weight")
SHARE = 0.1  # norm of the update over that of the weight


def bundles(model: str, out: Path) -> tuple[Path, Path, float]:
    """The bundle, the same exported with A, and the seconds that the export took."""
    base, fused, took = out / model, out / f"{model}-A", out / f"{model}-A.seconds"
    if model == "sd-tiny":
        source: Any = out / "sd-tiny-pipeline"
        if not (source / "model_index.json").is_file():
            write_pipeline(source, narrow=False)
        options: dict[str, Any] = {"profile": "batch=1,size=512", "components": ("unet",)}
    else:
        source, options = "digits/4step", {"profile": "digits"}
        if model == "digits-int8":
            options |= {"precision": "int8", "int8": Int8Settings()}
    if not base.exists():
        export_pipeline(source, base, **options)
    make_loras(bundles("digits", out)[0] if model == "digits-int8" else base, out, model)
    if not took.is_file():
        started = time.perf_counter()
        export_pipeline(source, fused, loras=[file(out, model, "A")], overwrite=True, **options)
        took.write_text(str(time.perf_counter() - started))
    return base, fused, float(took.read_text())


def file(out: Path, model: str, name: str) -> Path:
    return out / f"{model.removesuffix('-int8')}-{name}.safetensors"


def make_loras(base: Path, out: Path, model: str) -> None:
    """LoRA files A and B for the UNet of a float32 bundle, once."""
    for name, rank, layers in (("A", 16, ATTENTION + CONVOLUTIONS), ("B", 8, ATTENTION)):
        if file(out, model, name).is_file():
            continue
        generator, made = torch.Generator().manual_seed(rank), {}
        for key, weight in load_file(base / "unet/model.safetensors").items():
            if key.endswith(layers):
                down = torch.randn(rank, *weight.shape[1:], generator=generator)
                up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=generator)
                size = torch.linalg.norm(up.flatten(1) @ down.flatten(1))
                layer = f"unet.{key.removesuffix('.weight')}"
                made |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up * (SHARE * weight.norm() / size)}
        save_file(made, file(out, model, name))


class Runner:
    """A bundle on an engine: its output, and its switch from one set of LoRA files to another."""

    def __init__(self, model: str, bundle: Path, engine: str, threads: int):
        options = {"threads": threads} if engine in ("onnxruntime", "openvino") else {}
        self.whole = model != "sd-tiny"
        if self.whole:
            self.pipeline = accel.load(bundle, engine, verify=False, text_cache=0, **options)
            self.description = self.pipeline.engines["unet"].description
            return
        self.bundle = accel.Bundle.open(bundle)
        self.engine = load_engine(self.bundle, "unet", engine, verify=False, **options)
        self.description = self.engine.description
        record = self.engine.component
        sizes = {dim: limits.min for dim, limits in record.dims.items()}
        self.feeds = {key: value.numpy() for key, value in example(record.inputs, sizes).items()}

    def output(self) -> np.ndarray:
        if self.whole:
            return self.pipeline("a handwritten seven", seed=0, num_images_per_prompt=8, output_type="np").images
        return torch.as_tensor(self.engine(**self.feeds)["out_sample"]).float().numpy()

    def switch(self, *files: Path) -> float:
        started = time.perf_counter()
        if self.whole:
            self.pipeline.set_loras(files)
        else:
            self.engine.set_weights(for_bundle.fused(self.bundle, files).tensors.get("unet", {}))
        return time.perf_counter() - started

    def close(self) -> None:
        (self.pipeline if self.whole else self.engine).close()


def measured(model: str, engine: str, out: Path, threads: int) -> dict[str, Any]:
    """One row: an engine on a model."""
    base, fused, exported = bundles(model, out)
    a, b = (file(out, model, name) for name in "AB")
    again = Runner(model, fused, engine, threads)
    wanted = again.output()
    again.close()
    shutil.rmtree(cache_dir() / "loras", ignore_errors=True)
    runner = Runner(model, base, engine, threads)
    plain = runner.output()
    first = runner.switch(a)
    drawn = runner.output()
    runner.switch(b)
    other = runner.output()
    cached = runner.switch(a)
    second = runner.output()
    back = runner.switch()
    row = {
        "engine": engine,
        "description": runner.description,
        "first_seconds": round(first, 3),
        "cached_seconds": round(cached, 3),
        "back_seconds": round(back, 3),
        "export_seconds": round(exported, 1),
        "same_bits": bool(np.array_equal(drawn, second) and np.array_equal(runner.output(), plain)),
        "to_export": relative_l2(drawn, wanted),
        "to_plain": relative_l2(drawn, plain),
        "to_other": relative_l2(drawn, other),
    }
    if model == "digits-int8":
        truth = Runner("digits", bundles("digits", out)[1], "eager", threads)
        float32 = truth.output()
        truth.close()
        row |= {"to_float32": relative_l2(drawn, float32), "export_to_float32": relative_l2(wanted, float32)}
    runner.close()
    return row


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """The rows in Markdown."""
    text = [
        "| model | engine | to a LoRA, s | again, s | back, s | export, s | from the export | from no LoRA | A, B, A |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, found in rows.items():
        for row in found:
            seconds = [f"{row[key]:.2f}" for key in ("first_seconds", "cached_seconds", "back_seconds")]
            bits = "same bits" if row["same_bits"] else "**differs**"
            text.append(
                f"| {MODELS[model]} | {row['engine']} | {' | '.join(seconds)} | {row['export_seconds']:.0f} | "
                f"{row['to_export']:.1e} | {row['to_plain']:.2f} | {bits} |"
            )
    return "\n".join(text)


def once(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export-only", action="store_true", help="make the bundles, measure nothing else")
    parser.add_argument("--write", action="store_true", help="write the JSON and the table of docs/lora.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["ACCEL_CACHE"] = str((args.out / "cache").resolve())
    rows = {}
    for model in args.models:
        if args.export_only:
            bundles(model, args.out)
            continue
        engines = [name for name in args.engines if model == "digits" or name != "compile"]
        for name in engines:
            print(f"{model}, {name}", flush=True)
            row = once(
                args.out / f"{model}-{name}.json", lambda m=model, n=name: measured(m, n, args.out, args.threads)
            )
            rows.setdefault(model, []).append(row)
            print(json.dumps(row), flush=True)
    print(table(rows))
    if args.write and rows:
        found = {"machine": asdict(machine()), "threads": args.threads, "update_over_weight": SHARE, "models": rows}
        write_json(RESULT, found)
        pages.put(PAGE, "lora switch", table(rows))


if __name__ == "__main__":
    main()
