"""Train the digits teacher from nothing, on two CPU cores, with one command.

    python -m accel.distill.digits.train --out out/digits

trains a digit classifier (for the evaluation), a VAE, a text encoder, and a UNet together with it; writes an ordinary
diffusers pipeline to `<out>/teacher` and the classifier to `<out>/classifier.safetensors`; and measures both.
Killed and started again it goes on from its last checkpoint, and ends with the same weights as if it had not been.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..evaluation.digits import (
    Classifier,
    classifier_loss,
    evaluate,
    frechet_floor,
    generate,
    load_classifier,
    prompt_accuracy,
    save_classifier,
)
from ..from_nothing import command
from ..from_nothing.fit import CONSOLE, Stage, fit
from ..from_nothing.parts import (
    SCHEDULER,
    assembled,
    encode_all,
    load,
    parameters,
    pick,
    reconstructed,
    save_pipeline,
    text_encoder,
    v_loss,
)
from ..from_nothing.tokenizer import token_ids, write_tokenizer
from ..sources import digits
from . import networks
from .card import digit_sheet, model_card

PROMPT_DROPOUT = 0.1
# Standard deviation of the scaled latents. These 1,024 numbers hold an 8x8 image, so they repeat themselves: at unit
# scale the digit can be read off x_t at nearly every timestep, and nothing makes the UNet read the prompt. Scaling them
# down shifts the schedule towards noise (Chen 2023, arXiv 2301.10972) while its constants stay Stable Diffusion's.
LATENT_STD = 0.4
KL_WEIGHT = 1e-4


@dataclass(frozen=True, kw_only=True)
class DigitsSettings:
    """Everything that decides the result. Two runs with equal settings give equal weights on the same machine."""

    steps: int = 800
    batch: int = 64
    learning_rate: float = 2e-3
    text_steps: int = 200
    text_batch: int = 64
    text_learning_rate: float = 2e-3
    vae_steps: int = 500
    vae_batch: int = 16
    vae_learning_rate: float = 2e-3
    classifier_steps: int = 600
    classifier_batch: int = 64
    classifier_learning_rate: float = 2e-3
    ema: float = 0.995
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How the result is measured."""

    guidance: tuple[float, ...] = field(default=(2.0, 3.0, 4.0, 5.0), metadata={"help": "scales to choose from"})
    choose_per_digit: int = field(default=10, metadata={"help": "images to choose by"})
    per_digit: int = field(default=digits.HELD_OUT_PER_DIGIT, metadata={"help": "images of each digit to measure with"})
    sample_steps: int = field(default=25, metadata={"help": "sampler steps to measure with"})


def vae_loss(vae: Any, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squared error of the images, plus a light pull of the latents to the unit normal (Rombach et al. 2022)."""
    decoded, kl = reconstructed(vae, images, generator)
    return F.mse_loss(decoded, images) + KL_WEIGHT * kl


def text_loss(model: nn.ModuleDict, tokens: torch.Tensor, digit: torch.Tensor, end: int) -> torch.Tensor:
    """Cross entropy of the digit, 10 for the empty prompt, read from every padding state. tokens [b, 77], digit [b].

    In Stable Diffusion the text encoder comes trained, as part of CLIP. From a random start nearly every one of the 77
    states is the same padding whatever the prompt, and the UNet never learns to listen: the digit has to be in all of
    them first.
    """
    scores = model["head"](model["text_encoder"](tokens).last_hidden_state)
    padding = tokens == end
    return F.cross_entropy(scores[padding], digit[:, None].expand_as(tokens)[padding])


def train(settings: DigitsSettings, run: Path, every: int = 100) -> tuple[Any, Classifier, dict[str, float]]:
    """Everything but the measuring: a diffusers pipeline in full precision, the classifier, seconds per part."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel

    def stage(name: str, steps: int, batch: int, learning_rate: float) -> Stage:
        return Stage(
            name=name,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            run=run,
            every=every,
            ema=settings.ema,
            seed=settings.seed,
        )

    torch.manual_seed(settings.seed)  # initial weights; the steps have their own random numbers
    seconds: dict[str, float] = {}
    images, labels = digits.dataset("train")
    CONSOLE.print(f"data: {len(images)} training images of {digits.SIZE}x{digits.SIZE} pixels")
    tokenizer = write_tokenizer(run / "tokenizer", digits.words())
    classifier = Classifier()
    vae = AutoencoderKL(**networks.VAE)
    encoder = text_encoder(networks.TEXT, tokenizer)
    denoiser = nn.ModuleDict(dict(unet=UNet2DConditionModel(**networks.UNET), text_encoder=encoder))

    def classify(generator: torch.Generator) -> torch.Tensor:
        rows = pick(len(images), settings.classifier_batch, generator)
        return classifier_loss(classifier, images[rows], labels[rows], generator)

    CONSOLE.print("classifier: learns to read the digits")
    seconds["classifier"] = fit(
        stage("classifier", settings.classifier_steps, settings.classifier_batch, settings.classifier_learning_rate),
        classifier,
        classify,
    )

    def reconstruct(generator: torch.Generator) -> torch.Tensor:
        return vae_loss(vae, images[pick(len(images), settings.vae_batch, generator)], generator)

    CONSOLE.print("vae: learns to pack 64x64 pixels into 16x16 latents")
    seconds["vae"] = fit(
        stage("vae", settings.vae_steps, settings.vae_batch, settings.vae_learning_rate), vae, reconstruct
    )
    vae.requires_grad_(False).eval()
    latents = encode_all(vae, images)
    scale = LATENT_STD / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    latents = latents * scale
    CONSOLE.print(f"latents: {tuple(latents.shape)}, scaling factor {scale:.4f}")

    scheduler = PNDMScheduler.from_config(dict(SCHEDULER))
    alphas = scheduler.alphas_cumprod.float()
    # [10 digits, templates, 77], and the empty prompt that classifier-free guidance compares with.
    tokens = torch.stack([token_ids(tokenizer, list(digits.prompts(digit))) for digit in range(10)])
    empty = token_ids(tokenizer, [""])

    reader = nn.ModuleDict(dict(text_encoder=encoder, head=nn.Linear(networks.TEXT["hidden_size"], 11)))

    def read(generator: torch.Generator) -> torch.Tensor:
        digit = pick(11, settings.text_batch, generator)
        chosen = tokens[digit.clamp(max=9), pick(tokens.shape[1], settings.text_batch, generator)]
        return text_loss(reader, torch.where(digit[:, None] == 10, empty, chosen), digit, tokenizer.eos_token_id)

    CONSOLE.print("text: the text encoder learns to carry the digit to all its states")
    seconds["text"] = fit(
        stage("text", settings.text_steps, settings.text_batch, settings.text_learning_rate), reader, read
    )

    def denoise(generator: torch.Generator) -> torch.Tensor:
        rows = pick(len(latents), settings.batch, generator)
        chosen = tokens[labels[rows], torch.randint(tokens.shape[1], (settings.batch,), generator=generator)]
        dropped = torch.rand(settings.batch, 1, generator=generator) < PROMPT_DROPOUT
        context = encoder(torch.where(dropped, empty, chosen)).last_hidden_state
        return v_loss(denoiser["unet"], alphas, latents[rows], context, generator)

    CONSOLE.print("unet: learns to take noise away, listening to the text encoder, which goes on learning")
    seconds["unet"] = fit(stage("unet", settings.steps, settings.batch, settings.learning_rate), denoiser, denoise)
    denoiser.requires_grad_(False).eval()
    pipeline = assembled(vae, encoder, tokenizer, denoiser["unet"], scheduler)
    return pipeline, classifier.requires_grad_(False).eval(), seconds


def measure(pipeline: Any, classifier: Classifier, how: Measure) -> dict[str, Any]:
    """Choose the guidance scale on one set of seeds, then measure with it on another.

    Chosen is the least Frechet distance among the scales whose prompt accuracy is within one point of the best.
    """

    def figures(guidance: float, per_digit: int, seed: int) -> dict[str, Any]:
        texts, wanted = zip(*digits.prompt_set(per_digit), strict=True)
        images = generate(pipeline, list(texts), guidance, how.sample_steps, seed)
        result = evaluate(images, torch.tensor(wanted), classifier)
        CONSOLE.print(
            f"guidance {guidance}: {result['images']} images, prompt accuracy {result['prompt_accuracy']:.3f}, "
            f"Frechet distance {result['frechet_distance']:.2f}"
        )
        return dict(guidance=guidance, **result)

    real, labels = digits.dataset("held-out")
    trials = [figures(guidance, how.choose_per_digit, 100_000) for guidance in how.guidance]
    best = max(trial["prompt_accuracy"] for trial in trials)
    good = [trial for trial in trials if trial["prompt_accuracy"] >= best - 0.01]
    chosen = min(good, key=lambda trial: trial["frechet_distance"])["guidance"]
    return dict(
        **figures(chosen, how.per_digit, 0),
        frechet_floor=frechet_floor(classifier),
        frechet_reference="500 held-out real images; floor: 500 training images against the same",
        classifier_accuracy_held_out=prompt_accuracy(real, labels, classifier),
        sampler=f"DPM++ 2M, {how.sample_steps} steps",
        guidance_trials=trials,
    )


def run_all(settings: DigitsSettings, how: Measure, out: Path, run: Path, every: int = 100) -> dict[str, Any]:
    """Train, save, load again as a user would, measure, write the figures and the model card."""
    pipeline, classifier, seconds = train(settings, run, every)
    teacher = out / "teacher"
    save_pipeline(pipeline, teacher, run / "tokenizer")
    save_classifier(classifier, out / "classifier.safetensors")
    CONSOLE.print(f"written: {teacher}; now measured as loaded from there")
    stored, reader = load(teacher), load_classifier(out / "classifier.safetensors")
    quality = measure(stored, reader, how)
    quality |= dict(seconds=seconds, threads=torch.get_num_threads(), settings=dataclasses.asdict(settings))
    quality |= dict(parameters={name: parameters(getattr(stored, name)) for name in ("unet", "text_encoder", "vae")})
    (teacher / "quality.json").write_text(json.dumps(quality, indent=2) + "\n", encoding="utf-8")
    sampler = dict(name="dpmpp_2m", steps=how.sample_steps, guidance=quality["guidance"])
    (teacher / "sampler.json").write_text(json.dumps(sampler) + "\n", encoding="utf-8")
    (teacher / "README.md").write_text(model_card(stored, reader, settings, quality), encoding="utf-8")
    texts = [prompt for prompt, _ in digits.prompt_set(10)]
    digit_sheet(generate(stored, texts, quality["guidance"], how.sample_steps)).save(run / "grid.png")
    CONSOLE.print(f"figures: {teacher / 'quality.json'}; images to look at: {run / 'grid.png'}")
    return quality


def main(arguments: list[str] | None = None) -> int:
    title = __doc__.splitlines()[0]
    parser = command.parser("accel.distill.digits.train", title, "digits", 100, DigitsSettings, Measure)
    options = parser.parse_args(arguments)
    settings, how = command.read(DigitsSettings, options), command.read(Measure, options)
    return command.carried_out(
        options, lambda: run_all(settings, how, options.out, options.run, options.checkpoint_every)
    )


if __name__ == "__main__":
    sys.exit(main())
