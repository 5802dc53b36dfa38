"""The SD-Tiny UNet at real size in int8, with random weights: speed per engine, share of int8, parity per layer.

    python benchmarks/sd_tiny_int8.py out/sd-tiny-int8 --threads 1 --write

512 px (latents of 64 x 64), batch 1. Speed and parity per layer do not depend on what weights have learned; images
do, and are not evaluated. Text encoder and VAE are narrow: they only feed the UNet.

Every step and every timed call is kept in the out folder: a run that was interrupted goes on. `--write` makes
benchmarks/sd-tiny-int8.json and the table of docs/int8.md. `--narrow` tries everything on a network of toy size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pages
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from accel.assets import DIGITS
from accel.bundle import Bundle
from accel.engines import Engine, load_engine, onnxruntime
from accel.errors import UserError
from accel.export.graph import check
from accel.export.graph.trace import example
from accel.export.graph.uint8 import FILE
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.files import write_json
from accel.int8 import packed
from accel.int8.config import Int8Config
from accel.machine import machine
from accel.models import networks
from accel.models.topology import narrowed, topology
from accel.parity import relative_l2

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/sd-tiny-int8.json", ROOT / "docs/int8.md"
SAMPLER = {"name": "dmd2", "timesteps": [999, 749, 499, 249], "guidance": 0.0}
# What is to be shown: the best engine's speed over the best float32, and distances over fake quantization's own.
FASTER, FARTHER = 2.5, 1.2


@dataclass(frozen=True)
class Variant:
    """One way to run the UNet.

    Attributes:
        bundle: float32, or one of `LEVELS`.
        options: the engine's.
        signed: on ONNX Runtime, the canonical graph instead of the one derived for it.
        like: the variant in torch whose distance to float32 an int8 one is compared with.
        timed: whether its speed is of interest.
    """

    engine: str
    bundle: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)
    signed: bool = False
    like: str = ""
    timed: bool = True


TRUTH = "eager fp32"
FAKE, FAKE_OUTPUTS = "torch, rounding", "torch, rounding outputs too"
FAKE_ATTENTION, FAKE_BOTH = "torch, rounding attention too", "torch, rounding attention and outputs too"
# Bundle -> its level: every layer with weights, and the products of self-attention too.
LEVELS = {"int8": "all", "int8-attention": "attention"}
VARIANTS = {
    TRUTH: Variant("eager"),
    "eager bf16": Variant("eager", options={"dtype": "bf16"}),
    "compile fp32": Variant("compile"),
    "compile bf16": Variant("compile", options={"dtype": "bf16"}),
    FAKE: Variant("eager", "int8", timed=False),
    FAKE_OUTPUTS: Variant("eager", "int8", timed=False),
    FAKE_ATTENTION: Variant("eager", "int8-attention", timed=False),
    FAKE_BOTH: Variant("eager", "int8-attention", timed=False),
    "onnxruntime fp32": Variant("onnxruntime"),
    "onnxruntime int8": Variant("onnxruntime", "int8", signed=True, like=FAKE),
    "onnxruntime uint8": Variant("onnxruntime", "int8", like=FAKE_OUTPUTS),
    "onnxruntime uint8, attention too": Variant("onnxruntime", "int8-attention", like=FAKE_BOTH),
    "openvino fp32": Variant("openvino"),
    "openvino bf16": Variant("openvino", options={"dtype": "bf16"}),
    "openvino int8": Variant("openvino", "int8", like=FAKE),
    "openvino int8, attention too": Variant("openvino", "int8-attention", like=FAKE_ATTENTION),
    "openvino int8 + bf16": Variant("openvino", "int8", options={"dtype": "bf16"}, like=FAKE),
}


def write_pipeline(out: Path, narrow: bool) -> None:
    """A pipeline folder around the real UNet, or a narrow one."""
    torch.manual_seed(0)
    config = narrowed("sd15-tiny", (32, 64, 64), sample_size=16) if narrow else topology("sd15-tiny").config
    parts = {
        "unet": UNet2DConditionModel(**config),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            sample_size=512,
            scaling_factor=0.18215,
        ),
        "text_encoder": CLIPTextModel(
            CLIPTextConfig(
                hidden_size=768, intermediate_size=768, num_attention_heads=12, num_hidden_layers=1, projection_dim=768
            )
        ),
        "scheduler": PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            skip_prk_steps=True,
            set_alpha_to_one=False,
        ),
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    for name, model in parts.items():
        model.save_pretrained(out / name)
        index[name] = ["transformers" if name == "text_encoder" else "diffusers", type(model).__name__]
    shutil.copytree(DIGITS / "teacher" / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    (out / "model_index.json").write_text(json.dumps(index, indent=2))


def load(variant: Variant, out: Path, threads: int) -> Engine:
    options = variant.options if variant.engine in ("eager", "compile") else variant.options | {"threads": threads}
    bundle = Bundle.open(out / variant.bundle)
    if variant.signed:
        record = bundle.component("unet")
        return onnxruntime.load(bundle, replace(record, int8=dict(record.int8) | {"graphs": {}}), **options)
    return load_engine(bundle, "unet", variant.engine, verify=False, **options)


def benchmark(out: Path, rounds: int, threads: int, kept: Path) -> dict[str, Any]:
    """Seconds of a UNet call per variant, taking turns, and the distance to eager float32; kept call by call."""
    found: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    seconds = lambda name: found.setdefault(name, {}).setdefault("seconds", [])  # noqa: E731
    wanted = {
        name: variant
        for name, variant in VARIANTS.items()
        if "error" not in found.get(name, {})
        and (name == TRUTH or "relative_l2" not in found.get(name, {}) or variant.timed and len(seconds(name)) < rounds)
    }
    if set(wanted) == {TRUTH} and len(seconds(TRUTH)) >= rounds:
        return found
    engines, truth = {}, None
    for name, variant in wanted.items():
        print(f"loading {name}", flush=True)
        try:
            engine = load(variant, out, threads)
            if name in (FAKE_OUTPUTS, FAKE_BOTH):
                packed.set_outputs(engine.module, True)
            record = engine.component
            sizes = {dim: limits.min for dim, limits in record.dims.items()}
            feeds = {key: value.numpy() for key, value in example(record.inputs, sizes).items()}
            made = torch.as_tensor(engine(**feeds)["out_sample"]).float().numpy()  # and the first call, untimed
        except (UserError, RuntimeError) as error:  # torch.compile without a compiler, for one
            found[name] = {"error": str(error).splitlines()[0]}
            write_json(kept, found)
            continue
        truth = made if name == TRUTH else truth
        seconds(name)
        found[name] |= {"relative_l2": relative_l2(made, truth), "description": engine.description}
        write_json(kept, found)
        if variant.timed:
            engines[name] = engine
        else:
            engine.close()
    for number in range(rounds):
        for name, engine in engines.items():
            if len(seconds(name)) > number:
                continue
            started = time.perf_counter()
            engine(**feeds)
            seconds(name).append(time.perf_counter() - started)
            write_json(kept, found)
            print(f"round {number + 1} of {rounds}, {name}: {seconds(name)[-1]:.2f} s", flush=True)
    return found


def per_layer(low: Path) -> dict[str, Any]:
    """Largest and median relative L2 of a layer against torch, for both graphs."""
    record, folder = Bundle.open(low).component("unet"), low / "unet"
    module = networks.rebuild(
        "unet",
        folder / "config.json",
        folder / "model.safetensors",
        record.inputs,
        record.outputs,
        record.int8["layers"],
    )
    feeds = example(record.inputs, {dim: limits.min for dim, limits in record.dims.items()})
    found = {}
    for file in ("model.onnx", FILE):
        packed.set_outputs(module, file == FILE)
        errors = sorted(check.layers(folder / file, module.model, feeds, list(record.int8["layers"])).values())
        found[file] = {"layers": len(errors), "largest": errors[-1], "median": errors[len(errors) // 2]}
    return found


def figures(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, speed over eager and over the best float32 engine, and distance over fake quantization's own."""
    median = {name: statistics.median(row["seconds"]) for name, row in measured.items() if row.get("seconds")}
    plain = min(value for name, value in median.items() if name.endswith("fp32"))
    rows = {}
    for name, row in measured.items():
        like = measured.get(VARIANTS[name].like, {}).get("relative_l2")
        rows[name] = {key: row[key] for key in ("error", "relative_l2", "description") if key in row}
        if name in median:
            rows[name] |= {
                "median_seconds": median[name],
                "least_seconds": min(row["seconds"]),
                "over_eager": median[TRUTH] / median[name],
                "over_best_fp32": plain / median[name],
            }
        if like and "relative_l2" in row:
            rows[name]["over_fake_quantization"] = row["relative_l2"] / like
    return rows


def table(found: dict[str, Any]) -> str:
    lines = [
        "| | seconds | over eager | over the best float32 | distance to float32 | over torch's own rounding |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["rows"].items():
        cells = [f"{row['median_seconds']:.2f}" if "median_seconds" in row else row.get("error", "not measured")]
        cells += [f"{row[key]:.2f}x" if key in row else "" for key in ("over_eager", "over_best_fp32")]
        cells += [f"{row['relative_l2']:.1e}" if "relative_l2" in row else ""]
        cells += [f"{row['over_fake_quantization']:.2f}x" if "over_fake_quantization" in row else ""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    best = max((row.get("over_best_fp32", 0.0) for name, row in found["rows"].items() if "int8" in name), default=0.0)
    far = max((row.get("over_fake_quantization", 0.0) for row in found["rows"].values()), default=0.0)
    about = [
        f"`{name}`: layers in int8: "
        + ", ".join(f"{engine} {audit['share']:.0%}" for engine, audit in low["audit"].items())
        + "; each layer against torch's: "
        + "; ".join(
            f"{file}: {entry['layers']} layers, median {entry['median']:.1e}, largest {entry['largest']:.1e}"
            for file, entry in low["layers"].items()
        )
        for name, low in found["bundles"].items()
    ]
    return "\n".join(
        [
            *lines,
            "",
            *(f"{line}.\n" for line in about),
            f"(One step of an output's rounding is not an error.) The best int8 is {best:.2f}x as fast as the best "
            f"float32 (wanted: {FASTER}x); the largest distance to float32 is {far:.2f}x that of torch's own rounding "
            f"(wanted: at most {FARTHER}x).",
        ]
    )


def low_bundle(args: argparse.Namespace, name: str, say: Callable[[str, float], None]) -> dict[str, Any]:
    """An int8 bundle of `LEVELS`, made once, and what is known of it."""
    low, layers = args.out / name, args.out / f"{name}-layers.json"
    if not low.exists():
        options = Int8Settings(
            Int8Config(level=LEVELS[name]),
            images=args.images,
            evaluation_images=1,
            components=("unet",),
            threads=args.threads,
        )
        export_pipeline(args.out / "float32", low, precision="int8", int8=options, progress=say)
    if not layers.exists():
        print(f"{name}: every layer against torch's", flush=True)
        write_json(layers, per_layer(low))
    record = Bundle.open(low).component("unet")
    return {
        "level": LEVELS[name],
        "unet_bytes": unet_bytes(low),
        "audit": dict(record.int8["audit"]),
        "layers": json.loads(layers.read_text()),
        "acceptance": record.int8["acceptance"],
        "export": {key: record.parity[key] for key in ("relative_l2", "torch_relative_l2", FILE)},
    }


def unet_bytes(bundle: Path) -> int:
    return (bundle / "unet" / "model.safetensors").stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=2, help="images to calibrate on (default: 2)")
    parser.add_argument("--narrow", action="store_true", help="a network of toy size")
    parser.add_argument("--write", action="store_true", help="write benchmarks/sd-tiny-int8.json and docs/int8.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source, high = args.out / "source", args.out / "float32"
    say = lambda stage, done: print(f"{done:4.0%} {stage}", flush=True)  # noqa: E731
    if not (source / "model_index.json").exists():  # it is written last
        write_pipeline(source, args.narrow)
    if not high.exists():
        export_pipeline(
            source,
            high,
            profile=f"batch=1,size={128 if args.narrow else 512}",
            sampler=SAMPLER,
            progress=say,
            components=("text_encoder", "unet", "vae_decoder"),
        )
    bundles = {name: low_bundle(args, name, say) for name in LEVELS}
    found = {
        "schema": "accel-sd-tiny-int8/2",
        "machine": machine().as_dict(),
        "threads": args.threads,
        "narrow": args.narrow,
        "bundles": bundles,
        "float32_unet_bytes": unet_bytes(high),
        "rows": figures(benchmark(args.out, args.rounds, args.threads, args.out / "race.json")),
    }
    print(table(found))
    if args.write:
        write_json(RESULT, found)
        pages.put(PAGE, "sd-tiny-int8", table(found))


if __name__ == "__main__":
    main()
