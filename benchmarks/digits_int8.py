"""What int8 costs the digits models: by calibration, right and wrong, by training, and on each engine.

    python benchmarks/digits_int8.py out/digits-int8 --write
    python benchmarks/digits_int8.py out/digits-int8 --models digits digits/tiny --skip trained --images 50
    python benchmarks/digits_int8.py out/digits-int8 --students my-1-step my-4-step

takes the teacher, tiny, and whichever few-step students are beside them. Each is exported in float32 and quantized in
several ways in torch (the arithmetic of the exported graphs), exported in int8 for every engine, and trained on for
`--qat-steps` updates with rounding, and as long without. `--images` images of the prompts of
`accel.distill.sources.digits.prompt_set` are evaluated: the share that shows the digit asked for, their Frechet
distance to held-out real digits, and the PSNR against float32's images from the same noise.

Every row is a file in the out folder: a run that was interrupted goes on. A model whose weights changed is another
model. `--write` makes benchmarks/digits-int8.json and the tables of docs/int8.md of the rows that are there. `--ship`
puts the int8 bundles of the few-step students beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch
from int8_ways import PROMPTS, ways

from accel.assets import DIGITS
from accel.bundle import Bundle, finalize
from accel.distill import recipes, registry, settings
from accel.distill.evaluation import digits as digits_quality
from accel.distill.run import execute
from accel.distill.sources import digits
from accel.engines import status
from accel.errors import Notice
from accel.export.int8.calibration import Calibration
from accel.export.int8.settings import Int8Settings
from accel.export.pipeline import export_pipeline
from accel.files import digest_of, write_json
from accel.int8 import fake_quant
from accel.int8.config import Int8Config
from accel.machine import machine
from accel.models.source import open_source
from accel.parity import psnr
from accel.pipeline import Pipeline, load

ROOT = Path(__file__).parents[1]
RESULT, PAGE = ROOT / "benchmarks/digits-int8.json", ROOT / "docs/int8.md"
TRUTH = "onnxruntime, float32"
FEW_STEPS = ("4step", "1step", "tiny-4step", "tiny-1step")
UNUSED = "vae_encoder"
ENGINES = ("onnxruntime", "openvino")
PARTS = ("torch", "engines", "trained")
FIRST_NOISE = 5_000_000


@dataclass(frozen=True)
class Model:
    """One pipeline, and the folder in which everything that is made of it lies."""

    name: str
    out: Path
    images: int

    @cached_property
    def folder(self) -> Path:
        weights = open_source(self.name).digest(["unet", "vae", "text_encoder"])
        return self.out / f"{re.sub('[^a-z0-9]+', '-', self.name.lower()).strip('-')}-{digest_of(weights)[:8]}"

    @property
    def few_steps(self) -> tuple[int, ...] | None:
        """A few-step student's timesteps."""
        own = open_source(self.name).sampler() or {}
        return tuple(own["timesteps"]) if "timesteps" in own else None

    def bundle(self, source: str, name: str, **options: Any) -> Path:
        """A bundle of a pipeline or another bundle, made once."""
        place = self.folder / name
        if not place.exists():
            say(f"{self.name}: exporting {name}")
            export_pipeline(source, place, **options)
        return place

    @property
    def high(self) -> Path:
        return self.bundle(self.name, "float32", profile="digits")

    @property
    def low(self) -> Path:
        return self.bundle(str(self.high), "int8", precision="int8", int8=Int8Settings(prompts=PROMPTS))

    @cached_property
    def pipeline(self) -> Pipeline:
        """In torch, for the ways that are no bundles."""
        return load(Bundle.open(self.high), "eager")

    @cached_property
    def truth(self) -> np.ndarray:
        path = self.folder / f"truth-{self.images}.npy"
        if not path.is_file():
            np.save(path, draw(load(self.high, "onnxruntime"), self.images))
        return np.load(path)

    def row(self, way: str, make: Callable[[], np.ndarray]) -> dict[str, Any]:
        """What is said of the images that `make` draws, from its file if it is there."""
        name = f"{re.sub('[^a-z0-9]+', '-', way.lower()).strip('-')}-{self.images}.json"
        path = self.folder / "rows" / name
        if not path.is_file():
            started = time.perf_counter()
            images = make()
            found = {"way": way, **evaluated(images), "psnr": min(psnr(images, self.truth, 1.0), 100.0)}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
            say(f"{self.name}, {way}: {json.dumps(found)} ({time.perf_counter() - started:.0f} s)")
        return json.loads(path.read_text())


def say(text: str) -> None:
    print(text, flush=True)


def draw(pipeline: Pipeline, images: int) -> np.ndarray:
    """Images of the prompt set from fixed noise, [n, 64, 64, 3] in 0..1."""
    texts, _ = zip(*digits.prompt_set(images // 10), strict=True)
    return Calibration(texts, FIRST_NOISE).run(pipeline)


def evaluated(images: np.ndarray) -> dict[str, float]:
    """What the classifier says of images of the prompt set."""
    _, wanted = zip(*digits.prompt_set(len(images) // 10), strict=True)
    return digits_quality.evaluate(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, torch.tensor(wanted))


# ------------------------------------------------------------------------------------------- by calibration, in torch


def in_torch(model: Model) -> list[dict[str, Any]]:
    few = model.few_steps is not None
    rows = []
    for way, config, give in ways(model.pipeline, few):

        def make(config: Int8Config = config, give: Callable = give) -> np.ndarray:
            unet = model.pipeline.engines["unet"].module.model
            fake_quant.attach(unet, config)
            try:
                give(unet, config)
                return draw(model.pipeline, model.images)
            finally:
                fake_quant.detach(unet)

        rows.append(model.row(way, make))
    return rows


# ------------------------------------------------------------------------------------------------------- other ways


def on_engines(model: Model) -> list[dict[str, Any]]:
    return [
        model.row(f"{engine}, {place.name}", lambda: draw(load(place, engine), model.images))  # noqa: B023
        for engine in ENGINES
        if status(engine).ok
        for place in (model.high, model.low)
        if (engine, place) != ("onnxruntime", model.high)  # which is the truth
    ]


def trained(model: Model, steps: int) -> list[dict[str, Any]]:
    """Trained on for int8, and as long without rounding, which may help by itself."""
    rows = []
    for qat, rows_of in (
        ("all", {"int8": "trained for int8"}),
        ("", {"float32": "trained as long, float32", "int8": "trained as long, then calibrated"}),
    ):
        kind = f"{'qat' if qat else 'plain'}-{steps}"
        pipeline = model.folder / kind
        for precision, way in rows_of.items():
            low = dict(precision="int8", int8=Int8Settings(components=("unet",), prompts=PROMPTS))
            options = low if precision == "int8" else {}

            def make() -> np.ndarray:
                if not pipeline.exists():  # noqa: B023
                    say(f"{model.name}: training {kind}")  # noqa: B023
                    if execute(training(model, qat, steps), pipeline).stopped:  # noqa: B023
                        raise KeyboardInterrupt
                name = f"{kind}-{precision}"  # noqa: B023
                place = model.bundle(str(pipeline), name, profile="digits", **options)  # noqa: B023
                return draw(load(place, "onnxruntime"), model.images)

            rows.append(model.row(f"{way} ({steps} updates)", make))
    return rows


def training(model: Model, qat: str, steps: int) -> settings.Recipe:
    """A few-step student goes on by DMD2 against the teacher that it came from, any other by fine-tuning."""
    common = dict(
        model=model.name,
        steps=steps,
        warmup=max(1, steps // 8),
        qat=qat,
        cache=str(model.out / "cache"),
        sample_every=0,
        log="none",
        checkpoint_every=max(1, steps // 2),
        ema=0.9,
    )
    if model.few_steps is not None:
        recipe = registry.recipe("digits_dmd2_1step" if len(model.few_steps) == 1 else "digits_dmd2")
        # The critic starts as the teacher, so it must learn what the student draws before it says where to go.
        return recipes.changed(recipe, **common, teacher="digits", learning_rate=1e-4, critic_warmup=30)
    digit = registry.recipe("digits_lora")
    fields = {
        name: getattr(digit, name)
        for name in (
            "data",
            "resolution",
            "random_flip",
            "cache_variants",
            "cache_dtype",
            "sample_guidance",
            "sample_prompts",
        )
    }
    return recipes.changed(
        settings.FinetuneRecipe(), **fields, **common, batch=32, learning_rate=1e-4, save_dtype="float16"
    )


# --------------------------------------------------------------------------------------------------------- the result


def compare(model: Model, parts: tuple[str, ...], qat_steps: int) -> dict[str, Any]:
    """All rows of one model; what is in the out folder is not made again."""
    rows = [model.row(TRUTH, lambda: model.truth)]
    if "torch" in parts:
        rows += in_torch(model)
    if "engines" in parts:
        rows += on_engines(model)
    if "trained" in parts:
        rows += trained(model, qat_steps)
    bundle = Bundle.open(model.low)
    size = {
        place.name: sum(p.stat().st_size for p in (place / "unet").glob("*.safetensors"))
        for place in (model.high, model.low)
    }
    return {
        "model": model.name,
        "sampler": dict(bundle.manifest.sampler),
        "images": model.images,
        "rows": rows,
        "unet_bytes": size,
        "int8": {
            name: {key: record.int8[key] for key in ("acceptance", "audit")}
            if record.int8
            else {"tried": record.parity.get("int8_tried")}
            for name, record in bundle.manifest.components.items()
        },
    }


def tables(models: list[Mapping[str, Any]]) -> str:
    """Quality by way, then speed by engine."""
    names = [model["model"] for model in models]
    by_way: dict[str, dict[str, str]] = {}
    for model in models:
        for row in model["rows"]:
            cell = f"{row['prompt_accuracy']:.1%}, {row['frechet_distance']:.1f}"
            if row["psnr"] < 100:
                cell += f", {row['psnr']:.1f} dB"
            by_way.setdefault(row["way"], {})[model["model"]] = cell
    heads = [f"{model['model']}, {model['images']} images" for model in models]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {way} | {' | '.join(cells.get(name, '') for name in names)} |" for way, cells in by_way.items()]
    lines += [
        "",
        "| model | UNet's weights, MB | engine | UNet float32, ms | int8, ms | | layers in int8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in models:
        unet, size = model["int8"]["unet"], model["unet_bytes"]
        for engine, entry in unet["acceptance"]["engines"].items():
            line = f"| {model['model']} | {size['float32'] / 1e6:.1f} to {size['int8'] / 1e6:.1f} | {engine} | "
            if "error" in entry:
                lines.append(f"{line}{entry['error']} | | | |")
                continue
            seconds = f"{entry['float_seconds'] * 1e3:.1f} | {entry['int8_seconds'] * 1e3:.1f} | "
            lines.append(f"{line}{seconds}{entry['speedup']:.2f}x | {unet['audit'][engine]['share']:.0%} |")
    return "\n".join(lines)


def write(models: list[dict[str, Any]], threads: int) -> None:
    """JSON and tables; models that an earlier run wrote stay, unless they are here again."""
    new = {model["model"] for model in models}
    earlier = json.loads(RESULT.read_text())["models"] if RESULT.is_file() else []
    models = [model for model in earlier if model["model"] not in new] + models
    write_json(
        RESULT,
        {
            "schema": "accel-digits-int8/1",
            "command": "python benchmarks/digits_int8.py out/digits-int8 --write",
            "machine": machine().as_dict(),
            "threads": threads,
            "models": models,
        },
    )
    pages.put(PAGE, "digits-int8", tables(models))


def ship(model: Model) -> None:
    """Put the int8 bundle of a few-step student beside it, without what drawing from prompts does not need."""
    target = DIGITS / f"{model.name.removeprefix('digits/')}-int8"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(model.low, target, ignore=shutil.ignore_patterns(UNUSED))
    manifest = Bundle.open(model.low).manifest
    parts = {name: record for name, record in manifest.components.items() if name != UNUSED}
    finalize(target, replace(manifest, components=parts))


def shipped() -> list[str]:
    """The teacher, tiny, and the few-step students that are there."""
    return ["digits", "digits/tiny", *(f"digits/{name}" for name in FEW_STEPS if (DIGITS / name).is_dir())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="*", help="out of: " + ", ".join(shipped()))
    parser.add_argument("--students", nargs="*", default=[], metavar="PATH", help="further pipelines")
    parser.add_argument("--skip", nargs="*", default=[], choices=PARTS)
    parser.add_argument("--images", type=int, default=500, help="a multiple of 10 (default: 500)")
    parser.add_argument("--qat-steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="put the int8 bundles of the few-step students beside them")
    parser.add_argument("--write", action="store_true", help="write benchmarks/digits-int8.json and docs/int8.md")
    args = parser.parse_args()
    if args.images < 10 or args.images % 10:
        parser.error("--images is a multiple of 10")
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", Notice)
    args.out.mkdir(parents=True, exist_ok=True)
    names = [*(shipped() if args.models is None else args.models), *args.students]
    parts = tuple(part for part in PARTS if part not in args.skip)
    found = [compare(Model(name, args.out, args.images), parts, args.qat_steps) for name in names]
    for name in names if args.ship else ():
        if name in {f"digits/{student}" for student in FEW_STEPS}:
            ship(Model(name, args.out, args.images))
    if args.write:
        write(found, args.threads)
    else:
        print(tables(found))


if __name__ == "__main__":
    main()
