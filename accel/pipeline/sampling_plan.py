"""How the images of a call are sampled: the bundle's own constants, and what the call says instead."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..bundle import Manifest
from ..errors import Notice, UserError
from ..sampling import Sampling
from ..sampling import samplers as sampler
from ..sampling.linear import Table
from ..sampling.noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class SamplingPlan:
    """How to sample.

    Attributes:
        timesteps: the full grid, one for each call of the UNet; `start` leading ones are skipped (image to image).
        rows: of the UNet's batch for each image: 2 with guidance, 3 where an image guides too, else 1.
        table: the sampler's coefficients, from `start` on; None for one with a loop of its own.
        image_guidance: how closely an edited image keeps to its source.
        stop: the step before which the run ends; None for the grid's end.
        resumes: whether it starts from the latents that another run left at `start`.
    """

    sampler: str
    timesteps: list[float]
    guidance: float
    rows: int
    start: int = 0
    table: Table | None = None
    image_guidance: float = 0.0
    stop: int | None = None
    resumes: bool = False

    def noised(self, schedule: NoiseSchedule, x0: Any, eps: Any, i: int) -> Any:
        """An image with the noise that the state has before row i; arrays of one shape and dtype."""
        if self.table is None:
            return sampler.add_noise(schedule, x0, eps, self.timesteps[i])
        return self.table.noised(x0, eps, i)

    @property
    def guided(self) -> bool:
        """Whether the UNet runs with and without the prompt."""
        return self.rows > 1

    def combined(self, out: Any) -> Any:
        """The prediction of a UNet's output [rows * N, C, h, w]: classifier-free guidance (arXiv 2207.12598); with an
        image too as in InstructPix2Pix (arXiv 2211.09800, equation 3), rows in order of what they are given:
        neither, the image, image and prompt."""
        count = len(out) // self.rows
        first, *others = (out[i * count : (i + 1) * count] for i in range(self.rows))
        if not others:
            return first
        if self.rows == 2:
            return first + self.guidance * (others[0] - first)
        seen, full = others
        return first + self.guidance * (full - seen) + self.image_guidance * (seen - first)

    @property
    def steps(self) -> int:
        return (len(self.timesteps) if self.stop is None else self.stop) - self.start


def plan(
    manifest: Manifest,
    schedule: NoiseSchedule,
    name: str | None,
    steps: int | None,
    timesteps: Sequence[float] | None,
    guidance: float | None,
    strength: float | None,
    options: Mapping[str, Any] | None = None,
    image_guidance: float | None = None,
    part: tuple[float | None, float | None] = (None, None),
) -> SamplingPlan:
    """The sampler, its grid and guidance: the bundle's own constants where an argument is None.

    Args:
        options: of the sampler (`accel.sampling.constants.OPTIONS`); those that are None are the bundle's own.
        image_guidance: of a model that edits images; None for 1.5, as in diffusers.
        part: where the run begins and ends, as shares of the noise schedule: (None, 0.8) of a base model and (0.8,
            None) of the refiner that goes on (diffusers' denoising_start and denoising_end).

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
    made, stop = None, None
    if entry.rows is not None:
        made = sampler.table(name, schedule, steps, timesteps=timesteps, start=start, **given)
        timesteps = made.timesteps
        first, stop = _part(part, timesteps, schedule.T, entry.order)
        if first:
            start = first
            made = sampler.table(name, schedule, steps, timesteps=list(timesteps), start=first, **given)
        if stop is not None:
            made = replace(made, rows=made.rows[: stop - start])
    elif part != (None, None):
        raise UserError(f"sampler {name} runs as a whole", "--sampler euler, or leave denoising_start and _end out")
    elif timesteps is None:
        timesteps = sampler.grid(name, schedule, steps)
    _note_calibration(manifest, name, count)
    if name != own.sampler and (unread := sampler.unread_fields(name, schedule.config)):
        fields = ", ".join(f"{field} = {value!r}" for field, value in unread.items())
        warnings.warn(f"sampler {name} does not read the scheduler's {fields}", Notice, stacklevel=3)
    rows = 2 if scale > 1 and not embedded else 1
    if not manifest.edits:
        if image_guidance is not None:
            text = f"image_guidance_scale {image_guidance:g}: {manifest.source['name']} does not edit images"
            raise UserError(text, "leave it out; strength says how much of an image is given up")
        resumes = part[0] is not None
        return SamplingPlan(name, list(timesteps), scale, rows, start, made, stop=stop, resumes=resumes)
    image_guidance = 1.5 if image_guidance is None else float(image_guidance)
    if not 0 <= image_guidance < float("inf"):
        raise UserError(f"invalid image_guidance_scale: {image_guidance} (expected >= 0)", "such as 1.5")
    if rows == 2 and image_guidance < 1:  # diffusers guides by both or not at all
        text = f"image_guidance_scale {image_guidance:g} is below 1, so nothing guides, neither image nor prompt"
        warnings.warn(f"{text} (as in diffusers)", Notice, stacklevel=3)
    rows = 3 if rows == 2 and image_guidance >= 1 else 1
    return SamplingPlan(name, list(timesteps), scale, rows, start, made, image_guidance)


def _note_calibration(manifest: Manifest, name: str, steps: int) -> None:
    """Say that a call is not sampled as the images were from which an int8 UNet has its ranges."""
    ranges = manifest.components["unet"].int8.get("calibration", {})
    if ranges.get("ranges") != "calibrated" or "sampler" not in ranges:  # trained, or of weights alone
        return
    seen = Sampling.from_dict(ranges["sampler"], "the record of the calibration")
    of = len(seen.timesteps) if seen.timesteps is not None else seen.steps
    if (name, steps) != (seen.sampler, of):
        warnings.warn(
            f"the UNet's int8 ranges were calibrated on {seen.sampler} in {of} steps; the image in {steps} of {name} "
            f"may be further from float32's (export it with --sampler {name} --steps {steps} to calibrate for that)",
            Notice,
            stacklevel=3,
        )


def _part(
    part: tuple[float | None, float | None], timesteps: Sequence[float], T: int, order: int
) -> tuple[int, int | None]:
    """The steps at which a run begins and before which it ends, counted as diffusers does.

    Args:
        part: as in `plan`.
        T: number of timesteps that the model was trained with.
        order: calls of the model in one step of the sampler.
    """
    for name, value in zip(("denoising_start", "denoising_end"), part, strict=True):
        if value is not None and not 0 < value < 1:
            raise UserError(f"invalid {name}: {value:g} (expected above 0 and below 1)", "such as 0.8")
    begin, end = part
    first, stop = 0, None
    if begin is not None:
        left = sum(t < round(T - begin * T) for t in timesteps)
        left += order == 2 and left % 2 == 0  # not between the two calls of one step
        first = len(timesteps) - left
    if end is not None:
        stop = sum(t >= round(T - end * T) for t in timesteps)
    if first >= (len(timesteps) if stop is None else stop):
        raise UserError(f"no step of {len(timesteps)} lies in the part {begin} to {end}", "take more steps")
    return first, stop


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
