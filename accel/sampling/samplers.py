"""Samplers by name: which update rule, on which grid of timesteps, in how many steps.

The rules themselves, and what `model`, `noise` and `callback` have to be, are in `accel.sampling.solvers`. To add a
sampler: its function there, and its entry in `SAMPLERS` here. Command line, evaluation and export read that table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError, unknown
from .noise_schedule import NoiseSchedule, add_noise
from .solvers import (
    Callback,
    Constrain,
    Model,
    Noise,
    Timesteps,
    sample_ddim,
    sample_dmd2,
    sample_dpmpp_2m,
    sample_euler,
)

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "Sampler",
    "add_noise",
    "dmd2_timesteps",
    "grid",
    "needs_noise",
    "sample",
    "sample_ddim",
    "sample_dmd2",
    "sample_dpmpp_2m",
    "sample_euler",
]


def dmd2_timesteps(steps: int, T: int = 1000, *, one_step: int | None = None) -> list[int]:  # noqa: N803 (the papers')
    """DMD2's grid (arXiv 2405.14867, section 4.4): T - 1 downwards by T // steps; 4 steps are 999, 749, 499, 249.

    Args:
        steps: number of entries, 1 to T.
        T: number of training timesteps.
        one_step: the entry of a grid of one. None for 2/5 of the schedule, t = 399 of 1000, where the published
            one-step SDXL model runs (see `sample_dmd2`); SD1.5's, and the students trained here, run at T - 1.

    Raises:
        UserError: for another number of steps.
    """
    _check_steps(steps, T)
    if steps == 1:
        return [max(0, T * 2 // 5 - 1) if one_step is None else one_step]
    return [T - 1 - i * (T // steps) for i in range(steps)]


def _grid_dmd2(schedule: NoiseSchedule, steps: int) -> list[float]:
    return list(dmd2_timesteps(steps, schedule.T))


def _grid_ddim(schedule: NoiseSchedule, steps: int) -> list[float]:
    return _spaced(schedule, schedule.timestep_spacing or "leading", steps, points=steps, whole=True)


def _grid_euler(schedule: NoiseSchedule, steps: int) -> list[float]:
    return _spaced(schedule, schedule.timestep_spacing or "linspace", steps, points=steps, whole=False)


def _grid_dpmpp(schedule: NoiseSchedule, steps: int) -> list[float]:
    # One point more than steps, the lowest dropped: this solver adds its own end point at sigma = 0.
    return _spaced(schedule, schedule.timestep_spacing or "linspace", steps, points=steps + 1, whole=True)


def _spaced(schedule: NoiseSchedule, spacing: str, steps: int, *, points: int, whole: bool) -> list[float]:
    """The grids of arXiv 2305.08891, table 2, from high noise to low. `whole` rounds linspace to trained timesteps."""
    if spacing == "trailing":
        # Cut to length: rounding gives this range one entry too many, t = -1, for some step counts (61, 103, ...).
        ts = np.round(np.arange(schedule.T, 0, -schedule.T / steps)[:steps]) - 1
    elif spacing == "leading":
        ts = np.arange(points)[::-1][:steps] * (schedule.T // points) + schedule.steps_offset
    else:
        ts = np.linspace(0, schedule.T - 1, points)[::-1][:steps]
        ts = np.round(ts) if whole else ts
    return [int(t) if t == int(t) else float(t) for t in ts]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One sampler.

    Attributes:
        function: the update rule, called as those of `accel.sampling.solvers`.
        grid: (schedule, steps) -> timesteps, high noise first.
        steps: the default number of steps.
        stochastic: whether it adds noise after its steps.
        description: what it is for, in a line.
        scheduler: the class of diffusers that computes the same.
        options: names of further keyword arguments of `function`.
    """

    function: Callable[..., Any]
    grid: Callable[[NoiseSchedule, int], list[float]]
    steps: int
    stochastic: bool
    description: str
    scheduler: str
    options: tuple[str, ...] = ()


SAMPLERS: dict[str, Sampler] = {
    "dmd2": Sampler(
        function=sample_dmd2,
        grid=_grid_dmd2,
        steps=4,
        stochastic=True,
        description="few-step distilled models (DMD2, LCM-like): x0, fresh noise, repeat; no guidance",
        scheduler="LCMScheduler",
    ),
    "dpmpp_2m": Sampler(
        function=sample_dpmpp_2m,
        grid=_grid_dpmpp,
        steps=25,
        stochastic=False,
        description="DPM-Solver++ 2M: second-order multistep, the usual choice for undistilled models",
        scheduler="DPMSolverMultistepScheduler",
    ),
    "ddim": Sampler(
        function=sample_ddim,
        grid=_grid_ddim,
        steps=50,
        stochastic=False,
        description="DDIM: first order, deterministic; eta > 0 adds noise",
        scheduler="DDIMScheduler",
        options=("eta",),
    ),
    "euler": Sampler(
        function=sample_euler,
        grid=_grid_euler,
        steps=30,
        stochastic=False,
        description="Euler on the probability-flow ODE: first order, deterministic",
        scheduler="EulerDiscreteScheduler",
    ),
}


def grid(name: str, schedule: NoiseSchedule, steps: int | None = None) -> list[float]:
    """The timesteps of a sampler, high noise first; image-to-image noises its image to `grid(...)[start]`."""
    chosen = _sampler(name)
    steps = chosen.steps if steps is None else steps
    _check_steps(steps, schedule.T)
    return chosen.grid(schedule, steps)


def needs_noise(name: str, *, eta: float = 0.0) -> bool:
    """Whether `sample` has to be given `noise`."""
    chosen = _sampler(name)
    return chosen.stochastic or ("eta" in chosen.options and eta > 0)


def sample(
    name: str,
    model: Model,
    x: Any,
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Timesteps | None = None,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    start: int = 0,
    **options: Any,
) -> Any:
    """Run a sampler by name.

    Args:
        name: a key of `SAMPLERS`.
        model: (x, t) -> prediction, like x; t is a Python number.
        x: N(0, 1), any shape, numpy or torch, floating; with start > 0 noised by `add_noise` at `timesteps[start]`.
        steps: number of steps of the full grid; None: the sampler's default.
        timesteps: the grid itself, strictly falling, instead of `steps`.
        noise: i -> standard normal array like x; wanted where `needs_noise(name)`.
        constrain: (i, x) -> x, applied after step i.
        start: number of leading steps to skip.
        options: the sampler's own, such as `eta` of DDIM.

    Returns:
        x0, like x.

    Raises:
        UserError: unknown name or option, step count outside 1..T, a grid outside the schedule, missing noise.
    """
    chosen = _sampler(name)
    if unknown := set(options) - set(chosen.options):
        fix = f"it has: {', '.join(chosen.options)}" if chosen.options else "it has none: leave it out"
        raise UserError(f"sampler {name} has no option {', '.join(sorted(unknown))}", fix)
    if timesteps is None:
        timesteps = grid(name, schedule, steps)
    elif steps is not None and steps != len(timesteps):
        raise UserError(f"steps = {steps}, but {len(timesteps)} timesteps are given", "give one of the two")
    hooks = dict(noise=noise, callback=callback, constrain=constrain)
    return chosen.function(model, x, schedule, timesteps, start=start, **hooks, **options)


def _sampler(name: str) -> Sampler:
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]


def _check_steps(steps: int, limit: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= limit:
        raise UserError(f"invalid steps: {steps!r} (expected an integer from 1 to {limit})", "such as 4 or 25")
