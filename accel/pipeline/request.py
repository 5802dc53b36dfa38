"""A request to a pipeline, complete and checked before any network runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .. import images
from ..arrays import is_torch
from ..bundle import Manifest
from ..bundle.kinds import KINDS
from ..bundle.shape_profiles import Range, native_sides
from ..engines.base import to_numpy
from ..errors import Notice, UserError
from .conditioning import hidden_state, image_prompts
from .input_images import InputImages
from .sampling_plan import SamplingPlan
from .sampling_plan import plan as plan  # where version 0.1 had it
from .tiling import VaeTiling


@dataclass(frozen=True)
class Chunk:
    """The images that are made at once: `rows` of the request."""

    rows: slice
    prompts: list[str]
    negatives: list[str] | None
    seeds: list[int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides the images of one call.

    Attributes:
        plan: how to sample.
        chunks: the images, as they are made at once.
        size: height and width of the latents.
        pixels: height and width of the images.
        images: images to start from and to control by.
        sizes: SDXL's size conditioning in pixels: original size, top and left of the crop, target size.
        scores: a refiner's aesthetic scores: with the prompt, and without it.
        latents: initial noise [N, C, h, w] of unit variance, or the latents to go on with; None for the seeds' noise.
        renoise: i -> noise [N, C, h, w] that a stochastic sampler adds after step i; None for the seeds'.
        weighted: whether `(words:1.3)` in a prompt counts by that factor.
        clip_skip: how many of the text encoder's last layers prompts do without; negative prompts take all.
        tiling: how the VAE sees images; None for whole ones.
    """

    plan: SamplingPlan
    chunks: Sequence[Chunk]
    size: tuple[int, int]
    pixels: tuple[int, int]
    images: InputImages = InputImages()
    sizes: tuple[Sequence[int] | None, Sequence[int], Sequence[int] | None] = (None, (0, 0), None)
    scores: tuple[float, float] = (6.0, 2.5)
    latents: Any = None
    renoise: Callable[[int], Any] | None = None
    weighted: bool = False
    clip_skip: int = 0
    tiling: VaeTiling | None = None

    @property
    def seeds(self) -> list[int]:
        return [seed for chunk in self.chunks for seed in chunk.seeds]

    @property
    def total(self) -> int:
        """Number of images."""
        return len(self.seeds)


def complete(
    manifest: Manifest,
    plan: SamplingPlan,
    prompt: str | Sequence[str],
    negative: str | Sequence[str] | None,
    per_prompt: int,
    seed: int | Sequence[int],
    *,
    height: int | None,
    width: int | None,
    latents: Any,
    inputs: InputImages,
    tiling: VaeTiling | None = None,
    **kept: Any,
) -> Request:
    """The request of a call, split into what this bundle makes at once.

    Args:
        manifest: with the shapes that the engines take.
        tiling: how the VAE sees images; None for whole ones, which its networks have to take.
        kept: further fields of the request.

    Raises:
        UserError: for arguments that do not fit each other or the bundle's profile.
    """
    texts, negatives = prompts(prompt, negative, per_prompt)
    if negatives and any(text.strip() for text in negatives) and not plan.guided:
        why = "this model takes guidance as an input" if plan.guidance > 1 else f"guidance_scale is {plan.guidance:g}"
        why = "there is no guidance" if manifest.edits else why
        warnings.warn(f"the negative prompt has no effect, because {why} (it counts above 1)", Notice, stacklevel=4)
    if plan.resumes and (latents is None or inputs.image is not None):
        text = "denoising_start goes on with the latents of another run" + ("" if latents is None else ", not an image")
        raise UserError(text, 'pass latents=base(..., denoising_end=0.8, output_type="latent").latents')
    if plan.stop is not None and inputs.mask is not None:
        raise UserError("denoising_end with a mask is not supported", "leave one of them out")
    if manifest.refines and inputs.image is None and not plan.resumes:
        fix = "image=..., or denoising_start=0.8 and the latents that a base model left there"
        raise UserError("this model refines images: it needs one to start from", fix)
    if inputs.image is not None and "vae_encoder" not in manifest.components:
        name = manifest.source["name"]
        raise UserError(
            f"this bundle of {name} has no vae_encoder, so it starts from no image", "export the model again"
        )
    if latents is not None:
        latents = own_latents(manifest, latents, len(texts))
    numbers = seeds(seed, len(texts))
    size = latent_size(manifest, height, width, latents, tiled=tiling is not None)
    limit = images_per_run(manifest, plan)
    pixels = tuple(side * manifest.pipeline["vae_scale"] for side in size)
    if tiling is not None:
        used = ["vae_decoder"] + ["vae_encoder"] * (inputs.image is not None and "vae_encoder" in manifest.components)
        for name in used:
            tiling.check(manifest.components[name], *pixels)
    for given in (inputs.image, inputs.mask, *(each.image for each in inputs.shown.values())):
        if given is not None:
            images.batch(given, len(texts), pixels)  # before any network runs
    if inputs.prompt is not None:
        inputs = replace(inputs, prompt=image_prompts(manifest, inputs.prompt, len(texts)))
    return Request(
        plan=plan,
        chunks=[
            Chunk(rows, texts[rows], negatives and negatives[rows], numbers[rows])
            for rows in (slice(i, i + limit) for i in range(0, len(texts), limit))
        ],
        size=size,
        pixels=pixels,
        images=inputs,
        latents=latents,
        tiling=tiling,
        **kept,
    )


def clip_skip(manifest: Manifest, given: int | None) -> int:
    """How many of the text encoder's last layers prompts do without: the bundle's own number where none is given.

    Raises:
        UserError: for a number of layers that this bundle's text encoders have no output for.
    """
    skip = manifest.pipeline.get("clip_skip", 0) if given is None else given
    for name in KINDS["text_encoder"].names:
        if skip and name in manifest.components:
            outputs = [spec.name for spec in manifest.components[name].outputs]
            layers = sum(output.startswith("hidden_states.") for output in outputs)
            if skip < 0 or hidden_state(layers, skip) not in outputs:
                known = [output.removeprefix("clip_skip.") for output in outputs if output.startswith("clip_skip.")]
                known = ["0", *(known or map(str, range(1, layers)))]
                raise UserError(
                    f"invalid clip_skip: {skip} (this bundle's {name} can do: {', '.join(known)})",
                    # All layers are there already, or the export says how many there are.
                    "give one of these"
                    if layers or skip < 0 or not manifest.components[name].graph
                    else f"accel export MODEL OUT --clip-skip {skip}",
                )
    return skip


def images_per_run(manifest: Manifest, plan: SamplingPlan) -> int:
    """How many images the UNet and the decoder can make at once."""
    batch = manifest.components["unet"].dims["batch"]
    images = manifest.components["vae_decoder"].dims["images"]
    if batch.fixed and batch.min != images.min * plan.rows:
        raise UserError(
            f"this bundle's UNet takes a fixed batch of {batch.min}, which does not fit guidance {plan.guidance:g}",
            "export with --profile native (a range), or with the --guidance you want to run",
        )
    return min(batch.max // plan.rows, images.max)


def own_latents(manifest: Manifest, latents: Any, count: int) -> np.ndarray:
    """Initial latents as float32 numpy.

    Raises:
        UserError: for another shape than [images, channels, height, width], integers, and what is not finite.
    """
    channels = manifest.pipeline["latent_channels"]
    shape, dtype = tuple(latents.shape), str(latents.dtype).removeprefix("torch.")
    fix = f"give noise of unit variance, [{count}, {channels}, height / {manifest.pipeline['vae_scale']}, width / ...]"
    if len(shape) == 4 and shape[0] != count:
        raise UserError(f"{shape[0]} latents for {count} images", "give one per image")
    if len(shape) != 4 or shape[1] != channels:
        raise UserError(f"latents of shape {shape}, where this model's have {channels} channels", fix)
    if "float" not in dtype:
        raise UserError(f"latents of {dtype} (expected float32)", fix)
    if dtype == "float64":
        warnings.warn("the latents are float64 and are rounded to float32", Notice, stacklevel=5)
    made = np.asarray(to_numpy(latents.float() if is_torch(latents) else latents), np.float32)
    if not np.isfinite(made).all():
        raise UserError("the latents hold NaN or infinite values", fix)
    return made


_TILES = "vae_tiling=True (accel run: --vae-tiling) decodes in tiles"


def side_limits(manifest: Manifest, side: str, tiled: bool = False) -> Range:
    """Which heights or widths, in pixels, the UNet takes, and the decoder unless it sees tiles."""
    unet = manifest.components["unet"].dims[f"latent_{side}"].scaled(manifest.pipeline["vae_scale"])
    decoder = manifest.components["vae_decoder"].dims[side]
    both = unet if tiled else unet.common(decoder)
    if both is None:
        raise UserError(f"the UNet takes a {side} of {unet}, and the VAE decoder {decoder}", _TILES)
    return both


def latent_size(
    manifest: Manifest, height: int | None, width: int | None, latents: Any, *, tiled: bool = False
) -> tuple[int, int]:
    """Latent height and width, checked against what the networks take.

    Args:
        tiled: whether the VAE sees tiles, so that the UNet alone decides.
    """
    profile, scale = manifest.profile, manifest.pipeline["vae_scale"]
    natives = dict(zip(("height", "width"), native_sides(manifest.pipeline["native_size"]), strict=True))
    sides: list[int] = []
    for name, value, axis in (("height", height, -2), ("width", width, -1)):
        limits, native = side_limits(manifest, name, tiled), natives[name]
        own = None if latents is None else latents.shape[axis] * scale
        if None not in (value, own) and value != own:
            raise UserError(
                f"{name} is {value}, and the latents of shape {latents.shape} make it {own}", f"leave {name} out"
            )
        if value is None:
            value = own or (native if limits.admits(native) else limits.opt)
        if not limits.admits(value):
            ways = [f"give a {name} of {limits}"]
            if manifest.components["unet"].graph:
                ways.append("or export with another --profile (such as dynamic)")
            if not tiled and side_limits(manifest, name, True).admits(value):
                ways = [_TILES, *ways]
            here = "" if own is None else f" (latents of shape {latents.shape} make it so)"
            raise UserError(f"{name} {value} is outside profile {profile.name!r} ({limits}){here}", ", ".join(ways))
        sides.append(value // scale)
    return sides[0], sides[1]


def prompts(prompt: str | Sequence[str], negative: Any, per_prompt: int) -> tuple[list[str], list[str] | None]:
    """One prompt for each image, and one negative prompt where there are any."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("there is no prompt", "give at least one text")
    if per_prompt < 1:
        raise UserError(f"invalid num_images_per_prompt: {per_prompt} (expected an integer >= 1)", "such as 1")
    negatives = None
    if negative is not None:
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise UserError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts", "give one, or one per prompt"
            )
        negatives = [text for text in negatives for _ in range(per_prompt)]
    return [text for text in prompts for _ in range(per_prompt)], negatives


def seeds(seed: int | Sequence[int], images: int) -> list[int]:
    """One seed for each image: those given, or counted on from one."""
    seeds = [seed + i for i in range(images)] if isinstance(seed, (int, np.integer)) else list(seed)
    if len(seeds) != images or any(s < 0 for s in seeds):
        raise UserError(f"invalid seed: {seed!r} for {images} images", "give one number >= 0, or one for each image")
    return seeds


@dataclass
class Clock:
    """Adds up wall time by phase."""

    seconds: dict[str, float] = field(
        default_factory=lambda: {"text_encoder": 0.0, "unet": 0.0, "vae_decoder": 0.0, "total": 0.0}
    )

    def add(self, name: str, spent: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self.seconds["total"] += spent
