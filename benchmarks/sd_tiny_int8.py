"""The SD-Tiny UNet at real size in int8, with random weights: speed per engine, share of int8, parity per layer.

    python benchmarks/sd_tiny_int8.py out/sd-tiny-int8 --json benchmarks/sd-tiny-int8.json

512 px (latents of 64 x 64), batch 1. Speed and parity per layer do not depend on what weights have learned; pictures
do, and are not judged. Text encoder and VAE are narrow: they only feed the UNet.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from accel import int8_packed, networks
from accel.assets import DIGITS
from accel.bundle import Bundle
from accel.engines import load_engine
from accel.errors import UserError
from accel.export import check
from accel.export.int8_options import Options
from accel.export.onnx import example
from accel.export.pipeline import export_pipeline
from accel.export.uint8 import FILE
from accel.machine import machine
from accel.parity import relative_l2
from accel.topology import topology

VARIANTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("eager fp32", "float", "eager", {}),
    ("eager bf16", "float", "eager", {"dtype": "bf16"}),
    ("onnxruntime fp32", "float", "onnxruntime", {}),
    ("onnxruntime int8", "int8", "onnxruntime", {}),
    ("openvino fp32", "float", "openvino", {}),
    ("openvino bf16", "float", "openvino", {"dtype": "bf16"}),
    ("openvino int8", "int8", "openvino", {}),
    ("openvino int8 + bf16", "int8", "openvino", {"dtype": "bf16"}),
]


def write(out: Path, seed: int = 0) -> None:
    """A pipeline folder around the real UNet."""
    torch.manual_seed(seed)
    parts = {
        "unet": UNet2DConditionModel(**topology("sd15-tiny").config),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=1, sample_size=512, scaling_factor=0.18215,
        ),
        "text_encoder": CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=768, num_attention_heads=12, num_hidden_layers=1, projection_dim=768,
        )),
        "scheduler": PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True,
            set_alpha_to_one=False,
        ),
    }  # fmt: skip
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    for name, model in parts.items():
        model.save_pretrained(out / name)
        index[name] = ["transformers" if name == "text_encoder" else "diffusers", type(model).__name__]
    shutil.copytree(DIGITS / "teacher" / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    (out / "model_index.json").write_text(json.dumps(index, indent=2))


def race(high: Path, low: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Median and least seconds of a UNet call per variant, taking turns; and the distance to eager float32."""
    engines, found = {}, {}
    for name, bundle, engine, options in VARIANTS:
        options = options if engine == "eager" else options | {"threads": threads}
        try:
            engines[name] = load_engine(high if bundle == "float" else low, "unet", engine, verify=False, **options)
        except UserError as error:
            found[name] = {"error": error.message}
    record = engines["eager fp32"].component
    feeds = {k: v.numpy() for k, v in example(record.inputs, {d: r.min for d, r in record.dims.items()}).items()}
    outputs = {name: torch.as_tensor(engine(**feeds)["out_sample"]).float().numpy() for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine(**feeds)
            times[name].append(time.perf_counter() - started)
            print(f"round {number + 1}, {name}: {times[name][-1]:.2f} s", flush=True)
    truth = outputs["eager fp32"]
    return found | {
        name: {
            "median_seconds": statistics.median(values), "least_seconds": min(values), "rounds": rounds,
            "relative_l2": relative_l2(outputs[name], truth), "description": engines[name].description,
        }
        for name, values in times.items()
    }  # fmt: skip


def per_layer(low: Path) -> dict[str, Any]:
    """Largest and median relative L2 of a layer against torch, for both graphs."""
    record, folder = Bundle.open(low).component("unet"), low / "unet"
    module = networks.rebuild(
        "unet", folder / "config.json", folder / "model.safetensors", record.inputs, record.outputs,
        record.int8["layers"],
    )  # fmt: skip
    feeds = example(record.inputs, {dim: limits.min for dim, limits in record.dims.items()})
    found = {}
    for file in ("model.onnx", FILE):
        int8_packed.set_outputs(module, file == FILE)
        errors = sorted(check.layers(folder / file, module.model, feeds, list(record.int8["layers"])).values())
        found[file] = {"layers": len(errors), "largest": errors[-1], "median": errors[len(errors) // 2]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--images", type=int, default=2)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    source, high, low = (args.out / name for name in ("source", "float32", "int8"))
    say = lambda stage, done: print(f"{done:4.0%} {stage}", flush=True)  # noqa: E731
    if not source.exists():
        write(source)
    sampler = {"name": "dmd2", "timesteps": [999, 749, 499, 249], "guidance": 0.0}
    if not high.exists():
        export_pipeline(source, high, profile="batch=1,size=512", sampler=sampler, progress=say,
                        components=("text_encoder", "unet", "vae_decoder"))  # fmt: skip
    if not low.exists():
        export_pipeline(high, low, precision="int8", int8=Options(images=args.images, judged=1), progress=say)
    record = Bundle.open(low).component("unet")
    size = {place.name: (place / "unet" / "model.safetensors").stat().st_size for place in (high, low)}
    found = {
        "machine": machine().as_dict(), "unet_bytes": size, "audit": record.int8["audit"], "layers": per_layer(low),
        "export": {key: record.parity[key] for key in ("relative_l2", "torch_relative_l2", FILE)},
        "verdict": record.int8["verdict"], "race": race(high, low, args.rounds, args.threads),
    }  # fmt: skip
    print(json.dumps({key: value for key, value in found.items() if key != "machine"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
