"""The stages of the emoji model: an image-text model twice, a VAE, a UNet; their losses and their batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from accel.bench.contact_sheet import contact_sheet

from ..evaluation import emoji as quality
from ..evaluation.digits import generate
from ..from_nothing.fit import CONSOLE, Stage, fit, planned_steps
from ..from_nothing.parts import SCHEDULER, assembled, encode_all, pick, reconstructed, text_encoder, v_loss
from ..from_nothing.precision import PRECISIONS, products_in
from ..from_nothing.tokenizer import token_ids
from ..sources import emoji
from ..sources.digits import pixels
from . import networks

PROMPT_DROPOUT = 0.1
LATENT_STD = 0.5  # of the scaled latents; see `digits.train.LATENT_STD`
# Of the VAE's loss. Absolute errors alone rest long at the median of all pixels, which is the white around drawings:
# after 600 steps held-out drawings come back with 14.9 dB, and with squared errors beside them with 18.9.
SQUARED_WEIGHT, KL_WEIGHT = 4.0, 1e-4
# Of the hours; what is left is for the latents, the sheets and the measuring.
SHARES = {"judge": 0.03, "text": 0.04, "vae": 0.15, "unet": 0.74}
SHEET_PROMPTS = (
    "a red heart",
    "a cat with a smile",
    "a pizza",
    "a rocket on a black background",
    "a smiling face with sunglasses",
    "the flag of japan",
    "a woman firefighter",
    "a green apple on a yellow background",
    "a dog",
    "a waving hand with dark skin",
    "a cactus",
    "a blue heart on a pink background",
)


@dataclass(frozen=True, kw_only=True)
class EmojiSettings:
    """Everything that decides the result. Two runs with equal settings give equal weights on the same machine."""

    steps: int = 4500
    batch: int = 64
    learning_rate: float = 8e-4
    text_steps: int = 600
    text_subjects: int = 64
    text_learning_rate: float = 1e-3
    vae_steps: int = 1200
    vae_batch: int = 16
    vae_learning_rate: float = 2e-3
    judge_steps: int = 600
    judge_subjects: int = 64
    judge_learning_rate: float = 1e-3
    ema: float = 0.999
    seed: int = 0
    precision: str = field(
        default="auto", metadata={"help": "of the VAE's and the UNet's products", "choices": PRECISIONS}
    )


# ------------------------------------------------------------------------------------------------------------- losses


def vae_loss(vae: Any, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Absolute and squared error of the images, absolute error of their differences between neighbours, which are the
    outlines; and the KL."""
    decoded, kl = reconstructed(vae, images, generator)
    decoded = decoded.float()
    edges = sum(F.l1_loss(decoded.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3))
    squared = SQUARED_WEIGHT * F.mse_loss(decoded, images)
    return F.l1_loss(decoded, images) + edges + squared + KL_WEIGHT * kl


def members(source: emoji.EmojiSource) -> list[torch.Tensor]:
    """The rows of each family of glyphs that has at least two."""
    families: dict[str, list[int]] = {}
    for row, number in enumerate(source.rows.glyph.tolist()):
        families.setdefault(source.glyphs[number].family, []).append(row)
    return [torch.tensor(rows) for rows in families.values() if len(rows) > 1]


def pairs_of_families(
    families: list[torch.Tensor], keys: torch.Tensor, subjects: int, generator: torch.Generator
) -> torch.Tensor:
    """Two rows of each of `subjects` families, of different glyph or background (`keys`, one per row).

    Batches of strangers are told apart by their subject alone; the second row of the family makes the model look at
    backgrounds and skin as well.
    """
    found = []
    for number in torch.randperm(len(families), generator=generator)[:subjects].tolist():
        rows = families[number][torch.randperm(len(families[number]), generator=generator)]
        others = rows[keys[rows] != keys[rows[0]]]
        found += [rows[:1], others[:1]]
    return torch.cat(found)


def drawn_captions(source: emoji.EmojiSource, rows: torch.Tensor, generator: torch.Generator) -> list[str]:
    """One caption for each row [n]."""
    texts = [source.captions(row) for row in rows.tolist()]
    draws = torch.rand(len(texts), generator=generator).tolist()
    return [options[int(draw * len(options))] for options, draw in zip(texts, draws, strict=True)]


def caption_ids(
    source: emoji.EmojiSource, tokenizer: Any, rows: torch.Tensor, generator: torch.Generator, length: int
) -> torch.Tensor:
    """Token ids [n, length] of one caption for each row [n]."""
    return token_ids(tokenizer, drawn_captions(source, rows, generator), length)


class Contexts:
    """What the text encoder says of every caption of a data set, computed once and not in every step.

    In half precision, and 20 KB for each: 1.9 GB for the 94,896 captions of the whole font.
    """

    def __init__(self, source: emoji.EmojiSource, encoder: Any, tokenizer: Any) -> None:
        texts = sorted({"", *(text for row in range(len(source)) for text in source.captions(row))})
        CONSOLE.print(f"contexts: {len(texts)} captions are encoded, once")
        self._row = {text: row for row, text in enumerate(texts)}
        parts = [texts[start : start + 256] for start in range(0, len(texts), 256)]
        with torch.no_grad():
            found = [encoder(token_ids(tokenizer, part)).last_hidden_state.half() for part in parts]
        self._states = torch.cat(found)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """States [n, 77, width] of captions of the data set, or of ""."""
        return self._states[[self._row[text] for text in texts]].float()


# ------------------------------------------------------------------------------------------------------------- stages


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: its settings, its folder, and what has been spent. `stage` fits one part."""

    settings: EmojiSettings
    folder: Path
    every: int
    hours: float
    seconds: dict[str, float]

    def stage(self, name: str, model: nn.Module, loss_of: Any, batch: int, says: str, look: Any = None) -> None:
        CONSOLE.print(f"{name}: {says}")
        prefix = "" if name == "unet" else f"{name}_"
        steps = getattr(self.settings, f"{prefix}steps")
        if self.hours:
            seconds = 3600 * self.hours * SHARES[name]
            steps = planned_steps(self.folder / "plan.json", name, seconds, model, loss_of)
        stage = Stage(
            name=name,
            steps=steps,
            batch=batch,
            learning_rate=getattr(self.settings, f"{prefix}learning_rate"),
            run=self.folder,
            every=self.every,
            ema=self.settings.ema,
            seed=self.settings.seed,
        )
        self.seconds[name] = fit(stage, model, loss_of, *([look] if look else []))
        model.requires_grad_(False).eval()


def image_text_stage(
    run: Run, name: str, part: emoji.EmojiSource, tokenizer: Any, config: Any, says: str
) -> quality.ImageText:
    """Fit an image-text model: the judge, or the text encoder of the pipeline with an image network to teach it."""
    model = quality.ImageText(text_encoder(config, tokenizer))
    families, keys = members(part), part.rows.glyph * len(emoji.COLOURS) + part.rows.colour
    subjects = getattr(run.settings, f"{name}_subjects")

    def contrast(generator: torch.Generator) -> torch.Tensor:
        rows = pairs_of_families(families, keys, subjects, generator)
        tokens = caption_ids(part, tokenizer, rows, generator, config["max_position_embeddings"])
        return quality.contrastive_loss(model, part.images(rows), tokens)

    run.stage(name, model, contrast, subjects, says)
    return model


def vae_stage(run: Run, data: emoji.EmojiSource) -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(**networks.VAE).to(memory_format=torch.channels_last)  # a sixth faster on a CPU

    @products_in(run.settings.precision)
    def reconstruct(generator: torch.Generator) -> torch.Tensor:
        return vae_loss(vae, data.images(pick(len(data), run.settings.vae_batch, generator)), generator)

    run.stage("vae", vae, reconstruct, run.settings.vae_batch, "learns to pack 64x64 pixels into 8x8 latents")
    return vae


@torch.no_grad()
def peak_signal_to_noise(vae: Any, images: torch.Tensor) -> float:
    """Of images [n, 3, h, w] in -1..1 through the VAE, in dB."""
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in images.split(64)])
    return 10 * torch.log10(4 / F.mse_loss(decoded.clamp(-1, 1), images)).item()


def all_latents(run: Run, vae: Any, data: emoji.EmojiSource) -> torch.Tensor:
    """Latents [rows, c, h, w] of the whole data set, not yet scaled; kept in the run folder."""
    path = run.folder / "latents.pt"
    if path.is_file() and path.stat().st_mtime >= (run.folder / "vae.pt").stat().st_mtime:
        return torch.load(path, weights_only=True)
    CONSOLE.print(f"latents: {len(data)} images are encoded, once")
    found = torch.cat([encode_all(vae, data.images(rows)) for rows in torch.arange(len(data)).split(256)])
    torch.save(found, path)
    return found


def unet_stage(run: Run, data: emoji.EmojiSource, vae: Any, encoder: Any, tokenizer: Any) -> Any:
    """The pipeline, its UNet fitted."""
    from diffusers import PNDMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(**networks.UNET).to(memory_format=torch.channels_last)
    latents = all_latents(run, vae, data)
    scale = LATENT_STD / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    latents = latents * scale
    CONSOLE.print(f"latents: {tuple(latents.shape)}, scaling factor {scale:.4f}")
    scheduler = PNDMScheduler.from_config(dict(SCHEDULER))
    alphas = scheduler.alphas_cumprod.float()

    @cache
    def contexts() -> Contexts:  # at the first step: a stage that was done before has none
        return Contexts(data, encoder, tokenizer)

    def denoise(generator: torch.Generator) -> torch.Tensor:
        rows = pick(len(latents), run.settings.batch, generator)
        texts = drawn_captions(data, rows, generator)
        dropped = (torch.rand(len(rows), generator=generator) < PROMPT_DROPOUT).tolist()
        said = ["" if drop else text for text, drop in zip(texts, dropped, strict=True)]
        states = contexts()(said)
        with products_in(run.settings.precision):
            return v_loss(unet, alphas, latents[rows], states, generator)

    def look(step: int, average: Any) -> None:
        sheet(assembled(vae, encoder, tokenizer, average, scheduler)).save(run.folder / "sheet.png")

    run.stage("unet", unet, denoise, run.settings.batch, "learns to take noise away, listening to the text", look)
    return assembled(vae, encoder, tokenizer, unet, scheduler)


def sheet(pipeline: Any, guidance: float = 3.0) -> Any:
    """Two images of each prompt of `SHEET_PROMPTS`, as one image of PIL."""
    from diffusers import DPMSolverMultistepScheduler

    sampler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    drawing = assembled(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet, sampler)
    texts = [text for text in SHEET_PROMPTS for _ in range(2)]
    made = pixels(generate(drawing, texts, guidance)).reshape(len(SHEET_PROMPTS), 2, emoji.SIZE, emoji.SIZE, 3)
    return contact_sheet(dict(zip(SHEET_PROMPTS, made, strict=True)), cell=2 * emoji.SIZE)
