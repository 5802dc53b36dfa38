"""Prompt to image, on any engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import conditioning, noise, sampler
from .arrays import cast, concat, synchronize
from .bundle import Bundle
from .engines import Engine, choose, load_engine
from .engines.base import to_numpy
from .errors import UserError
from .tokenizer import ClipTokenizer

OUTPUT_TYPES = ("pil", "np", "latent")
StepCallback = Callable[[int, float, Any], None]


@dataclass(frozen=True)
class Output:
    """What a pipeline returns.

    Attributes:
        images: PIL images; or float32 numpy [N, H, W, 3] in [0, 1]; or latents [N, C, h, w].
        latents: float32 numpy [N, C, h, w], as the sampler left them.
        seeds: the seed of each image.
        seconds: wall time of `text_encoder`, `unet` (all steps), `vae_decoder` and `total`.
    """

    images: Any
    latents: np.ndarray
    seeds: list[int]
    seconds: dict[str, float]


def load(
    bundle: str | Path | Bundle, engine: str | Mapping[str, str] = "auto", *, verify: bool = True, **options: Any
) -> Pipeline:
    """Load a bundle as a pipeline that is called like diffusers': `load("my-bundle")("a cat", seed=0).images`.

    Args:
        bundle: a bundle or its folder.
        engine: a name, "auto", or one per component such as {"unet": "openvino", "vae_decoder": "onnxruntime"}
            (components that are not named use "auto").
        verify: compare files with the manifest's digests first.
        options: the engine's own options (device, dtype, provider, threads, ...).

    Raises:
        UserError: when the bundle is damaged or incomplete, or the engine cannot run here.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    names = [name for name in ("text_encoder", "text_encoder_2") if name in bundle.manifest.components]
    wanted = [*(names or ["text_encoder"]), "unet", "vae_decoder"]
    by_component = engine if isinstance(engine, Mapping) else dict.fromkeys(wanted, engine)
    unknown = set(by_component) - set(bundle.manifest.components)
    if unknown and isinstance(engine, Mapping):
        raise UserError(f"{bundle.path} has no component {unknown.pop()!r}", f"it has: {', '.join(wanted)}")
    if verify:
        bundle.verify([*wanted, "tokenizer", "tokenizer_2", "scheduler"])
    engines = {
        name: load_engine(bundle, name, choose(by_component.get(name, "auto")), verify=verify, **options)
        for name in wanted
    }
    return Pipeline(bundle, engines)


class Pipeline:
    """A loaded bundle. Make one with `accel.load`.

    Attributes:
        bundle: where it came from; `bundle.manifest.sampler` holds the default steps and guidance.
        engines: the loaded components by name.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]):
        self.bundle = bundle
        self.engines = dict(engines)
        self.schedule = sampler.NoiseSchedule.from_folder(bundle.path / "scheduler")
        self.tokenizers = {
            name: ClipTokenizer.from_folder(bundle.path / name.replace("text_encoder", "tokenizer"))
            for name in engines
            if name.startswith("text_encoder")
        }

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        latents: Any = None,
        renoise: Callable[[int], Any] | None = None,
        output_type: str = "pil",
        callback: StepCallback | None = None,
        progress: bool = False,
    ) -> Output:
        """Make images.

        Args:
            prompt: one text or several.
            negative_prompt: what to steer away from (with guidance): one text, or one per prompt.
            height, width: pixels, within the bundle's profile; None for the model's own size.
            sampler, steps, timesteps, guidance_scale: how to sample; None for the bundle's own constants.
            num_images_per_prompt: images per prompt.
            seed: of the first image (the others count on from it), or one per image. The same seed gives the same
                noise on every engine.
            latents: initial noise [N, C, h, w] with unit variance, instead of a seed's.
            renoise: i -> noise [N, C, h, w] that a few-step sampler adds after step i, instead of a seed's.
            output_type: "pil", "np" or "latent".
            callback: called as (i, t, x) after each step with the latents so far.
            progress: show a progress bar on stderr.

        Raises:
            UserError: for arguments that do not fit each other or the bundle's profile.
        """
        manifest = self.bundle.manifest
        constants = manifest.pipeline
        plan = self._plan(sampler, steps, timesteps, guidance_scale)
        prompts, negatives = _prompts(prompt, negative_prompt, num_images_per_prompt)
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"unknown output_type {output_type!r}", f"one of: {', '.join(OUTPUT_TYPES)}")
        if latents is not None and tuple(latents.shape)[0] != len(prompts):
            raise UserError(f"{tuple(latents.shape)[0]} latents for {len(prompts)} images", "give one per image")
        seeds = _seeds(seed, len(prompts))
        size = self._size(height, width, latents)
        limit = self._images_per_run(plan)
        bar = _Bar(progress, plan.steps * -(-len(prompts) // limit))
        parts, clock = [], _Clock()
        with bar:
            for start in range(0, len(prompts), limit):
                rows = slice(start, start + limit)
                chunk = _Chunk(prompts[rows], negatives and negatives[rows], seeds[rows], size, rows)
                parts.append(self._run(chunk, plan, latents, renoise, callback, bar, clock, output_type == "latent"))
        final = np.concatenate([part[0] for part in parts])
        if not np.isfinite(final).all():
            raise UserError(
                "the picture is NaN or infinite",
                "this precision overflows on this model: export with --precision fp32, or use another dtype",
            )
        if output_type == "latent":
            return Output(final, final, seeds, clock.seconds)
        pixels = np.concatenate([part[1] for part in parts]).transpose(0, 2, 3, 1)
        pixels = np.clip(pixels.astype(np.float32) / 2 + 0.5, 0, 1)
        assert pixels.shape[1] == (size[0] * constants["vae_scale"])
        return Output(pixels if output_type == "np" else to_pil(pixels), final, seeds, clock.seconds)

    def _plan(self, name, steps, timesteps, guidance) -> _Plan:
        own = self.bundle.manifest.sampler
        name = name or own["name"]
        if timesteps is None and steps is None and name == own["name"]:
            timesteps, steps = own.get("timesteps"), own.get("steps")
        if timesteps is None:
            timesteps = sampler.grid(name, self.schedule, steps)
        scale = float(own["guidance"] if guidance is None else guidance)
        if not 0 <= scale < float("inf"):
            raise UserError(f"guidance_scale = {scale} makes no sense", "use 0 for none, 3 to 12 for a guided model")
        embedded = any(spec.name == "timestep_cond" for spec in self.engines["unet"].component.inputs)
        return _Plan(name, list(timesteps), scale, guided=scale > 1 and not embedded)

    def _images_per_run(self, plan: _Plan) -> int:
        """How many images the UNet and the decoder can make at once."""
        batch = self.engines["unet"].component.dims["batch"]
        images = self.engines["vae_decoder"].component.dims["images"]
        doubled = 2 if plan.guided else 1
        if batch.fixed and batch.min != images.min * doubled:
            raise UserError(
                f"this bundle's UNet takes a fixed batch of {batch.min}, which does not fit guidance {plan.guidance:g}",
                "export with --profile native (a range), or with the --guidance you want to run",
            )
        return min(batch.max // doubled, images.max)

    def _size(self, height: int | None, width: int | None, latents: Any) -> tuple[int, int]:
        """Latent height and width, checked against the profile."""
        constants = self.bundle.manifest.pipeline
        profile, scale = self.bundle.manifest.profile, constants["vae_scale"]
        dims = self.engines["vae_decoder"].component.dims
        if latents is not None:
            height = height or latents.shape[-2] * scale
            width = width or latents.shape[-1] * scale
        sides = []
        for name, value in (("height", height), ("width", width)):
            limits = dims[name]
            native = constants["native_size"]
            if value is None:
                value = native if limits.admits(native) else limits.opt
            if not limits.admits(value):
                raise UserError(
                    f"{name} {value} is outside profile {profile.name!r} ({limits})",
                    f"use --{name} within that, or export with another --profile (such as dynamic)",
                )
            sides.append(value // scale)
        return sides[0], sides[1]

    def _run(self, chunk: _Chunk, plan: _Plan, latents, renoise, callback, bar, clock, latent_only):
        unet, constants = self.engines["unet"], self.bundle.manifest.pipeline
        with clock("text_encoder"):
            feeds = self._condition(chunk, plan)
            synchronize(feeds["encoder_hidden_states"])
        shape = (constants["latent_channels"], *chunk.size)
        x = latents[chunk.rows] if latents is not None else noise.normal(chunk.seeds, 0, shape)
        x = cast(unet.array(x), "float32")
        spec = {s.name: s for s in unet.component.inputs}
        dtype = spec["sample"].dtype

        def model(x, t):
            sample = cast(concat([x, x]) if plan.guided else x, dtype)
            out = unet(sample=sample, timestep=np.asarray(t, spec["timestep"].dtype), **feeds)["out_sample"]
            out = cast(out, "float32")
            if not plan.guided:
                return out
            without, with_prompt = out[: len(x)], out[len(x) :]
            return without + plan.guidance * (with_prompt - without)

        def fresh(i):
            if renoise is not None:
                return cast(unet.array(renoise(i)[chunk.rows]), "float32")
            return unet.array(noise.normal(chunk.seeds, i + 1, shape))

        def after(i, t, x):
            bar.advance()
            if callback is not None:
                callback(i, t, x)

        with clock("unet"):
            x = sampler.sample(
                plan.sampler, model, x, self.schedule, timesteps=plan.timesteps, noise=fresh, callback=after
            )
            synchronize(x)
        pixels = None
        if not latent_only:
            with clock("vae_decoder"):
                pixels = self._decode(x)
        return to_numpy(x), pixels

    def _condition(self, chunk: _Chunk, plan: _Plan) -> dict[str, Any]:
        """Everything but sample and timestep that the UNet takes, for the whole (doubled) batch, in its own dtypes."""
        encoders = {name: (self.tokenizers[name], self.engines[name]) for name in self.tokenizers}
        feeds = self._encode(encoders, chunk.prompts)
        if plan.guided:
            texts = chunk.negatives or [""] * len(chunk.prompts)
            without = self._encode(encoders, texts)
            if chunk.negatives is None and self.bundle.manifest.pipeline["zero_empty_prompt"]:
                without = {name: value * 0 for name, value in without.items()}
            feeds = {name: concat([without[name], value]) for name, value in feeds.items()}
        unet = self.engines["unet"]
        batch = len(chunk.prompts) * (2 if plan.guided else 1)
        scale = self.bundle.manifest.pipeline["vae_scale"]
        for spec in unet.component.inputs:
            if spec.name == "time_ids":
                feeds["time_ids"] = conditioning.time_ids(batch, *(side * scale for side in chunk.size))
            elif spec.name == "timestep_cond":
                feeds["timestep_cond"] = conditioning.guidance_embedding(batch, plan.guidance, spec.shape[-1])
        dtypes = {spec.name: spec.dtype for spec in unet.component.inputs}
        return {name: cast(unet.array(value), dtypes[name]) for name, value in feeds.items()}

    @staticmethod
    def _encode(encoders, prompts: Sequence[str]) -> dict[str, Any]:
        """Each distinct text is encoded once, within the text encoder's own batch limit."""
        distinct = list(dict.fromkeys(prompts))
        limit = min(engine.component.dims["images"].max for _, engine in encoders.values())
        runs = [conditioning.encode(encoders, distinct[i : i + limit]) for i in range(0, len(distinct), limit)]
        index = [distinct.index(prompt) for prompt in prompts]
        return {name: concat([run[name] for run in runs])[index] for name in runs[0]}

    def _decode(self, x: Any) -> np.ndarray:
        """Latents to pixels, float numpy [N, 3, H, W] in about [-1, 1]."""
        constants, vae = self.bundle.manifest.pipeline, self.engines["vae_decoder"]
        z = x * (1.0 / constants["scaling_factor"]) + constants["shift_factor"]
        (spec,) = vae.component.inputs
        return to_numpy(vae(latent_sample=cast(vae.array(z), spec.dtype))["sample"])


@dataclass(frozen=True)
class _Plan:
    sampler: str
    timesteps: list[float]
    guidance: float
    guided: bool

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class _Chunk:
    prompts: list[str]
    negatives: list[str] | None
    seeds: list[int]
    size: tuple[int, int]
    rows: slice


class _Clock:
    """Adds up wall time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"text_encoder": 0.0, "unet": 0.0, "vae_decoder": 0.0, "total": 0.0}

    def __call__(self, name: str) -> _Clock:
        self.name = name
        return self

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        spent = time.perf_counter() - self.started
        self.seconds[self.name] += spent
        self.seconds["total"] += spent


class _Bar:
    """A progress bar over steps, or nothing at all."""

    def __init__(self, show: bool, total: int):
        self.bar = None
        if show:
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("sampling", total=total)

    def __enter__(self) -> None:
        if self.bar:
            self.bar.start()

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self) -> None:
        if self.bar:
            self.bar.advance(self.task)


def _prompts(prompt, negative, per_prompt: int) -> tuple[list[str], list[str] | None]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UserError("there is no prompt", "give at least one text")
    if per_prompt < 1:
        raise UserError(f"num_images_per_prompt = {per_prompt}", "use a whole number of at least 1")
    negatives = None
    if negative is not None:
        negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(negatives) != len(prompts):
            raise UserError(
                f"{len(negatives)} negative prompts for {len(prompts)} prompts", "give one, or one per prompt"
            )
        negatives = [text for text in negatives for _ in range(per_prompt)]
    return [text for text in prompts for _ in range(per_prompt)], negatives


def _seeds(seed: int | Sequence[int], images: int) -> list[int]:
    seeds = [seed + i for i in range(images)] if isinstance(seed, (int, np.integer)) else list(seed)
    if len(seeds) != images or any(s < 0 for s in seeds):
        raise UserError(f"seed = {seed!r} for {images} images", "use one number of at least 0, or one per image")
    return seeds


def to_pil(pixels: np.ndarray) -> list[Any]:
    """PIL images of float pixels [N, H, W, 3] in [0, 1]."""
    from PIL import Image

    return [Image.fromarray((image * 255).round().astype(np.uint8)) for image in pixels]
