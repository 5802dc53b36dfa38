"""Prompt to image, on any engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import cast, concat, synchronize
from ..bundle import Bundle, Manifest
from ..bundle.kinds import KINDS, control_components
from ..engines import Engine, load_engine
from ..engines.base import to_numpy
from ..errors import UserError
from ..images import to_pil
from ..sampling import noise
from ..sampling import samplers as sampler
from ..sampling.linear import run
from . import conditioning, control, request
from .initial_latents import Start
from .initial_latents import start as start_from
from .lazy_engines import LazyEngines
from .request import Chunk, Clock, InputImages, Request
from .tokenizer import ClipTokenizer

OUTPUT_TYPES = ("pil", "np", "latent")
TEXT_ENCODERS = KINDS["text_encoder"].names
StepCallback = Callable[[int, float, Any], None]


@dataclass(frozen=True)
class Output:
    """What a pipeline returns.

    Attributes:
        images: PIL images; or float32 numpy [N, H, W, 3] in [0, 1]; or latents [N, C, h, w].
        latents: float32 numpy [N, C, h, w], as the sampler left them.
        seeds: the seed of each image.
        seconds: wall time of `text_encoder`, `unet` (all steps), `vae_decoder` and `total`; with an image to start
            from also `vae_encoder`.
    """

    images: Any
    latents: np.ndarray
    seeds: list[int]
    seconds: dict[str, float]


def component_names(bundle: Bundle) -> list[str]:
    """The components that make an image, in the order in which it needs them.

    Raises:
        UserError: where the bundle lacks one of them.
    """
    for name, kind in KINDS.items():
        if kind.use == "always":
            bundle.component(name)  # says what is missing
    return _present(bundle, "always", "if present")


def _present(bundle: Bundle, *uses: str) -> list[str]:
    """The components of a bundle that are used so, see `accel.bundle.kinds.Kind.use`."""
    names = [name for kind in KINDS.values() if kind.use in uses for name in kind.names]
    return [name for name in names if name in bundle.manifest.components]


def load(
    bundle: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    verify: bool = True,
    low_memory: bool = False,
    **options: Any,
) -> Pipeline:
    """Load a bundle as a pipeline that is called like diffusers': `load("my-bundle")("a cat", seed=0).images`.

    Args:
        bundle: a bundle or its folder.
        engine: a name, "auto", or one per component such as {"unet": "openvino", "vae_decoder": "onnxruntime"}
            (components that are not named use "auto").
        verify: compare files with the manifest's digests first.
        low_memory: load each component when its phase begins and give its memory back when it ends. Every image
            then waits for the loading again; peak memory is that of the largest phase.
        options: the engine's own options (device, dtype, provider, threads, ...).

    Raises:
        UserError: when the bundle is damaged or incomplete, or the engine cannot run here.
    """
    if not isinstance(bundle, Bundle):
        bundle = Bundle.open(bundle)
    wanted = component_names(bundle)
    later = _present(bundle, "on demand")
    by_component = engine if isinstance(engine, Mapping) else dict.fromkeys([*wanted, *later], engine)
    unknown = set(by_component) - set(bundle.manifest.components)
    if unknown and isinstance(engine, Mapping):
        raise UserError(f"{bundle.path} has no component {unknown.pop()!r}", f"it has: {', '.join(wanted)}")
    if verify:
        bundle.verify([*(bundle.component(name).folder for name in wanted), "tokenizer", "tokenizer_2", "scheduler"])
    loaders = {
        name: partial(load_engine, bundle, name, by_component.get(name, "auto"), verify=verify, **options)
        for name in [*wanted, *later]
    }
    engines = LazyEngines(loaders, offload=low_memory)
    if not low_memory:
        for name in wanted:  # the others, such as the VAE encoder, wait for their first use
            engines[name]
    return Pipeline(bundle, engines)


class Pipeline:
    """A loaded bundle. Make one with `accel.load`.

    Attributes:
        bundle: where it came from; `bundle.manifest.sampler` holds the default steps and guidance.
        engines: the components by name.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]):
        self.bundle = bundle
        loaded = {name: partial(engines.__getitem__, name) for name in engines}
        self.engines = engines if isinstance(engines, LazyEngines) else LazyEngines(loaded)
        self.schedule = sampler.NoiseSchedule.from_folder(bundle.path / "scheduler")
        self.tokenizers = {
            name: ClipTokenizer.from_folder(bundle.path / name.replace("text_encoder", "tokenizer"))
            for name in engines
            if name in TEXT_ENCODERS
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
        eta: float | None = None,
        sigmas: str | None = None,
        timestep_spacing: str | None = None,
        shift: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] = 0,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        control_image: Any = None,
        control_scale: float = 1.0,
        control_end: float = 1.0,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] = (0, 0),
        target_size: Sequence[int] | None = None,
        prompt_weights: bool = False,
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
            eta, sigmas, timestep_spacing, shift: more of the sampler (`accel.sampling.samplers.table`); None for what
                the bundle and its scheduler config say.
            num_images_per_prompt: images per prompt.
            seed: of the first image (the others count on from it), or one per image. The same seed gives the same
                noise on every engine.
            image: an image to start from, or one per image (`accel.images.batch`).
            mask_image: white where to paint, black where the image is kept.
            strength: how much of the image is given up, above 0 to 1: the share of the steps that are run. None for
                0.8, and for 1 with a mask.
            control_image: what the bundle's T2I-Adapter or ControlNet is shown.
            control_scale: how strongly it counts (0.8 for DMD2 with a canny adapter).
            control_end: share of the steps that it counts for (an adapter's conditioning factor; 0.5 for DMD2).
            original_size, crop, target_size: SDXL's size conditioning in pixels, (height, width) and (top, left);
                None for the image's own size.
            prompt_weights: let `(words:1.3)` in prompts count by that factor (`accel.pipeline.prompts`).
            latents: initial noise [N, C, h, w] with unit variance, instead of a seed's.
            renoise: i -> noise [N, C, h, w] that a few-step sampler adds after step i, instead of a seed's.
            output_type: "pil", "np" or "latent".
            callback: called as (i, t, x) after each step with the latents so far.
            progress: show a progress bar on stderr.

        Raises:
            UserError: for arguments that do not fit each other or the bundle's profile.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"unknown output_type {output_type!r}", f"one of: {', '.join(OUTPUT_TYPES)}")
        images = InputImages(image, mask_image, strength, control_image, control_scale, control_end)
        manifest = self.bundle.manifest
        options = dict(eta=eta, sigmas=sigmas, timestep_spacing=timestep_spacing, shift=shift)
        plan = request.plan(
            manifest, self.schedule, sampler, steps, timesteps, guidance_scale, images.strength, options
        )
        made = request.complete(
            self._limits(),
            plan,
            prompt,
            negative_prompt,
            num_images_per_prompt,
            seed,
            height=height,
            width=width,
            latents=latents,
            images=images,
            sizes=(original_size, crop, target_size),
            renoise=renoise,
            weighted=prompt_weights,
        )
        run = _Run(self, made)
        final, pixels = run(callback, progress, decode=output_type != "latent")
        if not np.isfinite(final).all() or pixels is not None and not np.isfinite(pixels).all():
            raise UserError(
                "the image is NaN or infinite",
                "this precision overflows on this model: export with --precision fp32, or use another dtype",
            )
        if pixels is None:
            return Output(final, final, made.seeds, run.clock.seconds)
        pixels = np.clip(pixels.transpose(0, 2, 3, 1).astype(np.float32) / 2 + 0.5, 0, 1)
        return Output(pixels if output_type == "np" else to_pil(pixels), final, made.seeds, run.clock.seconds)

    def _limits(self) -> Manifest:
        """The manifest with the shapes that the engines take: a TensorRT engine may take fewer than the bundle."""
        manifest = self.bundle.manifest
        if self.engines.offload:  # they are loaded when their phase begins
            return manifest
        own = {name: self.engines[name].component for name in ("unet", "vae_decoder") if name in self.engines}
        return replace(manifest, components={**manifest.components, **own})


class _Run:
    """One call of a pipeline, phase by phase over all chunks, so that each component is needed for one phase only."""

    def __init__(self, pipeline: Pipeline, request: Request):
        self.request, self.plan = request, request.plan
        self.engines, self.tokenizers, self.schedule = pipeline.engines, pipeline.tokenizers, pipeline.schedule
        self.manifest, self.constants = pipeline.bundle.manifest, pipeline.bundle.manifest.pipeline
        self.shape = (self.constants["latent_channels"], *request.size)
        self.clock = Clock()

    def __call__(
        self, callback: StepCallback | None, progress: bool, *, decode: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Latents [N, C, h, w], and pixels [N, 3, H, W] in about [-1, 1]."""
        chunks = self.request.chunks
        with self._phase("text_encoder", *self.tokenizers):
            texts = [self._texts(chunk) for chunk in chunks]
            for value in texts[-1].values():
                synchronize(value)
        starts = [self._start(chunk) for chunk in chunks]
        bar = _Bar(progress, self.plan.steps * len(chunks))
        with bar, self._phase("unet", *control_components(), "unet"):
            done = [
                self._denoise(chunk, text, start, bar, callback)
                for chunk, text, start in zip(chunks, texts, starts, strict=True)
            ]
        if not decode:
            return np.concatenate(done), None
        with self._phase("vae_decoder", "vae_decoder"):
            pixels = [self._decode(x) for x in done]
        return np.concatenate(done), np.concatenate(pixels)

    @contextmanager
    def _phase(self, name: str, *components: str) -> Iterator[None]:
        """Time a phase; with low memory its components are closed at its end."""
        began = time.perf_counter()
        yield
        self.clock.add(name, time.perf_counter() - began)
        self.engines.release(components)

    def _texts(self, chunk: Chunk) -> dict[str, Any]:
        """Text conditioning for the whole (doubled) batch of a chunk."""
        encoders = {name: (self.tokenizers[name], self.engines[name]) for name in self.tokenizers}
        context = next(s for s in self.manifest.components["unet"].inputs if s.name == "encoder_hidden_states")
        length = next(iter(self.tokenizers.values())).length
        how = dict(chunks=max(1, int(context.shape[1]) // length), weighted=self.request.weighted)
        feeds = _encode(encoders, chunk.prompts, **how)
        if self.plan.guided:
            without = _encode(encoders, chunk.negatives or [""] * len(chunk.prompts), **how)
            if chunk.negatives is None and self.constants["zero_empty_prompt"]:
                without = {name: value * 0 for name, value in without.items()}
            feeds = {name: concat([without[name], value]) for name, value in feeds.items()}
        return feeds

    def _start(self, chunk: Chunk) -> Start:
        """The start of a chunk. Images are encoded at once, before the UNet takes its memory."""
        first = noise.normal(chunk.seeds, 0, self.shape)
        if self.request.latents is not None:
            first = np.asarray(to_numpy(self.request.latents[chunk.rows]), np.float32)
        record = self.manifest.components["unet"]
        began = time.perf_counter()
        made = start_from(
            self.request,
            chunk,
            first,
            channels=int(record.inputs[0].shape[1]),
            encoder=lambda: self.engines["vae_encoder"],
            schedule=self.schedule,
            constants=self.constants,
        )
        if self.request.images.image is not None:
            self.clock.add("vae_encoder", time.perf_counter() - began)
            self.engines.release(["vae_encoder"])
        return made

    def _denoise(
        self, chunk: Chunk, text: dict[str, Any], start: Start, bar: _Bar, callback: StepCallback | None
    ) -> np.ndarray:
        unet, plan = self.engines["unet"], self.plan
        spec = {s.name: s for s in unet.component.inputs}
        feeds = self._feeds(chunk, text, unet)
        add = control.prepare(self.request, chunk, self.manifest, self.engines)
        extra = None if start.extra is None else unet.array(start.extra)
        dtype = spec["sample"].dtype
        row = plan.start

        def model(x: Any, t: float) -> Any:
            sample = x if extra is None else concat([x, extra], axis=1)
            sample = cast(concat([sample, sample]) if plan.guided else sample, dtype)
            inputs = dict(sample=sample, timestep=np.asarray(t, spec["timestep"].dtype), **feeds)
            out = cast(unet(**inputs, **add(row, inputs))["out_sample"], "float32")
            if not plan.guided:
                return out
            without, with_prompt = out[: len(x)], out[len(x) :]
            return without + plan.guidance * (with_prompt - without)

        def fresh(i: int) -> Any:
            if self.request.renoise is None:
                return unet.array(noise.normal(chunk.seeds, i + 1, self.shape))
            return cast(unet.array(self.request.renoise(i)[chunk.rows]), "float32")

        def after(i: int, t: float, x: Any) -> None:
            nonlocal row
            row = i + 1
            bar.advance()
            if callback is not None:
                callback(i, t, x)

        x = cast(unet.array(start.x), "float32")
        keep = start.constrain
        plain = not start.noised and extra is None and keep is None and callback is None
        if plain and getattr(unet, "cuda_graph", "") == "loop" and {"sample", "timestep", *feeds} == set(spec):
            from ..engines.fixed_loop import FixedLoop

            guidance = plan.guidance if plan.guided else 0.0
            # Only TensorRT's engine has a cuda_graph.
            # Only TensorRT's engine has a cuda_graph.
            loop = FixedLoop(unet, plan.sampler, self.schedule, plan.timesteps, guidance, plan.table)  # type: ignore[arg-type]
            draws = max(plan.table.draws, default=-1) + 1 if plan.table else 0
            x = loop(x, feeds, [fresh(i) for i in range(draws)])
            for _ in range(plan.steps):
                bar.advance()
            return to_numpy(x)
        hooks: dict[str, Any] = dict(
            noise=fresh, callback=after, constrain=None if keep is None else (lambda i, x: keep(i, x, unet.array))
        )
        if plan.table is not None:
            return to_numpy(run(plan.table, model, x, noised=start.noised, **hooks))
        x = sampler.sample(plan.sampler, model, x, self.schedule, timesteps=plan.timesteps, start=plan.start, **hooks)
        return to_numpy(x)

    def _feeds(self, chunk: Chunk, text: dict[str, Any], unet: Engine) -> dict[str, Any]:
        """Everything but sample and timestep that the UNet takes, in its own dtypes."""
        feeds = dict(text)
        batch = len(chunk.prompts) * (2 if self.plan.guided else 1)
        for spec in unet.component.inputs:
            if spec.name == "time_ids":
                feeds["time_ids"] = conditioning.time_ids(batch, self.request.pixels, *self.request.sizes)
            elif spec.name == "timestep_cond":
                feeds["timestep_cond"] = conditioning.guidance_embedding(batch, self.plan.guidance, int(spec.shape[-1]))
        dtypes = {spec.name: spec.dtype for spec in unet.component.inputs}
        return {name: cast(unet.array(value), dtypes[name]) for name, value in feeds.items()}

    def _decode(self, x: np.ndarray) -> np.ndarray:
        vae = self.engines["vae_decoder"]
        z = x * (1.0 / self.constants["scaling_factor"]) + self.constants["shift_factor"]
        (spec,) = vae.component.inputs
        return to_numpy(vae(latent_sample=cast(vae.array(z), spec.dtype))["sample"])


def _encode(encoders: Mapping[str, Any], prompts: Sequence[str], **how: Any) -> dict[str, Any]:
    """Each distinct text is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    found = conditioning.encode(encoders, distinct, **how)
    index = [distinct.index(prompt) for prompt in prompts]
    return {name: value[index] for name, value in found.items()}


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
