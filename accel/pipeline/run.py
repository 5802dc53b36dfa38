"""One call of a pipeline: text, initial latents, the sampler's steps, pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import cast, concat, is_torch, synchronize
from ..bundle import Bundle
from ..bundle.kinds import control_components
from ..engines import Engine
from ..engines.base import to_numpy, to_torch
from ..errors import Stopped, UserError
from ..progress import Report
from ..progress import progress as show_progress
from ..safety import COMPONENT as SAFETY_CHECKER
from ..safety import SafetyChecker
from ..sampling import noise
from ..sampling import samplers as sampler
from ..sampling.linear import run
from ..text.cache import TextCache
from ..text.tokenizer import ClipTokenizer
from ..trt.cuda import named
from . import arguments, conditioning, control
from .denoise import Part, predict
from .initial_latents import Start, unscaled
from .initial_latents import start as start_from
from .lazy_engines import LazyEngines
from .request import Chunk, Clock, Request
from .sampling_plan import SamplingPlan

StepCallback = Callable[[int, float, Any], Any]
BLACK = -1  # as a decoder leaves it
# (i, t, latents) -> latents, of whatever kind of array.
StepEnd = Callable[[int, float, Any], Any]


@dataclass(frozen=True)
class Hooks:
    """What is called after each step.

    Attributes:
        callback: (i, t, x); one that returns False stops the run.
        step_end: (i, t, x) -> x to go on with.
        preview: (i, x, prediction), what the UNet was shown and what it made of it.
    """

    callback: StepCallback | None = None
    step_end: StepEnd | None = None
    preview: Callable[[int, Any, Any], None] | None = None


class Run:
    """One call of a pipeline, phase by phase over all chunks, so that each component is needed for one phase only."""

    def __init__(
        self,
        bundle: Bundle,
        engines: LazyEngines,
        tokenizers: Mapping[str, ClipTokenizer],
        schedule: sampler.NoiseSchedule,
        request: Request,
        cache: TextCache | None = None,
    ):
        self.cache = cache or TextCache(0)
        self.request, self.plan = request, request.plan
        self.engines, self.tokenizers, self.schedule = engines, tokenizers, schedule
        self.manifest, self.constants = bundle.manifest, bundle.manifest.pipeline
        self.shape = (self.constants["latent_channels"], *request.size)
        self.clock = Clock()

    def __call__(self, hooks: Hooks = Hooks(), progress: bool = False, *, decode: bool) -> tuple[np.ndarray, Any]:
        """Latents [N, C, h, w], and pixels [N, 3, H, W] in about [-1, 1]: the decoder's own arrays, on its device.

        Raises:
            Stopped: when the callback stops it.
        """
        chunks = self.request.chunks
        with self._phase("text_encoder", *self.tokenizers):
            texts = [self.texts(chunk) for chunk in chunks]
            for value in texts[-1].values():
                synchronize(value)
        prompts = self.image_prompts()
        texts = [text | self.image_prompt(chunk, prompts) for chunk, text in zip(chunks, texts, strict=True)]
        starts = [self.start(chunk) for chunk in chunks]
        bar = show_progress("sampling", steps=self.plan.steps * len(chunks), shown=progress)
        with bar as report, self._phase("unet", *control_components(), "unet"):
            steps = _Steps(report)
            done = [
                self._denoise(chunk, text, start, steps, hooks)
                for chunk, text, start in zip(chunks, texts, starts, strict=True)
            ]
        if not decode:
            return np.concatenate(done), None
        with self._phase("vae_decoder", "vae_decoder"):
            pixels = concat([self.decode(x) for x in done])
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
        with named(f"accel {name}"):
            yield
        self.clock.add(name, time.perf_counter() - began)
        self.engines.phase_over(components)

    def texts(self, chunk: Chunk) -> dict[str, Any]:
        """Text conditioning for the whole (doubled) batch of a chunk."""
        context = next(s for s in self.manifest.components["unet"].inputs if s.name == "encoder_hidden_states")
        length = next(iter(self.tokenizers.values())).length
        how: dict[str, Any] = dict(chunks=max(1, int(context.shape[1]) // length), weighted=self.request.weighted)
        zero = self.plan.guided and chunk.negatives is None and self.constants["zero_empty_prompt"]
        negatives = chunk.negatives or [""] * len(chunk.prompts)
        negatives = negatives if self.plan.guided and not zero else []
        distinct = list(dict.fromkeys([*negatives, *chunk.prompts]))  # each text is encoded once
        words = [conditioning.Tokens.of(tokenizer, distinct, **how) for tokenizer in self.tokenizers.values()]
        shown, hidden = ([distinct.index(text) for text in texts] for texts in (chunk.prompts, negatives))
        skip, rows = self.request.clip_skip, self.plan.rows

        def encoded() -> dict[str, Any]:
            engines = [self.engines[name] for name in self.tokenizers]
            made = conditioning.encoded(engines, words, (skip, 0) if hidden else (skip,))
            feeds = {name: value[shown] for name, value in made[skip].items()}
            if not self.plan.guided:
                return feeds
            without = {name: value * 0 if zero else made[0][name][hidden] for name, value in feeds.items()}
            return {name: concat([without[name]] * (rows - 1) + [value]) for name, value in feeds.items()}

        what = (tuple(shown), tuple(hidden), zero, skip, rows, tuple(text.key for text in words))
        return dict(self.cache.get((self.engines.state(self.tokenizers), what), encoded))

    def image_prompts(self) -> tuple[np.ndarray, Any] | None:
        """Embeddings of all pictures that an IP-Adapter is shown, and of none; None where there are none."""
        pixels = self.request.images.prompt
        if pixels is None:
            return None
        with self._phase("image_encoder", "image_encoder"):
            return conditioning.image_embeddings(self.engines["image_encoder"], pixels, self.plan.rows > 1)

    def image_prompt(self, chunk: Chunk, prompts: tuple[np.ndarray, Any] | None) -> dict[str, Any]:
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

    def start(self, chunk: Chunk) -> Start:
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

    def fresh(self, chunk: Chunk, i: int) -> Any:
        """The noise that a stochastic sampler adds to a chunk after step i."""
        unet = self.engines["unet"]
        if self.request.renoise is None:
            return unet.array(noise.normal(chunk.seeds, i + 1, self.shape))
        return cast(unet.array(self.request.renoise(i)[chunk.rows]), "float32")

    def drawn(self, chunk: Chunk) -> dict[int, Any]:
        """`fresh` of every step of a table, in one upload before the first step: in each it would wait for the last."""
        if self.plan.table is None or self.request.renoise is not None or not self.plan.table.draws:
            return {}
        steps = self.plan.table.draws
        made = np.stack([noise.normal(chunk.seeds, i + 1, self.shape) for i in steps])
        return dict(zip(steps, self.engines["unet"].array(made), strict=True))

    def _denoise(self, chunk: Chunk, text: dict[str, Any], start: Start, steps: _Steps, hooks: Hooks) -> np.ndarray:
        unet, plan = self.engines["unet"], self.plan
        names = {s.name for s in unet.component.inputs}
        feeds = self.feeds(chunk, text, unet)
        add = control.prepare(self.request, chunk, self.manifest, self.engines)
        extra = extra_rows(plan, start, unet)
        timestep = next(s for s in unet.component.inputs if s.name == "timestep")
        times = _Times(unet, timestep.dtype, plan.timesteps)
        row = plan.start
        seen: list[Any] = [None, None]  # what the UNet was shown last, and what it predicted

        def model(x: Any, t: float) -> Any:
            with named(f"accel step {row}"):
                part = Part(plan, x, t, feeds, extra)
                (out,) = predict(unet, [part], add=lambda inputs: add(row, inputs), times=times)
            seen[:] = x, out
            return out

        drawn = self.drawn(chunk)

        def fresh(i: int) -> Any:
            return drawn[i] if i in drawn else self.fresh(chunk, i)

        def after(i: int, t: float, x: Any) -> None:
            nonlocal row
            row = i + 1
            steps.advance()
            if hooks.preview is not None:
                hooks.preview(i, *seen)
            if hooks.callback is not None and hooks.callback(i, t, x) is False:
                raise Stopped(i + 1 - plan.start, plan.steps)

        keep, step_end = start.constrain, hooks.step_end

        def constrain(i: int, x: Any) -> Any:
            x = x if keep is None else keep(i, x, unet.array)
            return x if step_end is None else cast(unet.array(step_end(i, plan.timesteps[i], x)), "float32")

        x = cast(unet.array(start.x), "float32")
        hooked = any(hook is not None for hook in (start.extra, keep, *vars(hooks).values()))
        plain = not start.noised and not hooked
        if plain and getattr(unet, "cuda_graph", "") == "loop" and {"sample", "timestep", *feeds} == names:
            from ..engines.fixed_loop import FixedLoop

            guidance = plan.guidance if plan.guided else 0.0
            loop = FixedLoop(unet, plan.sampler, self.schedule, plan.timesteps, guidance, plan.table)
            draws = max(plan.table.draws, default=-1) + 1 if plan.table else 0
            x = loop(x, feeds, [fresh(i) for i in range(draws)])
            for _ in range(plan.steps):
                steps.advance()
            return to_numpy(x)
        own: dict[str, Any] = dict(
            noise=fresh, callback=after, constrain=None if keep is None and step_end is None else constrain
        )
        if plan.table is not None:
            return to_numpy(run(plan.table, model, x, noised=start.noised, **own))
        x = sampler.sample(plan.sampler, model, x, self.schedule, timesteps=plan.timesteps, start=plan.start, **own)
        return to_numpy(x)

    def feeds(self, chunk: Chunk, text: dict[str, Any], unet: Engine) -> dict[str, Any]:
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

    def decode(self, x: np.ndarray) -> Any:
        """Pixels [n, 3, H, W] of latents, as the decoder leaves them and on its device."""
        vae, tiling = self.engines["vae_decoder"], self.request.tiling
        (spec,) = vae.component.inputs

        def decoded(z: np.ndarray) -> Any:
            return vae(latent_sample=cast(vae.array(z), spec.dtype))["sample"]

        z = unscaled(x, self.constants)
        return decoded(z) if tiling is None else tiling.decode(z, lambda tile: to_numpy(decoded(tile)))


def step_end_of(pipeline: Any, callback: Callable[..., Any], start: int) -> StepEnd:
    """diffusers' `callback_on_step_end` as a function (i, t, latents) -> latents."""

    def step_end(i: int, t: float, x: Any) -> Any:
        tensor = to_torch(x, str(getattr(x, "device", "cpu")))
        returned = callback(pipeline, i - start, t, {"latents": tensor})
        if returned is not None and not isinstance(returned, Mapping):
            what = arguments.short(returned)
            raise UserError(f"callback_on_step_end returned {what}", "return the dict that it was given")
        changed = (returned or {}).get("latents", tensor)
        if tuple(getattr(changed, "shape", ())) != tuple(x.shape):
            raise UserError(
                f"callback_on_step_end returned latents {arguments.short(changed)}",
                f"return a tensor of shape {tuple(x.shape)}",
            )
        return changed

    return step_end


def extra_rows(plan: SamplingPlan, start: Start, unet: Engine) -> list[Any]:
    """Further input channels of each row of an image; of three rows the first is shown neither prompt nor image."""
    if start.extra is None:
        return []
    extra = unet.array(start.extra)
    return [extra * 0, extra, extra] if plan.rows == 3 else [extra] * plan.rows


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
