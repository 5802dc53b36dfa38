"""Running samplers by name: their tables, their grids, and what a scheduler config says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import UserError, unknown
from . import grids, scheduler_config
from .constants import OPTIONS
from .grids import SIGMAS, Problem, dmd2_timesteps
from .linear import Callback, Constrain, Model, Noise, Table, run
from .noise_schedule import NoiseSchedule, add_noise
from .registry import SAMPLERS, Sampler, named

__all__ = [
    "SAMPLERS",
    "NoiseSchedule",
    "Sampler",
    "add_noise",
    "dmd2_timesteps",
    "grid",
    "named",
    "needs_noise",
    "own_sampler",
    "sample",
    "sample_ddim",
    "sample_dmd2",
    "sample_dpmpp_2m",
    "sample_euler",
    "table",
    "unread_fields",
]

Timesteps = Sequence[float]


def own_sampler(config: Mapping[str, Any]) -> str | None:
    """The name of the sampler that a scheduler config stands for; None where there is none here.

    Raises:
        UserError: naming the field, where the class is known and a value of it is not.
    """
    scheduler = str(config.get("_class_name", ""))
    if scheduler not in scheduler_config.CLASSES:
        return None
    scheduler_config.check(config)
    made = scheduler_config.settings(scheduler, config, {})
    for name, entry in SAMPLERS.items():
        if name != "dmd2" and entry.scheduler == scheduler and dict(entry.pinned).items() <= made.items():
            return name
    return None


def unread_fields(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a scheduler config that would change the image, but that this sampler does not read."""
    return scheduler_config.unread(named(name).scheduler, config)


def table(
    name: str,
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    timesteps: Timesteps | None = None,
    start: int = 0,
    eta: float | None = None,
    sigmas: str | None = None,
    timestep_spacing: str | None = None,
    shift: float | None = None,
) -> Table:
    """The table of a sampler, for `accel.sampling.linear.run`.

    Args:
        name, schedule, steps, timesteps: as in `sample`.
        start: number of leading rows to skip.
        eta: of DDIM 0 (the default) to 1, of TCD gamma.
        sigmas: spacing of the noise levels instead of the config's: a key of `SIGMAS`, or "none".
        timestep_spacing: leading, trailing or linspace instead of the config's.
        shift: of flow matching, instead of the config's.

    Raises:
        UserError: naming what this sampler or scheduler config cannot honour.
    """
    problem = _problem(name, schedule, steps, timesteps, start, eta, _overrides(name, sigmas, timestep_spacing, shift))
    chosen = named(name)
    if chosen.rows is None:
        raise UserError(f"sampler {name} has a loop of its own and no table", "run it with sample()")
    nodes = chosen.nodes(problem)
    grids.verify(problem, nodes, chosen.order)
    count = len(nodes.timesteps)
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < count:
        raise UserError(f"start = {start!r} with {count} steps", f"use a whole number from 0 to {count - 1}")
    scale = 1.0
    if chosen.exploding:
        # y starts as sigma_max N(0, 1); a leading grid starts lower, and there it is sqrt(1 + sigma_max^2) N(0, 1).
        leading = problem.fields["timestep_spacing"] == "leading"
        scale = 1.0 if leading else grids.variance_preserving(nodes.sigmas[0])[1]
    rows = tuple(chosen.rows(problem, nodes))
    return Table(rows, tuple(nodes.timesteps), first=start, scale=scale, clip=problem.clip, name=name)


def grid(name: str, schedule: NoiseSchedule, steps: int | None = None, **changes: Any) -> list[float]:
    """The timesteps at which a sampler calls the model, high noise first; `changes` as in `table`."""
    chosen = named(name)
    if chosen.grid is not None:
        steps = chosen.steps if steps is None else steps
        grids.check_steps(steps, schedule.T)
        return chosen.grid(schedule, steps)
    problem = _problem(name, schedule, steps, None, 0, None, _overrides(name, **changes))
    return chosen.nodes(problem).timesteps


def needs_noise(name: str, *, eta: float | None = 0.0) -> bool:
    """Whether `sample` has to be given `noise`."""
    chosen = named(name)
    return chosen.stochastic or ("eta" in chosen.options and bool(eta and eta > 0))


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
    noised: bool | None = None,
    **options: Any,
) -> Any:
    """Run a sampler by name.

    Args:
        name: a key of `SAMPLERS`.
        model: (x, t) -> prediction, like x; t is a Python number.
        x: N(0, 1), any shape, numpy or torch, floating; with start > 0 noised for that row (`Table.noised`).
        steps: number of steps of the full grid; None: the sampler's default.
        timesteps: the grid itself, strictly falling, instead of `steps`.
        noise: i -> standard normal array like x; wanted where `needs_noise(name)`.
        callback: called as (i, t, x) after row i; may raise to stop.
        constrain: (i, x) -> x, applied after row i.
        start: number of leading rows to skip.
        noised: whether x is noised already; None: if start is above 0.
        options: eta, sigmas, timestep_spacing, shift, as in `table`.

    Returns:
        x0, like x.

    Raises:
        UserError: unknown name or option, step count outside 1..T, a grid outside the schedule, missing noise, and what
            `table` refuses.
    """
    chosen = named(name)
    hooks: dict[str, Any] = dict(noise=noise, callback=callback, constrain=constrain)
    if chosen.function is None:
        if strange := set(options) - set(OPTIONS):
            raise UserError(f"sampler {name} has no option {', '.join(sorted(strange))}", "leave it out")
        made = table(name, schedule, steps, timesteps=timesteps, start=start, **options)
        return run(made, model, x, noised=start > 0 if noised is None else noised, **hooks)
    if given := [option for option, value in options.items() if value is not None]:
        raise UserError(f"sampler {name} has no option {', '.join(given)}", "it has none: leave it out")
    if timesteps is None:
        timesteps = grid(name, schedule, steps)
    elif steps is not None and steps != len(timesteps):
        raise UserError(f"steps = {steps}, but {len(timesteps)} timesteps are given", "give one of the two")
    return chosen.function(model, x, schedule, timesteps, start=start, **hooks)


def _problem(
    name: str,
    schedule: NoiseSchedule,
    steps: int | None,
    timesteps: Timesteps | None,
    start: int,
    eta: float | None,
    overrides: Mapping[str, Any],
) -> Problem:
    chosen = named(name)
    if eta is not None and "eta" not in chosen.options:
        fix = f"leave it out; samplers with it: {', '.join(n for n, e in SAMPLERS.items() if 'eta' in e.options)}"
        raise UserError(f"sampler {name} has no option eta", fix)
    if timesteps is not None and steps is not None and steps != len(timesteps):
        raise UserError(f"steps = {steps}, but {len(timesteps)} timesteps are given", "give one of the two")
    fields = scheduler_config.settings(chosen.scheduler, schedule.fields | dict(overrides), chosen.pinned)
    count = len(timesteps) if timesteps is not None else chosen.steps if steps is None else steps
    if timesteps is None:
        grids.check_steps(count, schedule.T)
    given = None if timesteps is None else tuple(timesteps)
    return Problem(schedule, fields, count, given, start, float(eta or 0.0))


def _overrides(
    name: str, sigmas: str | None = None, timestep_spacing: str | None = None, shift: float | None = None
) -> dict[str, Any]:
    """Scheduler fields that a caller sets instead of the config's.

    Raises:
        UserError: for an unknown value, and for a field that the sampler does not read.
    """
    made: dict[str, Any] = {}
    if sigmas is not None:
        if sigmas not in (*SIGMAS, "none"):
            raise unknown("sigmas", sigmas, (*SIGMAS, "none"))
        made |= {field: name == sigmas for name, field in SIGMAS.items()}
    if timestep_spacing is not None:
        made["timestep_spacing"] = timestep_spacing
    if shift is not None:
        made["flow_shift"] = shift
    for field, value in made.items():
        if value is not False and field not in named(name).fields:
            option = {"timestep_spacing": "timestep_spacing", "flow_shift": "shift"}.get(field, "sigmas")
            asked = sigmas if option == "sigmas" else value
            others = ", ".join(n for n, entry in SAMPLERS.items() if field in entry.fields)
            message = f"{option} = {asked!r}: sampler {name} has no {field}"
            raise UserError(message, f"leave it out, or use one of: {others}")
    scheduler_config.check(made)
    return made


def _function(name: str) -> Callable[..., Any]:
    def run_it(model: Model, x: Any, schedule: NoiseSchedule, timesteps: Timesteps, **options: Any) -> Any:
        return sample(name, model, x, schedule, timesteps=timesteps, **options)

    run_it.__name__ = run_it.__qualname__ = f"sample_{name}"
    run_it.__doc__ = f"`sample({name!r}, ...)` on a grid of its own: {SAMPLERS[name].description}."
    return run_it


sample_dmd2, sample_ddim, sample_euler, sample_dpmpp_2m = map(_function, ("dmd2", "ddim", "euler", "dpmpp_2m"))
