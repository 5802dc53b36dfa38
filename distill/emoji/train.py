"""Train the emoji teacher from nothing, on two CPU cores, with one command.

    python -m accel.distill.emoji.train --out out/emoji --hours 3

trains a judge (for the evaluation), a VAE, a text encoder and a UNet; writes an ordinary diffusers pipeline to
`<out>/teacher` and the judge to `<out>/judge`; and measures. Killed and started again it goes on from its last
checkpoint, and ends with the same weights as if it had not been. `<run>/sheet.png` shows how far it is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from accel.errors import UserError
from accel.files import read_json, write_json

from ..evaluation import emoji as quality
from ..evaluation.digits import generate
from ..from_nothing import command
from ..from_nothing.fit import CONSOLE
from ..from_nothing.parts import load, parameters, save_pipeline
from ..from_nothing.tokenizer import write_tokenizer
from ..sources import emoji
from . import networks
from .card import model_card
from .stages import SHARES, EmojiSettings, Run, image_text_stage, peak_signal_to_noise, sheet, unet_stage, vae_stage


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How the result is measured."""

    guidance: tuple[float, ...] = field(default=(1.5, 2.5, 4.0), metadata={"help": "scales to choose from"})
    choose: int = field(default=100, metadata={"help": "images to choose by"})
    images: int = field(default=emoji.PROMPTS, metadata={"help": "images to measure with"})
    sample_steps: int = field(default=25, metadata={"help": "sampler steps to measure with"})


def train(
    settings: EmojiSettings, folder: Path, every: int, hours: float, font: Path | None
) -> tuple[Any, quality.Judge, dict[str, Any]]:
    """Everything but the measuring: a diffusers pipeline in full precision, the judge, facts for the card."""
    torch.manual_seed(settings.seed)  # initial weights; the steps have their own random numbers
    run = Run(settings=settings, folder=folder, every=every, hours=hours, seconds={})
    data, wider = emoji.dataset("train", font), emoji.dataset("judge", font)
    held_out, prompts = emoji.dataset("held-out", font), emoji.dataset("prompts", font)
    CONSOLE.print(f"data: {len(data.glyphs)} emoji in {len(data)} images of {emoji.SIZE}x{emoji.SIZE} pixels")
    _claim(folder, data.identity)
    tokenizer = write_tokenizer(folder / "tokenizer", emoji.words(data.glyphs), networks.MERGES)
    seer = image_text_stage(
        run, "judge", wider, tokenizer, quality.JUDGE_TEXT, "learns which caption belongs to which image, to measure"
    )
    judge = quality.made_judge(seer, tokenizer, prompts, held_out, data)
    CONSOLE.print(f"judge: of {len(prompts)} real drawings it finds {judge.real['prompt_accuracy']:.1%} of the prompts")
    teacher = image_text_stage(
        run, "text", data, tokenizer, networks.TEXT, "the text encoder learns what captions mean"
    )
    vae = vae_stage(run, data)
    rows = torch.arange(0, len(held_out), max(1, len(held_out) // 500))
    signal = peak_signal_to_noise(vae, held_out.images(rows))
    CONSOLE.print(f"vae: {signal:.1f} dB on held-out drawings")
    pipeline = unet_stage(run, data, vae, teacher.text, tokenizer)
    facts = dict(
        seconds=run.seconds,
        emoji=len(data.glyphs),
        training_images=len(data),
        vae_psnr=signal,
        steps={path.stem: torch.load(path, weights_only=True)["step"] for path in map(folder.joinpath, _STATES)},
    )
    return pipeline, judge, facts


def _claim(folder: Path, identity: str) -> None:
    """Note in the run folder which images it learns from; a run does not go on with others."""
    note = folder / "data.json"
    if note.is_file() and read_json(note, "the note of the data")["identity"] != identity:
        raise UserError(
            f"{folder} was begun with other drawings or captions (another font, or version of the package emoji)",
            f"use another --run folder, or delete {folder}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(note, dict(identity=identity))


_STATES = tuple(f"{name}.pt" for name in SHARES)


def measure(pipeline: Any, judge: quality.Judge, how: Measure) -> dict[str, Any]:
    """Choose the guidance scale on one set of seeds, then measure with it on another.

    Chosen is the least Frechet distance among the scales whose prompt accuracy is within two points of the best.
    """

    def figures(guidance: float, count: int, seed: int) -> dict[str, Any]:
        images = generate(pipeline, judge.texts()[:count], guidance, how.sample_steps, seed)
        result = quality.evaluate(images, range(len(images)), judge)
        CONSOLE.print(
            f"guidance {guidance}: {result['images']} images, prompt accuracy {result['prompt_accuracy']:.3f}, "
            f"Frechet distance {result['frechet_distance']:.3f}"
        )
        return dict(guidance=guidance, **result)

    trials = [figures(guidance, how.choose, 100_000) for guidance in how.guidance]
    best = max(trial["prompt_accuracy"] for trial in trials)
    good = [trial for trial in trials if trial["prompt_accuracy"] >= best - 0.02]
    chosen = min(good, key=lambda trial: trial["frechet_distance"])["guidance"]
    return dict(
        **figures(chosen, how.images, 0),
        real=judge.real,
        prompts=len(judge.prompts),
        sampler=f"DPM++ 2M, {how.sample_steps} steps",
        guidance_trials=trials,
    )


def run_all(
    settings: EmojiSettings, how: Measure, out: Path, folder: Path, every: int, hours: float, font: Path | None
) -> dict[str, Any]:
    """Train, save, load again as a user would, measure, write the figures and the model card."""
    pipeline, judge, facts = train(settings, folder, every, hours, font)
    teacher = out / "teacher"
    save_pipeline(pipeline, teacher, folder / "tokenizer")
    quality.save_judge(judge, out / "judge", folder / "tokenizer")
    CONSOLE.print(f"written: {teacher}; now measured as loaded from there")
    stored = load(teacher)
    found = measure(stored, quality.open_judge(out / "judge"), how)
    found |= facts | dict(threads=torch.get_num_threads(), hours=hours, settings=dataclasses.asdict(settings))
    found |= dict(parameters={name: parameters(getattr(stored, name)) for name in ("unet", "text_encoder", "vae")})
    (teacher / "quality.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    sampler = dict(name="dpmpp_2m", steps=how.sample_steps, guidance=found["guidance"])
    (teacher / "sampler.json").write_text(json.dumps(sampler) + "\n", encoding="utf-8")
    (teacher / "README.md").write_text(model_card(found), encoding="utf-8")
    sheet(stored, found["guidance"]).save(folder / "sheet.png")
    CONSOLE.print(f"figures: {teacher / 'quality.json'}; images to look at: {folder / 'sheet.png'}")
    return found


def main(arguments: list[str] | None = None) -> int:
    title = __doc__.splitlines()[0]
    parser = command.parser("accel.distill.emoji.train", title, "emoji", 200, EmojiSettings, Measure)
    parser.add_argument("--hours", type=float, default=0.0, help="train so long, instead of the numbers of steps")
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf, where the system's is not to be taken")
    options = parser.parse_args(arguments)
    settings, how = command.read(EmojiSettings, options), command.read(Measure, options)
    places = options.out, options.run
    return command.carried_out(
        options, lambda: run_all(settings, how, *places, options.checkpoint_every, options.hours, options.font)
    )


if __name__ == "__main__":
    sys.exit(main())
