"""Samplers by name: which rows, on which grid, in how many steps, and which class of diffusers computes the same.

To add a sampler: a function that writes its rows (`one_step.py` has the short ones), and its entry in `SAMPLERS` here;
one that is not linear brings a loop of its own as `function`. Command line, evaluation and export read that table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import unknown
from . import grids, multistep, one_step, scheduler_config, unipc
from .grids import Grid, Problem
from .linear import Row
from .noise_schedule import NoiseSchedule


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


def named(name: str) -> Sampler:
    """The entry of `SAMPLERS`.

    Raises:
        UserError: for another name.
    """
    if name not in SAMPLERS:
        raise unknown("sampler", name, SAMPLERS)
    return SAMPLERS[name]
