"""What few-step distillation is worth on digits, over several seeds, and which of its parts matter.

    python benchmarks/digits_dmd2.py --out out/digits-dmd2 --rows 4step 1step --seeds 0 1 2

trains every row that is not there yet (ten to thirty minutes each on one CPU thread; two side by side on two cores:
run it twice with different rows; a run that was interrupted goes on), draws 500 images with each in its own steps,
and with the undistilled networks in the same ones. `--write` adds them to benchmarks/digits-dmd2.json (rows of a
recipe that has changed since then go), and makes docs/digits-dmd2.png and the table of docs/dmd2.md of all that it
holds, and docs/digits-dmd2-pictures.png of what ships. `--ship` puts seed 0 of the four students beside the teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pages
import torch

from accel import machine
from accel.assets import DIGITS, resolve
from accel.bench.contact_sheet import contact_sheet
from accel.distill import recipes, registry
from accel.distill.digits.card import digit_sheet
from accel.distill.evaluation import digits as digits_quality
from accel.distill.from_nothing.parts import load
from accel.distill.run import execute
from accel.distill.sources import digits
from accel.distill.training import speed
from accel.distill.training.checkpoints import as_before
from accel.files import digest_of, write_json
from accel.models.source import open_source

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/digits-dmd2.json"
TINY = dict(model="digits/tiny", teacher="digits")

# Row -> (recipe, fields that differ from it, what it shows).
ROWS: dict[str, tuple[str, dict, str]] = {
    "1step": ("digits_dmd2_1step", {}, "1 step"),
    "4step": ("digits_dmd2", {}, "4 steps"),
    "tiny-1step": ("digits_dmd2_1step", TINY, "tiny, 1 step"),
    "tiny-4step": ("digits_dmd2", dict(model="digits/tiny-1step"), "tiny, 4 steps"),
    "1step-no-gan": ("digits_dmd2_1step", dict(adversarial_weight=0.0), "1 step without the GAN"),
    "1step-one-scale": (
        "digits_dmd2_1step",
        dict(ratio=1, critic_learning_rate=3e-4),
        "1 step without two time scales",
    ),
    "1step-small-batch": ("digits_dmd2_1step", dict(batch=8), "1 step, batches of 8"),
    "4step-from-teacher": ("digits_dmd2", dict(model="digits"), "4 steps, not from 1"),
    "4step-small-batch": ("digits_dmd2", dict(batch=32), "4 steps, 8 images a step"),
    "4step-real-inputs": ("digits_dmd2", dict(backward_simulation=False), "4 steps without backward simulation"),
    "4step-published": (
        "digits_dmd2",
        dict(mixed_steps=False, step_aware=False),
        "4 steps, one step a batch, as published",
    ),
}
# What no weight depends on, and later fields that these rows leave at what was always done.
BESIDE = ("cache", "log", "sample_every", "checkpoint_every", "keep", "workers", "tf32", "channels_last", "fused")
BESIDE += ("vae_batch", "vae_dtype", "half_norms")
SHIPPED = ("1step", "4step", "tiny-1step", "tiny-4step")
# Undistilled networks in the students' steps, and the teacher as it is meant to be used.
BASELINES = {
    "teacher, 25 steps, guidance 1.5": ("teacher", None, 1.5),
    "teacher, 25 steps, guidance 3": ("teacher", None, 3.0),
    "teacher, 4 steps": ("teacher", (999, 749, 499, 249), 0.0),
    "teacher, 1 step": ("teacher", (999,), 0.0),
    "tiny, 4 steps, not distilled": ("tiny", (999, 749, 499, 249), 0.0),
    "tiny, 1 step, not distilled": ("tiny", (999,), 0.0),
}


def draw_images(
    folder: Path, timesteps: tuple[int, ...] | None, guidance: float, seed: int, each: int = digits.HELD_OUT_PER_DIGIT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [10 each, 3, 64, 64] in -1..1, and the digits asked for; by LCMScheduler where timesteps are given."""
    texts, wanted = zip(*digits.prompt_set(each), strict=True)
    pipeline = load(folder)
    if timesteps is None:
        return digits_quality.generate(pipeline, list(texts), guidance, seed=seed), torch.tensor(wanted)
    from diffusers import LCMScheduler

    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    made = digits_quality.generate(pipeline, list(texts), guidance, seed=seed, timesteps=list(timesteps))
    return made, torch.tensor(wanted)


def first_noise(seed: int) -> int:
    """The first image's noise in the judgement of a seed: no two seeds share any."""
    return seed * 100_000


def weights(model: str) -> str:
    """Digest of the UNet of a shipped pipeline (`digits`, `digits/tiny`): retrained, it is another start."""
    if not resolve(model).is_dir():
        raise SystemExit(f"{model} is not shipped yet\n  try: --rows {Path(model).name} --seeds 0 --ship")
    return open_source(model).digest(["unet"])


@functools.cache
def digest(name: str) -> str:
    """Of what a row trains from what, or draws with: one that was made otherwise is another row."""
    if name in BASELINES:
        folder, timesteps, guidance = BASELINES[name]
        settings: dict[str, Any] = dict(weights=[weights(f"digits/{folder}")], timesteps=timesteps, guidance=guidance)
    else:
        kind, fields, _ = ROWS[name]
        settings = decisive(recipes.changed(registry.recipe(kind), **fields))
    return digest_of(settings)[:12]


def decisive(recipe: Any) -> dict[str, Any]:
    """What the weights of a training depend on."""
    recipe = speed.settled(recipe, torch.device("cpu"))
    settings = {name: value for name, value in as_before(recipe).items() if name not in BESIDE}
    return settings | {"weights": [weights(recipe.model), weights(recipe.teacher or recipe.model)]}


def stem(name: str, seed: int) -> str:
    return f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{digest(name)}"


def run_row(name: str, seed: int, out: Path) -> dict:
    kind, fields, shows = ROWS[name]
    recipe = recipes.changed(
        registry.recipe(kind), seed=seed, cache=str(out / "cache"), sample_every=0, log="none", **fields
    )
    folder = out / stem(name, seed)
    result = folder.with_name(folder.name + ".json")
    if result.is_file():
        return json.loads(result.read_text())
    if not folder.exists() and execute(recipe, folder).stopped:
        raise KeyboardInterrupt
    record = json.loads((folder / "training.json").read_text())
    timesteps = json.loads((folder / "sampler.json").read_text())["timesteps"]
    images, wanted = draw_images(folder, tuple(timesteps), 0.0, first_noise(seed))
    digit_sheet(images[:50]).save(folder.with_name(folder.name + ".png"))
    row = dict(
        name=name,
        shows=shows,
        seed=seed,
        recipe=digest(name),
        timesteps=timesteps,
        steps=record["steps"],
        seconds_per_step=record["seconds_per_step"],
        **digits_quality.evaluate(images, wanted),
    )
    write_json(result, row)
    print(row, flush=True)
    return row


def baseline(name: str, seed: int, out: Path) -> dict:
    folder, timesteps, guidance = BASELINES[name]
    result = out / f"{stem(name, seed)}.json"
    if result.is_file():
        return json.loads(result.read_text())
    images, wanted = draw_images(DIGITS / folder, timesteps, guidance, first_noise(seed))
    row = dict(name=name, shows=name, seed=seed, recipe=digest(name), **digits_quality.evaluate(images, wanted))
    out.mkdir(parents=True, exist_ok=True)
    write_json(result, row)
    print(row, flush=True)
    return row


def ship(row: dict, folder: Path, baselines: list[dict]) -> None:
    target = DIGITS / row["name"]
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    record = json.loads((target / "training.json").read_text())
    kind, fields, _ = ROWS[row["name"]]
    asked = dataclasses.asdict(recipes.changed(registry.recipe(kind), **fields))
    record["recipe"] |= {name: asked[name] for name in ("cache", "log", "sample_every")}  # as the command has them
    write_json(target / "training.json", record)
    write_json(target / "quality.json", row)
    (target / "README.md").write_text(few_step_card(row, record, baselines))


def with_earlier(rows: list[dict]) -> list[dict]:
    """And what an earlier run has written, where it still holds; in the order of the tables."""
    earlier = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    known = {(row["name"], row["seed"]): row for row in earlier + rows}
    names = [*BASELINES, *ROWS]
    found = [row for row in known.values() if row["name"] in names and row["recipe"] == digest(row["name"])]
    return sorted(found, key=lambda row: (names.index(row["name"]), row["seed"]))


def summary(rows: list[dict]) -> list[dict]:
    """One line per name: mean and range over seeds."""
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [row for row in rows if row["name"] == name]
        distance = [row["frechet_distance"] for row in found]
        lines.append(
            dict(
                name=name,
                shows=found[0]["shows"],
                seeds=len(found),
                frechet_distance=statistics.mean(distance),
                least=min(distance),
                largest=max(distance),
                prompt_accuracy=statistics.mean(row["prompt_accuracy"] for row in found),
                least_accuracy=min(row["prompt_accuracy"] for row in found),
            )
        )
    return lines


def table(lines: list[dict]) -> str:
    head = ["| | seeds | Frechet distance (range) | prompt accuracy (least) |", "|---|---|---|---|"]
    return "\n".join(
        head
        + [
            f"| {line['shows']} | {line['seeds']} | {line['frechet_distance']:.2f} ({line['least']:.2f} to "
            f"{line['largest']:.2f}) | {line['prompt_accuracy']:.1%} ({line['least_accuracy']:.1%}) |"
            for line in lines
        ]
    )


def plot(lines: list[dict], path: Path) -> None:
    rows = [
        (
            line["shows"],
            line["frechet_distance"],
            f"{line['frechet_distance']:.1f}   {line['prompt_accuracy']:.1%}",
            "#a0aec0" if line["name"] in BASELINES else "#2b6cb0",
        )
        for line in lines
    ]
    pages.bars(
        path,
        rows,
        "Digits in few steps: grey not distilled, blue distilled; beside the bar, prompt accuracy",
        "Frechet distance to held-out real digits (lower is better); the line is the range over seeds",
        ranges=[(line["least"], line["largest"]) for line in lines],
    )


def gallery(path: Path) -> None:
    """A row of ten digits for each baseline and each shipped student, all from the same noise."""
    rows = {name: (DIGITS / folder, timesteps, guidance) for name, (folder, timesteps, guidance) in BASELINES.items()}
    for name in SHIPPED:
        if (DIGITS / name).is_dir():
            timesteps = json.loads((DIGITS / name / "sampler.json").read_text())["timesteps"]
            rows[f"{ROWS[name][2]}, distilled"] = (DIGITS / name, tuple(timesteps), 0.0)
    made = {label: digits.pixels(draw_images(*row, seed=0, each=1)[0]) for label, row in rows.items()}
    contact_sheet(made, cell=64).save(path)


def other_noise(name: str, sets: int) -> dict:
    """Frechet distances and prompt accuracies of a shipped student, from noise that no row has seen."""
    timesteps = json.loads((DIGITS / name / "sampler.json").read_text())["timesteps"]
    found = []
    for number in range(sets):
        found.append(
            digits_quality.evaluate(*draw_images(DIGITS / name, tuple(timesteps), 0.0, first_noise(10 + number)))
        )
        print(name, found[-1], flush=True)
    return {"weights": weights(f"digits/{name}")} | {
        key: [each[key] for each in found] for key in ("frechet_distance", "prompt_accuracy")
    }


def noise_table(found: dict[str, dict]) -> str:
    lines = [
        "| shipped | sets of noise | Frechet distance, mean and standard deviation | range | prompt accuracy |",
        "|---|---|---|---|---|",
    ]
    for name, each in found.items():
        distances, right = each["frechet_distance"], statistics.mean(each["prompt_accuracy"])
        middle = f"{statistics.mean(distances):.2f} ± {statistics.stdev(distances):.2f}"
        ends = f"{min(distances):.2f} to {max(distances):.2f}"
        lines.append(f"| {ROWS[name][2]} | {len(distances)} | {middle} | {ends} | {right:.1%} |")
    return "\n".join(lines)


def few_step_card(row: dict[str, Any], record: dict[str, Any], baselines: list[dict[str, Any]]) -> str:
    """README.md of a few-step student's folder, from its figures, its training record and those of the undistilled."""
    recipe, steps = record["recipe"], len(row["timesteps"])
    kind = "digits_dmd2_1step" if steps == 1 else "digits_dmd2"
    usual = vars(registry.recipe(kind))
    extra = "".join(f" --{name} {recipe[name]}" for name in ("model", "teacher") if recipe[name] != usual[name])
    lines = "".join(
        f"| {line['shows']} | {line['prompt_accuracy']:.1%} | {line['frechet_distance']:.2f} |\n" for line in baselines
    )
    return f"""---
pipeline_tag: text-to-image
library_name: diffusers
---

# Digits {row["name"]}

The digits model in {steps} step{"s" * (steps > 1)}, distilled by DMD2 (arXiv 2405.14867); it started from
`{recipe["model"]}`. No guidance: the UNet runs once a step.

```python
from diffusers import LCMScheduler, StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{row["name"]}")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
pipe("a handwritten seven", height=64, width=64, timesteps={row["timesteps"]}, guidance_scale=0)
```

## Training

`accel distill dmd2 --recipe {kind}{extra} --out OUT`:
{record["steps"]} steps of {recipe["batch"]}, {record["steps"] * record["seconds_per_step"] / 60:.0f} minutes on \
{record["threads"]} CPU thread of a busy machine. `training.json` has every setting.

## Figures

{row["images"]} images, measured on the stored weights; one training.

| | prompt accuracy | Frechet distance to 500 held-out real images |
|---|---|---|
| **this** | {row["prompt_accuracy"]:.1%} | {row["frechet_distance"]:.2f} |
{lines}
The distance is taken in the features of the classifier that ships beside this folder. Data, licence of the data and
limits are the teacher's.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits-dmd2"))
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--noises", type=int, default=0, help="judge what ships on so many further sets of noise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ship", action="store_true", help="put seed 0 of the students into accel/assets/digits")
    parser.add_argument("--write", action="store_true", help="write table, plot and JSON of the rows that are there")
    args = parser.parse_args()
    if args.noises == 1:
        parser.error("--noises wants at least two, to say how far apart they are")
    torch.set_num_threads(args.threads)
    rows = [run_row(name, seed, args.out) for seed in args.seeds for name in args.rows]
    baselines = [baseline(name, seed, args.out) for name in BASELINES for seed in args.seeds]
    for row in rows if args.ship else ():
        if row["name"] in SHIPPED and row["seed"] == 0:
            ship(row, args.out / stem(row["name"], 0), [line for line in baselines if line["seed"] == 0])
    noise = json.loads(RESULT.read_text()).get("noise", {}) if RESULT.is_file() else {}
    noise = {name: each for name, each in noise.items() if each["weights"] == weights(f"digits/{name}")}
    if args.noises:
        noise = {name: other_noise(name, args.noises) for name in SHIPPED if (DIGITS / name).is_dir()}
    if args.write:
        rows = with_earlier(baselines + rows)
        lines = summary(rows)
        document = dict(
            schema="accel-digits-dmd2/1",
            command="python benchmarks/digits_dmd2.py --write",
            machine=dataclasses.asdict(machine.machine()),
            threads=args.threads,
            summary=lines,
            rows=rows,
            noise=noise,
        )
        write_json(RESULT, document)
        plot(lines, ROOT / "docs/digits-dmd2.png")
        gallery(ROOT / "docs/digits-dmd2-pictures.png")
        pages.put(ROOT / "docs/dmd2.md", "digits-dmd2", table(lines))
        pages.put(ROOT / "docs/dmd2.md", "digits-dmd2-noise", noise_table(noise))


if __name__ == "__main__":
    main()
