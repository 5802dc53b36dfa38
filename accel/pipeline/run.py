"""One call of a pipeline: text, initial latents, the sampler's steps, pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..arrays import cast, concat, is_torch, synchronize
from ..bundle import Bundle
from ..bundle.kinds import control_components
from ..engines import Engine
from ..engines.base import to_numpy
from ..progress import Report
from ..progress import progress as show_progress
from ..safety import COMPONENT as SAFETY_CHECKER
from ..safety import SafetyChecker
from ..sampling import noise
from ..sampling import samplers as sampler
from ..sampling.linear import run
from ..text.tokenizer import ClipTokenizer
from . import conditioning, control
from .initial_latents import Start, unscaled
from .initial_latents import start as start_from
from .lazy_engines import LazyEngines
from .request import Chunk, Clock, Request

StepCallback = Callable[[int, float, Any], None]
BLACK = -1  # as a decoder leaves it
# (i, t, latents) -> latents, of whatever kind of array.
StepEnd = Callable[[int, float, Any], Any]


class Run:
    """One call of a pipeline, phase by phase over all chunks, so that each component is needed for one phase only."""

    def __init__(
        self,
        bundle: Bundle,
        engines: LazyEngines,
        tokenizers: Mapping[str, ClipTokenizer],
        schedule: sampler.NoiseSchedule,
        request: Request,
    ):
        self.request, self.plan = request, request.plan
        self.engines, self.tokenizers, self.schedule = engines, tokenizers, schedule
        self.manifest, self.constants = bundle.manifest, bundle.manifest.pipeline
        self.shape = (self.constants["latent_channels"], *request.size)
        self.clock = Clock()

    def __call__(
        self, callback: StepCallback | None, step_end: StepEnd | None, progress: bool, *, decode: bool
    ) -> tuple[np.ndarray, Any]:
        """Latents [N, C, h, w], and pixels [N, 3, H, W] in about [-1, 1]: the decoder's own arrays, on its device."""
        chunks = self.request.chunks
        with self._phase("text_encoder", *self.tokenizers):
            texts = [self._texts(chunk) for chunk in chunks]
            for value in texts[-1].values():
                synchronize(value)
        prompts = self._image_prompts()
        texts = [text | self._image_prompt(chunk, prompts) for chunk, text in zip(chunks, texts, strict=True)]
        starts = [self._start(chunk) for chunk in chunks]
        bar = show_progress("sampling", steps=self.plan.steps * len(chunks), shown=progress)
        with bar as report, self._phase("unet", *control_components(), "unet"):
            steps = _Steps(report)
            done = [
                self._denoise(chunk, text, start, steps, callback, step_end)
                for chunk, text, start in zip(chunks, texts, starts, strict=True)
            ]
        if not decode:
            return np.concatenate(done), None
        with self._phase("vae_decoder", "vae_decoder"):
            pixels = concat([self._decode(x) for x in done])
            synchronize(pixels)
        return np.concatenate(done), pixels

    def checked(self, pixels: np.ndarray, checker: SafetyChecker) -> list[bool]:
        """Whether each image [N, 3, H, W] is rejected, chunk by chunk; a rejected one becomes black in place."""
        with self._phase(SAFETY_CHECKER, SAFETY_CHECKER):
            engine = self.engines[SAFETY_CHECKER]
            found = [nsfw for chunk in self.request.chunks for nsfw in checker(engine, pixels[chunk.rows])]
        pixels[found] = BLACK
        return found

    @contextmanager
    def _phase(self, name: str, *components: str) -> Iterator[None]:
        """Time a phase; with low memory its components are closed at its end."""
        began = time.perf_counter()
        yield
        self.clock.add(name, time.perf_counter() - began)
        self.engines.phase_over(components)

    def _texts(self, chunk: Chunk) -> dict[str, Any]:
        """Text conditioning for the whole (doubled) batch of a chunk."""
        encoders = {name: (self.tokenizers[name], self.engines[name]) for name in self.tokenizers}
        context = next(s for s in self.manifest.components["unet"].inputs if s.name == "encoder_hidden_states")
        length = next(iter(self.tokenizers.values())).length
        how = dict(chunks=max(1, int(context.shape[1]) // length), weighted=self.request.weighted)
        feeds = _encode(encoders, chunk.prompts, clip_skip=self.request.clip_skip, **how)
        if self.plan.guided:
            without = _encode(encoders, chunk.negatives or [""] * len(chunk.prompts), **how)
            if chunk.negatives is None and self.constants["zero_empty_prompt"]:
                without = {name: value * 0 for name, value in without.items()}
            feeds = {name: concat([without[name]] * (self.plan.rows - 1) + [value]) for name, value in feeds.items()}
        return feeds

    def _image_prompts(self) -> tuple[np.ndarray, Any] | None:
        """Embeddings of all pictures that an IP-Adapter is shown, and of none; None where there are none."""
        pixels = self.request.images.prompt
        if pixels is None:
            return None
        with self._phase("image_encoder", "image_encoder"):
            return conditioning.image_embeddings(self.engines["image_encoder"], pixels, self.plan.rows > 1)

    def _image_prompt(self, chunk: Chunk, prompts: tuple[np.ndarray, Any] | None) -> dict[str, Any]:
        """The inputs of the UNet that are its IP-Adapter's; without pictures the adapter has no weight in the image."""
        spec = next((s for s in self.manifest.components["unet"].inputs if s.name == "image_embeds"), None)
        if spec is None:
            return {}
        rows = len(chunk.prompts) * self.plan.rows
        if prompts is None:
            embeds, scale = np.zeros(spec.concrete({"batch": rows, "prompt_images": 1}), np.float32), 0.0
        else:
            shown, none = prompts
            parts = [none] * (self.plan.rows - 1) + [shown]  # as the texts: without, and with
            embeds = np.concatenate([_of_chunk(part, chunk, self.request.total) for part in parts])
            scale = self.request.images.prompt_scale
        return {"image_embeds": embeds, "ip_adapter_scale": np.full(rows, scale, np.float32)}

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
            self.engines.phase_over(["vae_encoder"])
        return made

    def _denoise(
        self,
        chunk: Chunk,
        text: dict[str, Any],
        start: Start,
        steps: _Steps,
        callback: StepCallback | None,
        step_end: StepEnd | None,
    ) -> np.ndarray:
        unet, plan = self.engines["unet"], self.plan
        spec = {s.name: s for s in unet.component.inputs}
        feeds = self._feeds(chunk, text, unet)
        add = control.prepare(self.request, chunk, self.manifest, self.engines)
        extra: list[Any] = [None if start.extra is None else unet.array(start.extra)] * plan.rows
        if plan.rows == 3:  # the first row is shown neither prompt nor image
            extra[0] = extra[1] * 0
        dtype = spec["sample"].dtype
        times = _Times(unet, spec["timestep"].dtype, plan.timesteps)
        row = plan.start

        def model(x: Any, t: float) -> Any:
            rows = [x if more is None else concat([x, more], axis=1) for more in extra]
            sample = cast(concat(rows) if plan.guided else rows[0], dtype)
            inputs = dict(sample=sample, timestep=times(t), **feeds)
            out = cast(unet(**inputs, **add(row, inputs))["out_sample"], "float32")
            return plan.combined(out)

        def fresh(i: int) -> Any:
            if self.request.renoise is None:
                return unet.array(noise.normal(chunk.seeds, i + 1, self.shape))
            return cast(unet.array(self.request.renoise(i)[chunk.rows]), "float32")

        def after(i: int, t: float, x: Any) -> None:
            nonlocal row
            row = i + 1
            steps.advance()
            if callback is not None:
                callback(i, t, x)

        keep = start.constrain

        def constrain(i: int, x: Any) -> Any:
            x = x if keep is None else keep(i, x, unet.array)
            return x if step_end is None else cast(unet.array(step_end(i, plan.timesteps[i], x)), "float32")

        x = cast(unet.array(start.x), "float32")
        plain = not start.noised and all(hook is None for hook in (start.extra, keep, callback, step_end))
        if plain and getattr(unet, "cuda_graph", "") == "loop" and {"sample", "timestep", *feeds} == set(spec):
            from ..engines.fixed_loop import FixedLoop

            guidance = plan.guidance if plan.guided else 0.0
            loop = FixedLoop(unet, plan.sampler, self.schedule, plan.timesteps, guidance, plan.table)
            draws = max(plan.table.draws, default=-1) + 1 if plan.table else 0
            x = loop(x, feeds, [fresh(i) for i in range(draws)])
            for _ in range(plan.steps):
                steps.advance()
            return to_numpy(x)
        hooks: dict[str, Any] = dict(
            noise=fresh, callback=after, constrain=None if keep is None and step_end is None else constrain
        )
        if plan.table is not None:
            return to_numpy(run(plan.table, model, x, noised=start.noised, **hooks))
        x = sampler.sample(plan.sampler, model, x, self.schedule, timesteps=plan.timesteps, start=plan.start, **hooks)
        return to_numpy(x)

    def _feeds(self, chunk: Chunk, text: dict[str, Any], unet: Engine) -> dict[str, Any]:
        """Everything but sample and timestep that the UNet takes, in its own dtypes."""
        feeds = dict(text)
        batch = len(chunk.prompts) * self.plan.rows
        for spec in unet.component.inputs:
            if spec.name == "time_ids":
                feeds["time_ids"] = self._time_ids(batch, int(spec.shape[-1]))
            elif spec.name == "timestep_cond":
                feeds["timestep_cond"] = conditioning.guidance_embedding(batch, self.plan.guidance, int(spec.shape[-1]))
        dtypes = {spec.name: spec.dtype for spec in unet.component.inputs}
        return {name: cast(unet.array(value), dtypes[name]) for name, value in feeds.items()}

    def _time_ids(self, batch: int, numbers: int) -> np.ndarray:
        request = self.request
        if numbers == 6:
            return conditioning.time_ids(batch, request.pixels, *request.sizes)
        scores = request.scores[::-1] if self.plan.guided else request.scores[:1]
        return conditioning.scored_time_ids(batch // len(scores), request.pixels, *request.sizes[:2], scores)

    def _decode(self, x: np.ndarray) -> Any:
        vae, tiling = self.engines["vae_decoder"], self.request.tiling
        (spec,) = vae.component.inputs

        def decoded(z: np.ndarray) -> Any:
            return vae(latent_sample=cast(vae.array(z), spec.dtype))["sample"]

        z = unscaled(x, self.constants)
        return decoded(z) if tiling is None else tiling.decode(z, lambda tile: to_numpy(decoded(tile)))


def _encode(encoders: Mapping[str, Any], prompts: Sequence[str], **how: Any) -> dict[str, Any]:
    """Each distinct text is encoded once."""
    distinct = list(dict.fromkeys(prompts))
    found = conditioning.encode(encoders, distinct, **how)
    index = [distinct.index(prompt) for prompt in prompts]
    return {name: value[index] for name, value in found.items()}


def _of_chunk(values: np.ndarray, chunk: Chunk, total: int) -> np.ndarray:
    """The rows of a chunk, of values for all images: one row for each, or one for all."""
    return np.broadcast_to(values, (total, *values.shape[1:]))[chunk.rows]


class _Times:
    """Timesteps as scalars of an engine's own kind, on its device: all of them in one upload before the first step.

    An upload in every step would wait for the step before, because it copies from ordinary memory.
    """

    def __init__(self, engine: Engine, dtype: str, timesteps: Sequence[float]):
        self.engine, self.dtype = engine, dtype
        known = list(dict.fromkeys(float(t) for t in timesteps))
        made = engine.array(np.asarray(known, dtype))
        # Each in memory of its own: engines that take addresses want them aligned.
        self.known = dict(zip(known, [t.clone() for t in made] if is_torch(made) else made, strict=True))

    def __call__(self, t: float) -> Any:
        if t not in self.known:  # a sampler may call the UNet between the timesteps of its grid
            self.known[t] = self.engine.array(np.asarray(t, self.dtype))
        return self.known[t]


class _Steps:
    """Counts the steps of all chunks for a progress bar."""

    def __init__(self, report: Report):
        self.report, self.done = report, 0

    def advance(self) -> None:
        self.done += 1
        self.report("", self.done)
