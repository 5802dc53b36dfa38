"""Methods for few steps beside each other on digits, over several seeds: DMD2, decoupled DMD, LCM, LCM-LoRA.

    python benchmarks/digits_few_step.py --out out/digits-few-step --rows decoupled lcm --seeds 0 1 2

trains every row that is not there yet (ten to forty minutes each on one CPU thread; two side by side on two cores:
run it twice with different rows; a run that was interrupted goes on), draws 500 images with each in its four steps,
and judges them as `digits_dmd2.py` does, whose rows of DMD2 and of the teacher stand beside. `--write` adds them to
benchmarks/digits-few-step.json (rows of a recipe that has changed since then go), and makes of all that it holds the
table of docs/few-step.md, docs/digits-few-step.png and docs/digits-few-step-pictures.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import digits_dmd2
import pages
import torch

from accel import machine
from accel.assets import resolve
from accel.bench.contact_sheet import contact_sheet
from accel.distill import recipes, registry
from accel.distill.digits.card import digit_sheet
from accel.distill.evaluation import digits as digits_quality
from accel.distill.run import execute
from accel.distill.sources import digits
from accel.files import digest_of, write_json

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks/digits-few-step.json"
TINY = dict(model="digits/tiny", teacher="digits")
TINY_ONE = dict(model="digits/tiny-1step")

# Row -> (recipe, fields that differ from it, what it shows).
ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "decoupled": ("digits_dmd2", dict(decoupled="hybrid"), "decoupled DMD"),
    "decoupled-full": ("digits_dmd2", dict(decoupled="full"), "decoupled DMD, both timesteps over the full range"),
    "decoupled-guided": ("digits_dmd2", dict(decoupled="hybrid", real_guidance=2.0), "decoupled DMD, guidance 2"),
    "lcm": ("digits_lcm", {}, "LCM"),
    "lcm-lora": ("digits_lcm_lora", {}, "LCM-LoRA"),
    "tiny-decoupled": ("digits_dmd2", dict(**TINY_ONE, decoupled="hybrid"), "tiny, decoupled DMD"),
    "tiny-lcm": ("digits_lcm", TINY, "tiny, LCM"),
}
BESIDE = ("teacher, 25 steps, guidance 1.5", "teacher, 4 steps", "4step", "tiny-4step")  # rows of `digits_dmd2.py`
SHOWS = {"4step": "DMD2", "tiny-4step": "tiny, DMD2"}


def recipe_of(name: str) -> Any:
    kind, fields, _ = ROWS[name]
    return recipes.changed(registry.recipe(kind), **fields)


def digest(name: str) -> str:
    """Of what a row trains from what; one that was made otherwise is another row."""
    return digest_of(digits_dmd2.decisive(recipe_of(name)))[:12]


def folder_of(name: str, seed: int, out: Path) -> Path:
    return out / f"{name}-{seed}-{digest(name)}"


def draw(
    folder: Path, base: str, seed: int, each: int = digits.HELD_OUT_PER_DIGIT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [10 each, 3, 64, 64] in -1..1 and the digits asked for, by diffusers' LCMScheduler in the student's own
    steps; a LoRA on the model that it was trained from."""
    from diffusers import LCMScheduler, StableDiffusionPipeline

    whole = (folder / "model_index.json").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(folder if whole else resolve(base))
    if not whole:
        pipeline.load_lora_weights(folder)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    sampler = json.loads((folder / "sampler.json").read_text())
    how = {name: sampler[name] for name in ("timesteps", "steps") if name in sampler}
    texts, wanted = zip(*digits.prompt_set(each), strict=True)
    return digits_quality.generate(pipeline, list(texts), 0.0, seed=seed, **how), torch.tensor(wanted)


def run_row(name: str, seed: int, out: Path) -> dict[str, Any]:
    folder = folder_of(name, seed, out)
    result = folder.with_name(f"{folder.name}.json")
    if result.is_file():
        return json.loads(result.read_text())
    recipe = recipes.changed(recipe_of(name), seed=seed, cache=str(out / "cache"), sample_every=0, log="none")
    if not folder.exists() and execute(recipe, folder).stopped:
        raise KeyboardInterrupt
    record = json.loads((folder / "training.json").read_text())
    images, wanted = draw(folder, recipe.model, digits_dmd2.first_noise(seed))
    digit_sheet(images[:50]).save(folder.with_name(f"{folder.name}.png"))
    row = dict(
        name=name,
        shows=ROWS[name][2],
        seed=seed,
        recipe=digest(name),
        steps=record["steps"],
        batch=recipe.batch,
        seconds_per_step=record["seconds_per_step"],
        **digits_quality.evaluate(images, wanted),
    )
    write_json(result, row)
    print(row, flush=True)
    return row


def with_earlier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """And what an earlier run has written, where it still holds; in the order of the tables, after DMD2's own."""
    earlier = json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []
    known = {(row["name"], row["seed"]): row for row in earlier + rows}
    names = list(ROWS)
    found = [row for row in known.values() if row["name"] in names and row["recipe"] == digest(row["name"])]
    return sorted(found, key=lambda row: (names.index(row["name"]), row["seed"]))


def lines_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the table: those of `digits_dmd2.py` that still hold, then those of the rows."""
    lines = [line for line in digits_dmd2.summary(digits_dmd2.with_earlier([])) if line["name"] in BESIDE]
    return [line | {"shows": SHOWS.get(line["name"], line["shows"])} for line in lines] + digits_dmd2.summary(rows)


def table(lines: list[dict[str, Any]]) -> str:
    """Each line beside the teacher's 25 steps."""
    teacher = next(line["frechet_distance"] for line in lines if line["name"] == BESIDE[0])
    head = ["| | trainings | Frechet distance (range) | over the teacher's 25 steps | prompt accuracy (least) |"]
    return "\n".join(
        [
            *head,
            "|---|---|---|---|---|",
            *(
                f"| {line['shows']} | {line['seeds']} | {line['frechet_distance']:.2f} ({line['least']:.2f} to "
                f"{line['largest']:.2f}) | {line['frechet_distance'] / teacher:.2f}x | {line['prompt_accuracy']:.1%} "
                f"({line['least_accuracy']:.1%}) |"
                for line in lines
            ),
        ]
    )


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    rows = [
        (
            line["shows"],
            line["frechet_distance"],
            f"{line['frechet_distance']:.1f}   {line['prompt_accuracy']:.1%}",
            "#a0aec0" if line["name"] in BESIDE[:2] else "#2b6cb0",
        )
        for line in lines
    ]
    pages.bars(
        path,
        rows,
        "Digits in four steps, by method; grey is the teacher; beside the bar, prompt accuracy",
        "Frechet distance to held-out real digits (lower is better); the line is the range over trainings",
        ranges=[(line["least"], line["largest"]) for line in lines],
    )


def gallery(rows: list[dict[str, Any]], out: Path, path: Path) -> None:
    """Ten digits of each method's first training that lies in `out`, all from the same noise."""
    made = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        folder = next((found for seed in range(10) if (found := folder_of(name, seed, out)).is_dir()), None)
        if folder is not None:
            made[ROWS[name][2]] = digits.pixels(draw(folder, recipe_of(name).model, seed=0, each=1)[0])
    if made:
        contact_sheet(made, cell=64).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/digits-few-step"))
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write table, plot and JSON of the rows that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [run_row(name, seed, args.out) for seed in args.seeds for name in args.rows]
    if args.write:
        rows = with_earlier(rows)
        lines = lines_of(rows)
        document = dict(
            schema="accel-digits-few-step/1",
            command="python benchmarks/digits_few_step.py --write",
            machine=dataclasses.asdict(machine.machine()),
            threads=args.threads,
            summary=lines,
            rows=rows,
        )
        write_json(RESULT, document)
        plot(lines, ROOT / "docs/digits-few-step.png")
        gallery(rows, args.out, ROOT / "docs/digits-few-step-pictures.png")
        pages.put(ROOT / "docs/few-step.md", "digits-few-step", table(lines))


if __name__ == "__main__":
    main()
