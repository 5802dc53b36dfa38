"""The work that every variant does: the same prompts, sizes, noise and network inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import images
from ..arrays import synchronize
from ..bundle import Bundle
from ..bundle.kinds import control_components
from ..engines.base import to_numpy
from ..errors import UserError
from ..pipeline import Pipeline, component_names

PROMPTS = (
    "a photo of a lighthouse on a cliff at dusk",
    "a bowl of oranges on a wooden table",
    "a red bicycle",
    "a portrait of an old sailor",
)
IMAGE = "image"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure and how often.

    Attributes:
        prompts: cycled to the batch.
        seed: of the first image; the others count on.
        batch: images per call.
        height, width: pixels; None for the bundle's own.
        sampler, steps, guidance: None for the bundle's own.
        options: of the sampler (`accel.sampling.constants.OPTIONS`).
        rounds: samples per variant and scope.
        seconds: stop the rounds after this long, though never before five.
        warmup: untimed calls of each scope, at least two.
        memory: measure each variant in a process of its own as well.
        threads: CPU threads of every engine; None for each engine's own choice.
        attention: kernel of the attention layers, for engines that have a choice; None for their own.
        control: image file for the bundle's T2I-Adapter or ControlNet; "" for a drawing.
        shown: the images of the call by argument, as `with_images` chooses them.
    """

    prompts: tuple[str, ...] = PROMPTS
    seed: int = 0
    batch: int = 1
    height: int | None = None
    width: int | None = None
    sampler: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    guidance: float | None = None
    rounds: int = 10
    seconds: float | None = None
    warmup: int = 2
    memory: bool = True
    threads: int | None = None
    attention: str | None = None
    control: str = ""
    shown: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("batch", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"invalid {name}: {getattr(self, name)} (expected an integer >= 1)", f"--{name} 1")
        if self.seconds is not None and not self.seconds > 0:
            raise UserError(f"invalid seconds: {self.seconds:g} (expected a number > 0)", "leave --seconds out")
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise UserError("the prompt is empty", 'describe the image: --prompt "a fox in the snow"')

    def call(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline call."""
        return {
            "prompt": [self.prompts[i % len(self.prompts)] for i in range(self.batch)],
            "seed": self.seed,
            "height": self.height,
            "width": self.width,
            "sampler": self.sampler,
            **self.options,
            "steps": self.steps,
            "guidance_scale": self.guidance,
            **self.shown,
        }


def with_images(settings: BenchSettings, bundle: Bundle, folder: Path) -> BenchSettings:
    """The settings with the images that the bundle needs: a drawing of rings and a square for its control networks, for
    a UNet that edits, and to paint in, with the left half as the mask.

    Raises:
        UserError: for an image of one's own that cannot be read, or that the bundle has no network for.
    """
    controlled = len(set(control_components()) & set(bundle.manifest.components))
    if settings.control and not controlled:
        raise UserError(f"{bundle.path} has no T2I-Adapter or ControlNet", "leave --control out")
    if settings.control:
        images.batch(settings.control, 1, (8, 8))  # before minutes of measuring
    channels, latent = bundle.component("unet").inputs[0].shape[1], bundle.manifest.pipeline["latent_channels"]
    starts = channels != latent or bundle.manifest.refines
    drawing, half = _drawings(folder) if controlled or starts else ("", "")
    shown: dict[str, Any] = {"image": drawing} if starts else {}
    if channels == 2 * latent + 1:
        shown["mask_image"] = half
    if controlled:
        image = settings.control or drawing
        shown["control_image"] = image if controlled == 1 else [image] * controlled
    return replace(settings, shown=shown)


def _drawings(folder: Path) -> tuple[str, str]:
    """Files of a drawing, and of a mask."""
    from PIL import Image

    rows, columns = np.mgrid[0:256, 0:256]
    rings = np.hypot(rows - 128, columns - 128) % 32 < 2
    square = (np.maximum(abs(rows - 160), abs(columns - 96)) // 2) == 20
    drawing, half = folder / "drawing.png", folder / "mask.png"
    Image.fromarray(((rings | square) * 255).astype(np.uint8)).convert("RGB").save(drawing)
    Image.fromarray(((columns < 128) * 255).astype(np.uint8)).save(half)
    return str(drawing), str(half)


def check_batch(bundle: Bundle, settings: BenchSettings) -> None:
    """Refuse a batch that the pipeline would split, because it would time two calls as one.

    Raises:
        UserError: with what the profile accepts.
    """
    guidance = float(bundle.manifest.sampler["guidance"] if settings.guidance is None else settings.guidance)
    unet, images = bundle.component("unet"), bundle.component("vae_decoder").dims["images"]
    embedded = any(spec.name == "timestep_cond" for spec in unet.inputs)
    guided = 3 if bundle.manifest.edits else 2
    doubled = settings.batch * (guided if guidance > 1 and not embedded else 1)
    if not images.admits(settings.batch) or not unet.dims["batch"].admits(doubled):
        raise UserError(
            f"a batch of {settings.batch} (a UNet batch of {doubled}) is outside profile "
            f"{bundle.manifest.profile.name!r}: images {images}, UNet batch {unet.dims['batch']}",
            "use --batch within that, or export with another --profile",
        )


@dataclass
class Recording:
    """The calls of one component while an image was made: one set of inputs per distinct shape, and its count.

    Attributes:
        moved: bytes of the inputs and outputs of the first.
    """

    feeds: list[dict[str, Any]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    shapes: list[tuple] = field(default_factory=list)
    moved: int = 0

    def add(self, feeds: Mapping[str, Any]) -> None:
        shape = tuple((name, tuple(value.shape)) for name, value in sorted(feeds.items()))
        if shape in self.shapes:
            self.counts[self.shapes.index(shape)] += 1
            return
        self.shapes.append(shape)
        self.counts.append(1)
        self.feeds.append({name: to_numpy(value).copy() for name, value in feeds.items()})


class _Recorder:
    """An engine that remembers what it was fed."""

    def __init__(self, engine: Any, recording: Recording):
        self._engine, self._recording = engine, recording

    def __call__(self, **feeds: Any) -> dict[str, Any]:
        self._recording.add(feeds)
        made = self._engine(**feeds)
        if not self._recording.moved:
            self._recording.moved = sum(to_numpy(value).nbytes for value in (*feeds.values(), *made.values()))
        return made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def record(pipeline: Pipeline, call: Mapping[str, Any]) -> tuple[dict[str, Recording], Any]:
    """Make one image and keep what every component was fed, so that all variants are timed on exactly that.

    Returns:
        The recordings by component, and the output.
    """
    recordings = {name: Recording() for name in component_names(pipeline.bundle)}
    engines = {name: _Recorder(pipeline.engines[name], recordings[name]) for name in recordings}
    output = Pipeline(pipeline.bundle, engines)(output_type="np", **call)
    return recordings, output


def calls(pipeline: Pipeline, recordings: Mapping[str, Recording], call: Mapping[str, Any]) -> dict[str, Callable]:
    """One function per scope: each component on its first recorded inputs, and the whole image.

    Inputs are the engine's own arrays already, and each function returns only when its device has finished.
    """

    def component(name: str) -> Callable[[], Any]:
        engine = pipeline.engines[name]
        feeds = {key: engine.array(value) for key, value in recordings[name].feeds[0].items()}

        def run() -> dict[str, Any]:
            outputs = engine(**feeds)
            synchronize(next(iter(outputs.values())))
            return outputs

        return run

    scopes: dict[str, Callable] = {name: component(name) for name in recordings}
    scopes[IMAGE] = lambda: pipeline(output_type="np", **call)
    return scopes


def describe(scopes: Sequence[str], recordings: Mapping[str, Recording]) -> dict[str, Any]:
    """What each scope is, for the document: the shapes it is fed and how often an image needs it."""
    out: dict[str, Any] = {}
    for name in scopes:
        if name == IMAGE:
            out[name] = {
                "includes": "tokenizer, text encoder, noise, all steps with the sampler, VAE decode; float pixels out",
                "excludes": "loading, conversion to an image file format",
            }
        elif name in recordings:
            kept = recordings[name]
            shapes = {key: list(value.shape) for key, value in kept.feeds[0].items()}
            out[name] = {"inputs": shapes, "calls_per_image": sum(kept.counts), "io_bytes": kept.moved}
    return out
