"""Named recipes, as functions: settings that were published, or that suit the shipped model.

`registry` lists them under the method that they are settings of.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from accel.errors import unknown

from .settings import DistillationRecipe, DMD2Recipe, FinetuneRecipe, LCMRecipe, LoraRecipe, Recipe, TinyVaeRecipe


def base() -> DistillationRecipe:
    """SD1.x or SD2.x without the second layer of each stage (BK-SDM-Base, Segmind's SD-Small)."""
    return DistillationRecipe(student="base")


def small() -> DistillationRecipe:
    """Base without the mid block (BK-SDM-Small)."""
    return DistillationRecipe(student="small")


def tiny() -> DistillationRecipe:
    """Small without the fourth stage (BK-SDM-Tiny, Segmind's SD-Tiny)."""
    return DistillationRecipe(student="tiny")


# DMD2 as it was published: one step of the student a batch, and a critic that is not conditioned on it.
_PUBLISHED = dict(step_aware=False, mixed_steps=False)


def dmd2_sd15() -> DMD2Recipe:
    """DMD2's published SD1.5 in one step, in its first stage: 64 processes x 32, without the GAN.

    The second stage goes on from its result: 5e-7, --adversarial-weight 1e-3.
    """
    return DMD2Recipe(
        **_PUBLISHED,
        few_steps=1,
        real_guidance=1.75,
        ratio=10,
        steps=390_000,
        batch=32,
        learning_rate=1e-5,
        warmup=5_000,
        adversarial_weight=0.0,
        mixed_precision="bf16",
        checkpoint_every=5_000,
        sample_every=2_500,
    )


def dmd2_sdxl() -> DMD2Recipe:
    """DMD2's published SDXL in four steps: 64 processes x 2, 19,000 generator updates."""
    return DMD2Recipe(
        **_PUBLISHED,
        resolution=1024,
        few_steps=4,
        real_guidance=8.0,
        steps=95_000,
        batch=2,
        learning_rate=5e-7,
        warmup=500,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        checkpoint_every=2_500,
        sample_every=1_000,
    )


def dmd2_sdxl_lora() -> DMD2Recipe:
    """DMD2's published LoRA of SDXL in four steps: rank 64, alpha 8, 16,000 generator updates.

    The published fake score is a full copy; --critic-rank 64 shares one frozen SDXL among all three networks.
    """
    return dataclasses.replace(dmd2_sdxl(), rank=64, alpha=8.0, learning_rate=5e-5, steps=80_000)


def dmd2_sdxl_1step() -> DMD2Recipe:
    """DMD2's published SDXL in one step at t = 399; it starts from a UNet warmed up by `accel distill regress`."""
    return dataclasses.replace(dmd2_sdxl(), timesteps="399", steps=120_000)


def dmd2_imagenet64() -> DMD2Recipe:
    """DMD2's published ImageNet 64 x 64 in one step: 7 processes x 40, 200,000 generator updates."""
    return DMD2Recipe(
        **_PUBLISHED,
        resolution=64,
        few_steps=1,
        real_guidance=1.0,
        adversarial_weight=3e-3,
        steps=1_000_000,
        batch=40,
        learning_rate=2e-6,
        warmup=500,
        mixed_precision="bf16",
        cache="none",
        random_flip=False,
        checkpoint_every=10_000,
        sample_every=5_000,
    )


def lcm_sd15() -> LCMRecipe:
    """All weights of SD1.5, with the setting that diffusers documents; its script also trains an input for the guidance
    scale, which any program but a latent consistency pipeline would leave out."""
    return LCMRecipe(
        resolution=512,
        guidance=6.0,
        guidance_high=16.0,
        steps=1_000,
        batch=12,
        learning_rate=1e-6,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        checkpoint_every=200,
        sample_every=200,
    )


def lcm_lora_sd15() -> LCMRecipe:
    """LCM-LoRA of SD1.5, as diffusers documents it: rank 64, 1,000 steps of 12."""
    return dataclasses.replace(lcm_sd15(), rank=64, learning_rate=1e-4)


def lcm_lora_sdxl() -> LCMRecipe:
    """LCM-LoRA of SDXL, as diffusers documents it: rank 64, 1024 px, 1,000 steps of 12."""
    return dataclasses.replace(lcm_lora_sd15(), resolution=1024)


def sd15_base() -> DistillationRecipe:
    """BK-SDM's published setting: 50,000 steps of 256 images (here 8 processes x 8 x 4)."""
    return DistillationRecipe(
        student="base",
        steps=50_000,
        batch=8,
        accumulation=4,
        learning_rate=5e-5,
        mixed_precision="bf16",
        checkpoint_every=5_000,
        sample_every=2_500,
    )


def sd15_small() -> DistillationRecipe:
    return dataclasses.replace(sd15_base(), student="small")


def sd15_tiny() -> DistillationRecipe:
    return dataclasses.replace(sd15_base(), student="tiny")


def segmind_small() -> DistillationRecipe:
    """Distill-SD's SD-Small, which is our `base`: 100,000 steps of 32, weights 1 / 0.5 / 0.5, its own feature pairs."""
    return DistillationRecipe(
        student="base",
        features="segmind",
        output_weight=0.5,
        feature_weight=0.5,
        steps=100_000,
        batch=4,
        learning_rate=1e-5,
        lr_schedule="cosine",
        mixed_precision="bf16",
        checkpoint_every=5_000,
        sample_every=2_500,
    )


def segmind_tiny() -> DistillationRecipe:
    """Distill-SD's SD-Tiny: 125,000 steps."""
    return dataclasses.replace(segmind_small(), student="tiny", steps=125_000)


def segmind_portrait() -> FinetuneRecipe:
    """Segmind's portrait model: SD-Tiny fine-tuned on 7,000 images that its teacher, Realistic Vision 4.0, drew.

    `--data teacher:prompts.txt --data-model TEACHER --data-images 7000`, or a folder of such images.
    """
    return FinetuneRecipe(
        resolution=768,
        steps=131_000,
        batch=32,
        accumulation=4,
        learning_rate=1e-4,
        mixed_precision="fp16",
        checkpoint_every=5_000,
        sample_every=2_500,
    )


def ssd_1b() -> DistillationRecipe:
    """SSD-1B: layer-level features, weights 1 / 0.5 / 0.5, 1024 px, 251,000 steps of 32 x 4."""
    return DistillationRecipe(
        student="ssd-1b",
        features="layers",
        output_weight=0.5,
        feature_weight=0.5,
        resolution=1024,
        steps=251_000,
        batch=4,
        accumulation=4,
        learning_rate=1e-5,
        mixed_precision="bf16",
        gradient_checkpointing=True,
        checkpoint_every=5_000,
        sample_every=5_000,
        sample_guidance=9.0,
    )


def vega() -> DistillationRecipe:
    """Segmind-Vega's depths with SSD-1B's published setting; Vega's own was not published."""
    return dataclasses.replace(ssd_1b(), student="vega")


# What every recipe of the shipped model has in common: its data, its size, its samples.
_DIGITS: dict[str, Any] = dict(
    model="digits",
    data="digits",
    resolution=64,
    random_flip=False,
    cache_variants=1,
    cache_dtype="float32",
    sample_guidance=3.0,
    sample_prompts="|".join(f"a handwritten {digit}" for digit in range(10)),
)


def digits_base() -> DistillationRecipe:
    """The shipped model's students, on two CPU cores in minutes."""
    return DistillationRecipe(
        **_DIGITS,
        student="base",
        save_dtype="float16",
        steps=300,
        batch=64,
        learning_rate=1e-3,
        lr_schedule="cosine",
        warmup=20,
        beta2=0.99,
        weight_decay=1e-3,
        ema=0.99,
        checkpoint_every=50,
        sample_every=100,
    )


def digits_small() -> DistillationRecipe:
    return dataclasses.replace(digits_base(), student="small")


def digits_tiny() -> DistillationRecipe:
    return dataclasses.replace(digits_base(), student="tiny")


def digits_dmd2_1step() -> DMD2Recipe:
    """The shipped model in one step, in a quarter of an hour on one CPU core."""
    return DMD2Recipe(
        **_DIGITS,
        save_dtype="float16",
        few_steps=1,
        steps=360,
        batch=32,
        learning_rate=3e-4,
        critic_learning_rate=1e-3,
        ratio=2,
        critic_warmup=30,
        warmup=10,
        lr_schedule="cosine",
        beta2=0.99,
        weight_decay=1e-3,
        ema=0.97,
        real_guidance=1.25,
        adversarial_weight=0.03,
        discriminator_weight=0.05,
        checkpoint_every=50,
        sample_every=100,
    )


def digits_dmd2() -> DMD2Recipe:
    """The same in four steps, from one: each step sees as many images of a batch as the one step did."""
    return dataclasses.replace(
        digits_dmd2_1step(),
        model="digits/1step",
        teacher="digits",
        few_steps=4,
        steps=120,
        batch=128,
        critic_warmup=10,
        warmup=5,
        real_guidance=1.3,
        discriminator_weight=0.1,
        checkpoint_every=20,
        sample_every=40,
    )


def digits_lcm() -> LCMRecipe:
    """Consistency distillation of the shipped model; docs/few-step.md says what is known of it."""
    return LCMRecipe(
        **_DIGITS,
        save_dtype="float16",
        steps=300,
        batch=64,
        learning_rate=3e-5,
        lr_schedule="cosine",
        warmup=10,
        beta2=0.99,
        ema=0.97,
        guidance=1.5,
        skip=100,
        loss="l2",
        checkpoint_every=50,
        sample_every=100,
    )


def digits_lcm_lora() -> LCMRecipe:
    """The same as a LoRA of 64."""
    return dataclasses.replace(digits_lcm(), rank=64, learning_rate=1e-4, save_dtype="float32")


def digits_vae() -> TinyVaeRecipe:
    """The shipped model's tiny VAE, on two CPU cores."""
    return TinyVaeRecipe(
        **_DIGITS,
        save_dtype="float16",
        steps=1200,
        batch=12,
        learning_rate=3e-3,
        width=16,
        blocks=2,
        perceptual_weight=0.02,
        ema=0.99,
        checkpoint_every=200,
        sample_every=0,
    )


def digits_lora() -> LoraRecipe:
    """A LoRA of the shipped model, on two CPU cores in a minute; give --data a folder with a new word for something."""
    return LoraRecipe(
        **_DIGITS,
        steps=80,
        batch=16,
        learning_rate=2e-3,
        lr_schedule="cosine",
        warmup=5,
        rank=8,
        alpha=8.0,
        checkpoint_every=40,
        sample_every=0,
    )


R = TypeVar("R", bound=Recipe)


def changed(recipe: R, **fields: Any) -> R:
    """A recipe with some fields replaced.

    Raises:
        UserError: for a field that the recipe does not have; the likeliest one, or all, are named.
    """
    known = [field.name for field in dataclasses.fields(recipe)]
    for name in fields:
        if name not in known:
            raise unknown("field", name, known, type(recipe).__name__)
    return dataclasses.replace(recipe, **fields)
