"""Samplers by name: which rows, on which grid, in how many steps, and which class of diffusers computes the same.

To add a sampler: a function that writes its rows (`one_step.py` has the short ones), and its entry in `SAMPLERS` here;
one that is not linear brings a loop of its own as `function`. Command line, evaluation and export read that table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError
from . import grids, multistep, one_step, scheduler_config, unipc
from .grids import SIGMAS, Grid, Problem, dmd2_timesteps
from .linear import Callback, Constrain, Model, Noise, Row, Table, run
from .noise_schedule import NoiseSchedule, add_noise

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


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One sampler.

    Attributes:
        scheduler: the class of diffusers that computes the same.
        description: what it is for, in a line.
        steps: the default number of steps.
        nodes: (problem) -> where the model is called.
        rows: (problem, nodes) -> the rows of its table.
        pinned: fields of the scheduler that the sampler's name decides.
        stochastic: whether it draws noise whatever the options.
        options: names of its own options; only `eta` so far.
        order: rows per step.
        exploding: whether pure noise is scaled as variance-exploding samplers do it.
        function: instead of nodes and rows, a loop of its own: called as `sample_ddim`.
        grid: with `function`: (schedule, steps) -> timesteps, high noise first.
    """

    scheduler: str
    description: str
    steps: int
    nodes: Callable[[Problem], Grid] = grids.discrete
    rows: Callable[[Problem, Grid], Iterable[Row]] | None = None
    pinned: Mapping[str, Any] = field(default_factory=dict)
    stochastic: bool = False
    options: tuple[str, ...] = ()
    order: int = 1
    exploding: bool = False
    function: Callable[..., Any] | None = None
    grid: Callable[[NoiseSchedule, int], list[float]] | None = None

    @property
    def fields(self) -> Mapping[str, Any]:
        """The scheduler fields that it reads, with their defaults."""
        return scheduler_config.CLASSES.get(self.scheduler, {})


def _dpmpp(order: int, *, single: bool = False, sde: bool = False) -> Sampler:
    kind = "singlestep" if single else "multistep"
    text = "an SDE, noise in every step" if sde else "deterministic"
    usual = "; the usual choice for undistilled models" if order == 2 and not (single or sde) else ""
    return Sampler(
        scheduler=f"DPMSolver{kind.capitalize()}Scheduler",
        description=f"DPM-Solver++, {kind}, order {order}: {text}{usual}",
        steps=25,
        nodes=grids.logarithmic,
        rows=multistep.dpmpp_singlestep if single else multistep.dpmpp_multistep,
        pinned={"algorithm_type": "sde-dpmsolver++" if sde else "dpmsolver++", "solver_order": order},
        stochastic=sde,
    )


SAMPLERS: dict[str, Sampler] = {
    "dmd2": Sampler(
        scheduler="LCMScheduler",
        description="few-step distilled models (DMD2, LCM-like): x0, fresh noise, repeat; no guidance",
        steps=4,
        nodes=grids.dmd2,
        rows=one_step.dmd2,
        stochastic=True,
    ),
    "dpmpp_2m": _dpmpp(2),
    "ddim": Sampler(
        scheduler="DDIMScheduler",
        description="DDIM: first order, deterministic; eta > 0 adds noise",
        steps=50,
        rows=one_step.ddim,
        options=("eta",),
    ),
    "euler": Sampler(
        scheduler="EulerDiscreteScheduler",
        description="Euler on the probability-flow ODE: first order, deterministic",
        steps=30,
        nodes=grids.variance_exploding,
        rows=one_step.euler,
        exploding=True,
    ),
    "euler_ancestral": Sampler(
        scheduler="EulerAncestralDiscreteScheduler",
        description="Euler with fresh noise in every step",
        steps=30,
        nodes=grids.variance_exploding,
        rows=one_step.euler_ancestral,
        stochastic=True,
        exploding=True,
    ),
    "heun": Sampler(
        scheduler="HeunDiscreteScheduler",
        description="Heun on the probability-flow ODE: second order, two calls of the model a step",
        steps=25,
        nodes=grids.heun,
        rows=one_step.heun,
        order=2,
        exploding=True,
    ),
    "lms": Sampler(
        scheduler="LMSDiscreteScheduler",
        description="linear multistep of order 4 on the probability-flow ODE",
        steps=30,
        nodes=grids.variance_exploding,
        rows=multistep.lms,
        exploding=True,
    ),
    "pndm": Sampler(
        scheduler="PNDMScheduler",
        description="PNDM: pseudo linear multistep of order 4, what Stable Diffusion 1.x folders carry",
        steps=50,
        nodes=multistep.pndm_grid,
        rows=multistep.pndm,
    ),
    "unipc": Sampler(
        scheduler="UniPCMultistepScheduler",
        description="UniPC: predictor and corrector of the order that the scheduler says",
        steps=20,
        nodes=grids.logarithmic,
        rows=unipc.unipc,
    ),
    "deis": Sampler(
        scheduler="DEISMultistepScheduler",
        description="DEIS: exponential integrator of the order that the scheduler says",
        steps=25,
        nodes=grids.logarithmic,
        rows=multistep.deis,
    ),
    "ddpm": Sampler(
        scheduler="DDPMScheduler",
        description="DDPM: ancestral sampling, noise in every step; needs many of them",
        steps=100,
        rows=one_step.ddpm,
        stochastic=True,
    ),
    "lcm": Sampler(
        scheduler="LCMScheduler",
        description="latent consistency models: x0, fresh noise, repeat",
        steps=4,
        nodes=grids.distilled,
        rows=one_step.lcm,
        stochastic=True,
    ),
    "tcd": Sampler(
        scheduler="TCDScheduler",
        description="trajectory consistency models; eta (gamma) > 0 adds noise",
        steps=4,
        nodes=grids.distilled,
        rows=one_step.tcd,
        options=("eta",),
    ),
    "dpmpp_3m": _dpmpp(3),
    "dpmpp_2m_sde": _dpmpp(2, sde=True),
    "dpmpp_3m_sde": _dpmpp(3, sde=True),
    "dpmpp_2s": _dpmpp(2, single=True),
    "dpmpp_3s": _dpmpp(3, single=True),
    "dpmpp_2s_sde": _dpmpp(2, single=True, sde=True),
    "dpmpp_3s_sde": _dpmpp(3, single=True, sde=True),
    "dpmpp_1m": _dpmpp(1),
    "dpmpp_1m_sde": _dpmpp(1, sde=True),
    "dpmpp_1s": _dpmpp(1, single=True),
    "dpmpp_1s_sde": _dpmpp(1, single=True, sde=True),
}


def own_sampler(config: Mapping[str, Any]) -> str | None:
    """The name of the sampler that a scheduler config stands for; None where there is none here.

    Raises:
        UserError: naming the field, where the class is known and a value of it is not.
    """
    scheduler = str(config.get("_class_name", ""))
    scheduler_config.check(config)
    if scheduler not in scheduler_config.CLASSES:
        return None
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
        if unknown := set(options) - {"eta", "sigmas", "timestep_spacing", "shift"}:
            raise UserError(f"sampler {name} has no option {', '.join(sorted(unknown))}", "leave it out")
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
    """Scheduler fields that a caller sets instead of the config's, where the sampler reads them."""
    made: dict[str, Any] = {}
    if sigmas is not None:
        if sigmas not in (*SIGMAS, "none"):
            raise UserError(f"unknown sigmas {sigmas!r}", f"one of: {', '.join((*SIGMAS, 'none'))}")
        made |= dict.fromkeys(SIGMAS.values(), False) | ({SIGMAS[sigmas]: True} if sigmas != "none" else {})
    if timestep_spacing is not None:
        made["timestep_spacing"] = timestep_spacing
    if shift is not None:
        made["flow_shift"] = shift
    wanted = [field for field, value in made.items() if value is not False]
    read = named(name).fields
    for option, value in (("sigmas", sigmas), ("timestep_spacing", timestep_spacing), ("shift", shift)):
        for needed in wanted if value is not None else ():
            belongs = {"timestep_spacing": "timestep_spacing", "flow_shift": "shift"}.get(needed, "sigmas")
            if belongs == option and needed not in read:
                others = ", ".join(n for n, entry in SAMPLERS.items() if needed in entry.fields)
                raise UserError(
                    f"{option} = {value!r}: sampler {name} has no {needed}", f"leave it out, or use one of: {others}"
                )
    scheduler_config.check(made)
    return made


def named(name: str) -> Sampler:
    """The entry of `SAMPLERS`.

    Raises:
        UserError: for another name.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}", "use one of " + ", ".join(SAMPLERS))
    return SAMPLERS[name]


def _function(name: str) -> Callable[..., Any]:
    def run_it(model: Model, x: Any, schedule: NoiseSchedule, timesteps: Timesteps, **options: Any) -> Any:
        return sample(name, model, x, schedule, timesteps=timesteps, **options)

    run_it.__name__ = run_it.__qualname__ = f"sample_{name}"
    run_it.__doc__ = f"`sample({name!r}, ...)` on a grid of its own: {SAMPLERS[name].description}."
    return run_it


sample_dmd2, sample_ddim, sample_euler, sample_dpmpp_2m = map(_function, ("dmd2", "ddim", "euler", "dpmpp_2m"))
