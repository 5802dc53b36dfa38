"""What distillation is worth on digits: students with and without it, at the same number of steps.

    python benchmarks/digits_students.py --out out/digits-students

trains every row of the table (about an hour on two CPU threads; a run that was interrupted goes on), draws 500 images
with each as `accel evaluate --protocol digits` does, and writes benchmarks/digits-students.json and
docs/digits-students.png. `--ship` puts the rows `tiny` and `small` beside the shipped teacher, with a card and figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pages
import torch
from safetensors import safe_open

from accel import machine
from accel.assets import DIGITS
from accel.distill import recipes, registry
from accel.distill.evaluation import digits as digits_quality
from accel.distill.from_nothing.parts import load
from accel.distill.run import execute
from accel.distill.sources import digits
from accel.files import write_json

ROOT = Path(__file__).parents[1]
NO_TEACHER = dict(output_weight=0.0, feature_weight=0.0)

# Row -> (recipe, fields that differ from it, what it shows).
ROWS = {
    "tiny": ("digits_tiny", {}, "task + output + features"),
    "tiny-copied": ("digits_tiny", NO_TEACHER, "task only"),
    "tiny-random": ("digits_tiny", dict(init="random", **NO_TEACHER), "task only, from random weights"),
    "small": ("digits_small", {}, "task + output + features"),
    "small-copied": ("digits_small", NO_TEACHER, "task only"),
    "small-random": ("digits_small", dict(init="random", **NO_TEACHER), "task only, from random weights"),
    "tiny-100": ("digits_tiny", dict(steps=100), "task + output + features"),
    "tiny-copied-100": ("digits_tiny", dict(steps=100, **NO_TEACHER), "task only"),
    "tiny-random-100": ("digits_tiny", dict(steps=100, init="random", **NO_TEACHER), "task only, from random weights"),
    "tiny-output": ("digits_tiny", dict(feature_weight=0.0), "task + output"),
    "tiny-feature": ("digits_tiny", dict(output_weight=0.0), "task + features"),
    "tiny-segmind": ("digits_tiny", dict(features="segmind"), "task + output + Segmind's features"),
    "tiny-random-kd": ("digits_tiny", dict(init="random"), "task + output + features, from random weights"),
}


def quality(folder: Path, guidance: float, steps: int) -> dict:
    """500 images, the teacher's sampler and guidance."""
    texts, wanted = zip(*digits.prompt_set(digits.HELD_OUT_PER_DIGIT), strict=True)
    images = digits_quality.generate(load(folder), list(texts), guidance, steps)
    return digits_quality.evaluate(images, torch.tensor(wanted))


def unet_parameters(folder: Path) -> int:
    with safe_open(folder / "unet/diffusion_pytorch_model.safetensors", "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())


def run_row(name: str, out: Path, sampler: dict) -> dict:
    kind, fields, shows = ROWS[name]
    recipe = recipes.changed(registry.recipe(kind), cache=str(out / "cache"), sample_every=0, log="none", **fields)
    folder, result = out / name, out / f"{name}.json"
    if result.is_file():
        return json.loads(result.read_text())
    if not folder.exists():
        outcome = execute(recipe, folder)
        if outcome.stopped:
            raise KeyboardInterrupt
    record = json.loads((folder / "training.json").read_text())
    row = dict(
        name=name,
        student=recipe.student,
        init=recipe.init,
        losses=shows,
        steps=recipe.steps,
        features=recipe.features if recipe.feature_weight else None,
        seconds_per_step=record["seconds_per_step"],
        **quality(folder, sampler["guidance"], sampler["steps"]),
    )
    write_json(result, row)
    print(row, flush=True)
    return row


def ship(row: dict, folder: Path, sampler: dict, teacher: dict) -> None:
    """Put a student beside the teacher: its pipeline, its figures, its card."""
    target = DIGITS / row["name"]
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    record = json.loads((target / "training.json").read_text())
    record["recipe"] |= {"cache": "auto", "log": "auto", "sample_every": 100}  # free to choose; as in the command
    write_json(target / "training.json", record)
    write_json(target / "quality.json", row | {"sampler": sampler, "frechet_floor": teacher["frechet_floor"]})
    (target / "README.md").write_text(student_card(row, record, sampler, teacher))


def plot(rows: list[dict], teacher: dict, path: Path) -> None:
    shown = [
        (
            f"{row['student']}, {row['steps']} steps: {row['losses']}",
            row["frechet_distance"],
            f"{row['frechet_distance']:.1f}   {row['prompt_accuracy']:.1%}",
            "#a0aec0" if row["losses"].startswith("task only") else "#2b6cb0",
        )
        for row in rows
    ]
    wanted = teacher["frechet_distance"]
    pages.bars(
        path,
        shown,
        "Digits students: blue with a teacher, grey without; beside the bar, prompt accuracy",
        "Frechet distance to held-out real digits (lower is better)",
        line=(wanted, f"teacher {wanted:.1f}"),
    )


def table(rows: list[dict], teacher: dict) -> str:
    lines = [
        "| student | start | losses | steps | prompt accuracy | Frechet distance |",
        "|---|---|---|---|---|---|",
        f"| *teacher* | | | | {teacher['prompt_accuracy']:.1%} | {teacher['frechet_distance']:.2f} |",
    ]
    for row in rows:
        start = {"copy": "teacher's weights", "random": "random weights"}[row["init"]]
        losses = row["losses"].replace(", from random weights", "")
        lines.append(
            f"| {row['student']} | {start} | {losses} | {row['steps']} | {row['prompt_accuracy']:.1%} "
            f"| {row['frechet_distance']:.2f} |"
        )
    floor = teacher["frechet_floor"]
    return "\n".join([*lines, f"| *real images (the floor)* | | | | | {floor:.2f} |"])


def student_card(row: dict[str, Any], record: dict[str, Any], sampler: dict[str, Any], teacher: dict[str, Any]) -> str:
    """README.md of a student's folder, from its figures, its training record and the teacher's figures."""
    name, recipe = row["name"], record["recipe"]
    minutes = record["steps"] * record["seconds_per_step"] / 60
    return f"""---
pipeline_tag: text-to-image
library_name: diffusers
---

# Digits {name}

The digits teacher with blocks removed as in BK-SDM-{name.title()} (arXiv 2305.15798) and distilled with its three
losses: task, output, features. It draws 64x64 images for prompts such as "a handwritten seven".

```python
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{name}")
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe("a handwritten seven", height=64, width=64, num_inference_steps={sampler["steps"]}, \
guidance_scale={sampler["guidance"]})
```

## Training

`accel distill {name} --recipe digits_{name} --out out/digits-{name}`: {record["steps"]} steps of {recipe["batch"]}, \
{minutes:.0f} minutes on {record["threads"]} CPU threads of a busy machine. `training.json` has every setting.

## Figures

{row["images"]} images, DPM++ 2M, {sampler["steps"]} steps, guidance {sampler["guidance"]}; the teacher's settings.

| | {name} | teacher |
|---|---|---|
| UNet parameters | {row["parameters"]:,} | {teacher["parameters"]["unet"]:,} |
| prompt accuracy | {row["prompt_accuracy"]:.1%} | {teacher["prompt_accuracy"]:.1%} |
| Frechet distance to 500 held-out real images | {row["frechet_distance"]:.2f} | {teacher["frechet_distance"]:.2f} |

The distance is taken in the features of the classifier that ships beside this folder; two sets of real images are
{teacher["frechet_floor"]:.2f} apart. Data, licence of the data and limits are the teacher's.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits-students"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ship", action="store_true", help="put tiny and small into accel/assets/digits")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sampler = json.loads((DIGITS / "teacher/sampler.json").read_text())
    teacher = json.loads((DIGITS / "teacher/quality.json").read_text())
    rows = [run_row(name, args.out, sampler) for name in args.rows]
    rows = [row | {"parameters": unet_parameters(args.out / row["name"])} for row in rows]
    for row in rows if args.ship else ():
        if row["name"] in ("tiny", "small"):
            ship(row, args.out / row["name"], sampler, teacher)
    if set(args.rows) == set(ROWS):
        document = dict(
            schema="accel-digits-students/1",
            command="python benchmarks/digits_students.py",
            machine=dataclasses.asdict(machine.machine()),
            threads=args.threads,
            sampler=sampler,
            teacher={key: teacher[key] for key in ("prompt_accuracy", "frechet_distance", "frechet_floor", "images")},
            rows=rows,
        )
        write_json(ROOT / "benchmarks/digits-students.json", document)
        plot(rows, document["teacher"], ROOT / "docs/digits-students.png")
        pages.put(ROOT / "docs/distill.md", "digits-students", table(rows, document["teacher"]))


if __name__ == "__main__":
    main()
