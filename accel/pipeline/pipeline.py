"""Prompt to image, on any engine."""

from __future__ import annotations

import inspect
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..assets import is_hub_id, resolve
from ..bundle import Bundle, Manifest, is_bundle
from ..bundle.kinds import KINDS
from ..bundle.manifest import steadily
from ..engines import Engine, choose, load_engine
from ..engines.base import to_torch
from ..engines.placement import Place, check_move
from ..engines.resource import Resource
from ..errors import Notice, UserError
from ..sampling.constants import OPTIONS
from . import arguments, request
from .generator_noise import GeneratorNoise
from .lazy_engines import LazyEngines
from .output import Output, of_type, table
from .request import InputImages, Request
from .run import Run, StepCallback, StepEnd
from .tokenizer import ClipTokenizer

TEXT_ENCODERS = KINDS["text_encoder"].names


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


def opened(model: str | Path | Bundle, *, few_step: str | None = None) -> Bundle:
    """A bundle by its folder; or a diffusers pipeline folder, read like a bundle that has no graphs.

    Args:
        model: either folder, a hub id, or the name of one that ships: `digits`, `digits/4step`, `digits/4step-int8`.
        few_step: the few-step family that a pipeline is of, or "none", where its names do not say it.

    Raises:
        UserError: for anything else.
    """
    if isinstance(model, Bundle):
        return model
    if not isinstance(model, (str, Path)):
        expected = "the folder of a bundle or of a diffusers pipeline"
        raise UserError(
            f"invalid bundle: {arguments.short(model)} (expected {expected})", "such as accel.load('digits')"
        )
    if _is_pipeline(model):
        choose("eager")  # says what is missing where there is no torch
        from ..models.pipeline_bundle import open_pipeline

        return open_pipeline(model, few_step=few_step)
    return Bundle.open(model)


def _is_pipeline(model: str | Path) -> bool:
    """Whether a model is a diffusers pipeline: a folder that is no bundle, which are laid out like one, or a hub id."""
    return (Path(resolve(model)) / "model_index.json").is_file() and not is_bundle(model) or is_hub_id(model)


def load(
    bundle: str | Path | Bundle,
    engine: str | Mapping[str, str] = "auto",
    *,
    verify: bool = True,
    low_memory: bool = False,
    **options: Any,
) -> Pipeline:
    """Load a bundle as a pipeline that is called like diffusers': `load("my-bundle")("a cat", seed=0).images`.

    A diffusers pipeline folder is loaded too, at once and as it is: it runs on eager torch, in float32 unless `dtype`
    says otherwise. `accel export FOLDER BUNDLE` compiles it.

    Args:
        bundle: a bundle or its folder, a diffusers pipeline folder, or what ships: "digits", "digits/4step", ...
        engine: a name, "auto", or one per component such as {"unet": "openvino", "vae_decoder": "onnxruntime"}
            (components that are not named use "auto"). "auto" is the fastest that can run here, and never fails for
            speed: a note says what would be faster. `repr` of the pipeline shows what was chosen.
        verify: compare files with the manifest's digests first.
        low_memory: load each component when its phase begins and give its memory back when it ends. Every image
            then waits for the loading again; peak memory is that of the largest phase.
        options: the engine's own options (device, dtype, provider, threads, ...).

    Returns:
        A pipeline; `close()` it, or use it in a `with`, to give its memory back.

    Raises:
        UserError: when the bundle is damaged or incomplete, or the engine cannot run here.
    """
    if isinstance(bundle, (str, Path)) and not _is_pipeline(bundle):
        how = dict(verify=verify, low_memory=low_memory, **options)
        return steadily(bundle, lambda found: load(found, engine, **how))
    given, bundle = bundle, opened(bundle)
    if not isinstance(engine, (str, Mapping)):
        raise UserError(f"invalid engine: {arguments.short(engine)} (expected a name)", "such as engine='onnxruntime'")
    wanted = component_names(bundle)
    if engine == "auto" and not bundle.component("unet").graph:
        name = given if isinstance(given, (str, Path)) else bundle.manifest.source["name"]
        warnings.warn(
            f"{name} is a diffusers pipeline, run by torch operator by operator; to compile it: "
            f"accel export {name} {Path(name).name}-bundle",
            Notice,
            stacklevel=3,
        )
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


def check_call(bundle: Bundle, **call: Any) -> None:
    """Refuse a call of `Pipeline` that this bundle cannot meet, before any engine is loaded.

    Raises:
        UserError: as the call itself would, but for what only an engine or an image file can tell.
    """
    unloaded = LazyEngines({name: partial(load_engine, bundle, name) for name in component_names(bundle)}, offload=True)
    given = arguments.read({**_DEFAULTS, **call}, _DEFAULTS, {})
    Pipeline(bundle, unloaded)._request(given)


class Pipeline(Resource):
    """A loaded bundle. Make one with `accel.load`.

    Attributes:
        bundle: where it came from; `bundle.manifest.sampler` holds the default steps and guidance.
        engines: the components by name.
    """

    what, again = "pipeline", "accel.load(BUNDLE) loads one"

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]):
        self.bundle = bundle
        self.engines = engines if isinstance(engines, LazyEngines) else LazyEngines.of(engines)
        self.schedule = bundle.noise_schedule()
        folders = {name: name.replace("text_encoder", "tokenizer") for name in TEXT_ENCODERS}
        self.tokenizers = {
            name: ClipTokenizer.from_folder(bundle.path / folders[name], bundle.listed(folders[name]))
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
        seed: int | Sequence[int] | None = None,
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
        **others: Any,
    ) -> Output:
        """Make images. Without `seed` they are new ones each time; `output.seeds` says which seeds were drawn.

        Args:
            prompt: one text or several.
            negative_prompt: what to steer away from (with guidance): one text, or one per prompt.
            height, width: pixels, within the bundle's profile; None for the model's own size.
            sampler, steps, timesteps, guidance_scale: how to sample; None for the bundle's own constants.
            eta, sigmas, timestep_spacing, shift: more of the sampler (`accel.sampling.samplers.table`); None for what
                the bundle and its scheduler config say.
            num_images_per_prompt: images per prompt.
            seed: of the first image (the others count on from it), or one per image. The same seed gives the same
                noise on every engine. None draws a new one.
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
            latents: initial noise [N, C, h, w] with unit variance, float32 or less, instead of a seed's.
            renoise: i -> noise [N, C, h, w] that a few-step sampler adds after step i, instead of a seed's.
            output_type: "pil", "np", "pt" or "latent", see `Output.images`.
            callback: called as (i, t, x) after each step with the latents so far.
            progress: show a progress bar on stderr.
            others: diffusers' names for the above (`num_inference_steps`, ...). Also diffusers': `generator`, a
                `torch.Generator` or one per image, whose noise is diffusers' own in text to image;
                `callback_on_step_end(pipeline, i, t, tensors)`, whose `tensors["latents"]` (torch, unit variance) may
                be replaced in the dict that it returns; and `return_dict=False` for a tuple.

        Raises:
            UserError: for arguments of a wrong type, or that do not fit each other or the bundle's profile.
        """
        given = {name: value for name, value in locals().items() if name not in ("self", "others")}
        self.check_open()
        return self._make(**arguments.read(given, _DEFAULTS, others))

    def _make(
        self,
        *,
        generator: Any = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        **call: Any,
    ) -> Any:
        """The images of arguments that have the right types."""
        if missing := set(callback_on_step_end_tensor_inputs) - {"latents"}:
            raise UserError(f"callback_on_step_end gets latents alone, not {missing.pop()}", "leave that name out")
        made = self._request(call)
        if generator is not None:
            made = self._with_generator(made, generator)
        run = Run(self.bundle, self.engines, self.tokenizers, self.schedule, made)
        step_end = None if callback_on_step_end is None else self._step_end(callback_on_step_end, made.plan.start)
        decode = call["output_type"] != "latent"
        with self.engines.turn():
            latents, pixels = run(call["callback"], step_end, call["progress"], decode=decode)
        if not np.isfinite(latents).all() or pixels is not None and not np.isfinite(pixels).all():
            raise self._not_finite()
        images_made = of_type(call["output_type"], pixels, latents)
        if not return_dict:  # diffusers' own tuples: those of SD also hold the safety checker's findings
            return (images_made,) if self.bundle.manifest.family == "sdxl" else (images_made, None)
        return Output(images_made, latents, made.seeds if generator is None else [], run.clock.seconds)

    def _request(self, call: Mapping[str, Any]) -> Request:
        """The call as a request, refused if it does not fit the bundle; runs nothing."""
        inputs = ("image", "mask_image", "strength", "control_image", "control_scale", "control_end")
        images = InputImages(*map(call.__getitem__, inputs))
        plan = request.plan(
            self.bundle.manifest,
            self.schedule,
            call["sampler"],
            call["steps"],
            call["timesteps"],
            call["guidance_scale"],
            images.strength,
            {name: call[name] for name in OPTIONS},
        )
        return request.complete(
            self._limits(),
            plan,
            call["prompt"],
            call["negative_prompt"],
            call["num_images_per_prompt"],
            secrets.randbelow(2**31) if call["seed"] is None else call["seed"],
            height=call["height"],
            width=call["width"],
            latents=call["latents"],
            inputs=images,
            sizes=(call["original_size"], call["crop"], call["target_size"]),
            renoise=call["renoise"],
            weighted=call["prompt_weights"],
        )

    def _with_generator(self, made: Request, generator: Any) -> Request:
        """The request with noise of torch generators, in the order in which diffusers draws it."""
        source = GeneratorNoise(generator, made.total, (self.bundle.manifest.pipeline["latent_channels"], *made.size))
        chunks = [replace(chunk, seeds=source.seeds[chunk.rows]) for chunk in made.chunks]
        first = source.draw() if made.latents is None else made.latents
        return replace(made, chunks=chunks, latents=first, renoise=made.renoise or source.step)

    def _step_end(self, callback: Callable[..., Any], start: int) -> StepEnd:
        """diffusers' `callback_on_step_end` as a function (i, t, latents) -> latents."""

        def step_end(i: int, t: float, x: Any) -> Any:
            tensor = to_torch(x, str(getattr(x, "device", "cpu")))
            returned = callback(self, i - start, t, {"latents": tensor})
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

    def to(self, *args: Any, **kwargs: Any) -> Pipeline:
        """The pipeline itself, where it is there already: a loaded engine cannot be moved.

        Args:
            args, kwargs: a device, a dtype, or both, as diffusers' pipelines take them.

        Raises:
            UserError: for another device or dtype than the pipeline's own.
        """
        self.check_open()
        places = {name: Place.of(self.engines[name]) for name in component_names(self.bundle) if name in self.engines}
        check_move("this pipeline", places, args, kwargs, "load it there: accel.load(BUNDLE, {options})")
        return self

    def release(self) -> None:
        self.engines.close()

    def __repr__(self) -> str:
        rows = "".join(f"\n  {name:<12} {text}" for name, text in self._parts().items())
        return f"<Pipeline{' (closed)' * self.closed} {self.bundle.title}{rows}>"

    def _repr_html_(self) -> str:
        return table(f"Pipeline{' (closed)' * self.closed} {self.bundle.title}", self._parts())

    def _parts(self) -> dict[str, str]:
        """What each component runs on."""
        later = "loaded in its phase" if self.engines.offload else "loaded when it is first used"
        return {name: self.engines.descriptions.get(name, later) for name in self.engines}

    def _not_finite(self) -> UserError:
        """The error of an image that is NaN or infinite."""
        low = [name for name, part in self.bundle.manifest.components.items() if part.dtype != "float32"]
        on = {name: text for name, text in self.engines.descriptions.items() if "float16" in text}
        if low:
            fix = "this precision overflows on this model: export with --precision fp32, or choose another dtype"
        elif on:
            fix = "that overflows on this model: choose dtype 'fp32', or 'bf16'"
        else:
            fix = "nothing of it is below float32: compare with engine 'eager', and with the weights it was made from"
        ran = on or {"unet": self.engines.descriptions.get("unet", "")}
        return UserError(
            f"the image is NaN or infinite ({', '.join(f'{name}: {text}' for name, text in ran.items())})", fix
        )

    def _limits(self) -> Manifest:
        """The manifest with the shapes that the engines take: a TensorRT engine may take fewer than the bundle."""
        manifest = self.bundle.manifest
        if self.engines.offload:  # they are loaded when their phase begins
            return manifest
        own = {name: self.engines[name].component for name in ("unet", "vae_decoder") if name in self.engines}
        return replace(manifest, components={**manifest.components, **own})


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(Pipeline.__call__).parameters.items()
    if name not in ("self", "others")
}
