"""A request to a pipeline, complete and checked before any network runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import images
from ..arrays import is_torch
from ..bundle import Manifest
from ..bundle.shape_profiles import Range, native_sides
from ..engines.base import to_numpy
from ..errors import Notice, UserError
from ..sampling import Sampling
from ..sampling import samplers as sampler
from ..sampling.linear import Table
from ..sampling.noise_schedule import NoiseSchedule
from .tiling import VaeTiling


@dataclass(frozen=True)
class SamplingPlan:
    """How to sample.

    Attributes:
        timesteps: the full grid, one for each call of the UNet; `start` leading ones are skipped (image to image).
        guided: whether the UNet runs on a doubled batch.
        table: the sampler's coefficients, from `start` on; None for one with a loop of its own.
    """

    sampler: str
    timesteps: list[float]
    guidance: float
    guided: bool
    start: int = 0
    table: Table | None = None

    def noised(self, schedule: NoiseSchedule, x0: Any, eps: Any, i: int) -> Any:
        """An image with the noise that the state has before row i; arrays of one shape and dtype."""
        if self.table is None:
            return sampler.add_noise(schedule, x0, eps, self.timesteps[i])
        return self.table.noised(x0, eps, i)

    @property
    def steps(self) -> int:
        return len(self.timesteps) - self.start


@dataclass(frozen=True)
class Chunk:
    """The images that are made at once: `rows` of the request."""

    rows: slice
    prompts: list[str]
    negatives: list[str] | None
    seeds: list[int]


@dataclass(frozen=True)
class InputImages:
    """Images to start from, as `accel.images.batch` takes them.

    Attributes:
        image: what to start from.
        mask: white where to paint.
        strength: share of the steps that are run, above 0 to 1; None for 0.8, and for 1 with a mask.
        control: what a T2I-Adapter or ControlNet is shown.
        control_scale: how strongly it counts.
        control_end: fraction of the steps that it counts for.
    """

    image: Any = None
    mask: Any = None
    strength: float | None = None
    control: Any = None
    control_scale: float = 1.0
    control_end: float = 1.0

    def __post_init__(self) -> None:
        if self.image is not None and self.strength is None:
            object.__setattr__(self, "strength", 0.8 if self.mask is None else 1.0)
        if self.image is None and self.strength is not None:
            raise UserError(f"strength {self.strength:g} without an image", "give the image to start from as well")
        if self.mask is not None and self.image is None:
            raise UserError("a mask without an image", "give the image that is to be painted in as well")
        if not np.isfinite(self.control_scale):
            raise UserError(f"invalid control_scale = {self.control_scale} (expected a number)", "such as 0.8")
        if not 0 <= self.control_end <= 1:
            raise UserError(f"invalid control_end = {self.control_end} (expected 0 to 1)", "such as 0.5")


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
        latents: initial noise [N, C, h, w] of unit variance; None for the seeds'.
        renoise: i -> noise [N, C, h, w] that a stochastic sampler adds after step i; None for the seeds'.
        weighted: whether `(words:1.3)` in a prompt counts by that factor.
        tiling: how the VAE sees images; None for whole ones.
    """

    plan: SamplingPlan
    chunks: Sequence[Chunk]
    size: tuple[int, int]
    pixels: tuple[int, int]
    images: InputImages = InputImages()
    sizes: tuple[Sequence[int] | None, Sequence[int], Sequence[int] | None] = (None, (0, 0), None)
    latents: Any = None
    renoise: Callable[[int], Any] | None = None
    weighted: bool = False
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
        warnings.warn(f"the negative prompt has no effect, because {why} (it counts above 1)", Notice, stacklevel=4)
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
    for given in (inputs.image, inputs.mask, inputs.control):
        if given is not None:
            images.batch(given, len(texts), pixels)  # before any network runs
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


def plan(
    manifest: Manifest,
    schedule: NoiseSchedule,
    name: str | None,
    steps: int | None,
    timesteps: Sequence[float] | None,
    guidance: float | None,
    strength: float | None,
    options: Mapping[str, Any] | None = None,
) -> SamplingPlan:
    """The sampler, its grid and guidance: the bundle's own constants where an argument is None.

    Args:
        options: of the sampler (`accel.sampling.constants.OPTIONS`); those that are None are the bundle's own.

    Raises:
        UserError: for an unknown sampler, or a value outside its limits.
    """
    own = Sampling.from_dict(manifest.sampler, "the bundle's sampler")
    name = name or own.sampler
    entry = sampler.named(name)
    if timesteps is not None and steps not in (None, len(timesteps)):
        raise UserError(f"steps = {steps}, and {len(timesteps)} timesteps are given", "give one of the two")
    given = {option: value for option, value in (options or {}).items() if value is not None}
    if "eta" not in entry.options and given.get("eta") == 0:
        del given["eta"]  # asks for nothing, as diffusers' callers do
    if name == own.sampler:
        given = dict(own.options) | given
        if timesteps is None and steps is None:
            timesteps, steps = own.timesteps, own.steps
    scale = float(own.guidance if guidance is None else guidance)
    if not 0 <= scale < float("inf"):
        raise UserError(
            f"invalid guidance_scale: {scale} (expected >= 0)", "use 0 for none, 3 to 12 for a guided model"
        )
    embedded = any(spec.name == "timestep_cond" for spec in manifest.components["unet"].inputs)
    count = len(timesteps) if timesteps is not None else entry.steps if steps is None else steps
    start = 0 if strength is None else _start(count, strength) * entry.order
    made = None
    if entry.rows is not None:
        made = sampler.table(name, schedule, steps, timesteps=timesteps, start=start, **given)
        timesteps = made.timesteps
    elif timesteps is None:
        timesteps = sampler.grid(name, schedule, steps)
    if name != own.sampler and (unread := sampler.unread_fields(name, schedule.config)):
        fields = ", ".join(f"{field} = {value!r}" for field, value in unread.items())
        warnings.warn(f"sampler {name} does not read the scheduler's {fields}", Notice, stacklevel=3)
    return SamplingPlan(name, list(timesteps), scale, scale > 1 and not embedded, start, made)


def _start(steps: int, strength: float) -> int:
    """How many steps of the grid a strength skips (SDEdit, arXiv 2108.01073, counted as diffusers does)."""
    if not 0 < strength <= 1:
        raise UserError(
            f"invalid strength = {strength:g} (expected above 0, at most 1)", "1 keeps nothing of the image"
        )
    start = steps - min(int(steps * strength), steps)
    if start == steps:
        raise UserError(
            f"strength {strength:g} of {steps} steps leaves no step to run",
            f"use a strength of at least {np.ceil(100 / steps) / 100:g}, or more steps",
        )
    return start


def images_per_run(manifest: Manifest, plan: SamplingPlan) -> int:
    """How many images the UNet and the decoder can make at once."""
    batch = manifest.components["unet"].dims["batch"]
    images = manifest.components["vae_decoder"].dims["images"]
    doubled = 2 if plan.guided else 1
    if batch.fixed and batch.min != images.min * doubled:
        raise UserError(
            f"this bundle's UNet takes a fixed batch of {batch.min}, which does not fit guidance {plan.guidance:g}",
            "export with --profile native (a range), or with the --guidance you want to run",
        )
    return min(batch.max // doubled, images.max)


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


def _limits(manifest: Manifest, side: str, tiled: bool) -> Range:
    """Which heights or widths, in pixels, the UNet takes, and the decoder unless it sees tiles."""
    unet = manifest.components["unet"].dims[f"latent_{side}"].scaled(manifest.pipeline["vae_scale"])
    decoder = manifest.components["vae_decoder"].dims[side]
    both = unet if tiled else unet.common(decoder)
    if both is None:
        raise UserError(
            f"the UNet takes a {side} of {unet}, and the VAE decoder {decoder}",
            "vae_tiling=True (accel run: --vae-tiling) decodes in tiles",
        )
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
        limits, own, native = (
            _limits(manifest, name, tiled),
            None if latents is None else latents.shape[axis] * scale,
            natives[name],
        )
        if None not in (value, own) and value != own:
            raise UserError(
                f"{name} is {value}, and the latents of shape {latents.shape} make it {own}", f"leave {name} out"
            )
        if value is None:
            value = own or (native if limits.admits(native) else limits.opt)
        if not limits.admits(value):
            exported = (
                "" if not manifest.components["unet"].graph else ", or export with another --profile (such as dynamic)"
            )
            here = "" if own is None else f" (latents of shape {latents.shape} make it so)"
            raise UserError(
                f"{name} {value} is outside profile {profile.name!r} ({limits}){here}",
                f"give a {name} of {limits}{exported}",
            )
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
