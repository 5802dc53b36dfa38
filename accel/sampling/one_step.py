"""Samplers whose every step needs no step before it: DDIM, DDPM, LCM, DMD2, TCD, Euler, Euler ancestral, Heun.

Each makes the rows of its table from a grid, in its paper's notation; a is alpha_bar. The state has unit variance with
every sampler, so that one can be exchanged for another: what the papers of the variance-exploding ones call x is
y = sqrt(1 + sigma^2) times it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ..errors import UserError
from .grids import Grid, Problem
from .linear import Call, Linear, Row


def ddim(problem: Problem, grid: Grid) -> Iterator[Row]:
    """DDIM (arXiv 2010.02502, eq. 12 and 16); eta = 0 is deterministic, eta = 1 is DDPM's ancestral sampling.

    A step goes down by T / steps, as diffusers does it, which is the next timestep of an even grid; to the next one of
    a grid that the caller gives.
    """
    eta = problem.eta
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta} is outside 0..1", "use 0 for a deterministic sampler, 1 for DDPM's")
    following = below(problem, grid.timesteps)
    for i, call in calls(problem, grid.timesteps):
        a, a_next = alpha_bar(problem, call.t), alpha_bar(problem, following[i])
        # At t = 0 with set_alpha_to_one = false the step stays where it is; rounding must not make that negative.
        std = eta * math.sqrt(max(0.0, (1 - a_next) / (1 - a) * (1 - a / a_next)))
        toward = math.sqrt(max(0.0, 1 - a_next - std**2))
        yield call.row(math.sqrt(a_next) * call.x0 + toward * call.eps + std * call.n)


def ddpm(problem: Problem, grid: Grid) -> Iterator[Row]:
    """DDPM (arXiv 2006.11239, eq. 6 and 7), between the timesteps of the grid."""
    ts = grid.timesteps
    for i, call in calls(problem, ts):
        a, a_next = alpha_bar(problem, call.t), alpha_bar(problem, ts[i + 1]) if i + 1 < len(ts) else 1.0
        beta = 1 - a / a_next
        mean = math.sqrt(a_next) * beta / (1 - a) * call.x0 + math.sqrt(1 - beta) * (1 - a_next) / (1 - a) * call.x
        large = problem.fields["variance_type"] == "fixed_large"
        variance = beta if large else max((1 - a_next) / (1 - a) * beta, 1e-20)
        yield call.row(mean + (math.sqrt(variance) if call.t > 0 else 0.0) * call.n)


def lcm(problem: Problem, grid: Grid) -> Iterator[Row]:
    """LCM's multistep consistency sampling (arXiv 2310.04378, algorithm 3): x0, fresh noise, repeat."""
    return _renoised(problem, grid, _boundary)


def dmd2(problem: Problem, grid: Grid) -> Iterator[Row]:
    """DMD2's few-step sampler (arXiv 2405.14867, section 4.5): x0, fresh noise, repeat; nothing is rescaled."""
    return _renoised(problem, grid, lambda problem, call: call.x0)


def _boundary(problem: Problem, call: Call) -> Linear:
    """c_skip x + c_out x0, which is x at t = 0 (arXiv 2303.01469, appendix C, with sigma_data = 1/2)."""
    scaled = call.t * problem.fields["timestep_scaling"]
    return 0.25 / (scaled**2 + 0.25) * call.x + scaled / math.sqrt(scaled**2 + 0.25) * call.x0


def _renoised(problem: Problem, grid: Grid, denoised: Callable[[Problem, Call], Linear]) -> Iterator[Row]:
    for i, call in calls(problem, grid.timesteps):
        clean = denoised(problem, call)
        if i + 1 == len(grid.timesteps):
            yield call.row(clean)
        else:
            a = alpha_bar(problem, grid.timesteps[i + 1])
            yield call.row(math.sqrt(a) * clean + math.sqrt(1 - a) * call.n)


def tcd(problem: Problem, grid: Grid) -> Iterator[Row]:
    """TCD's strategic stochastic sampling (arXiv 2402.19159, algorithm 4); its gamma is called eta, as in diffusers.

    A step goes to s = (1 - gamma) t_next, and with noise back up to t_next.
    """
    gamma, ts = problem.eta, grid.timesteps
    if not 0 <= gamma <= 1:
        raise UserError(
            f"eta = {gamma} is outside 0..1", "use 0 for a deterministic sampler, 0.3 for TCD's usual gamma"
        )
    for i, call in calls(problem, ts):
        last = i + 1 == len(ts)
        t_next = 0 if last else ts[i + 1]
        a_s, a_next = alpha_bar(problem, math.floor((1 - gamma) * t_next)), alpha_bar(problem, t_next)
        x_s = math.sqrt(a_s) * call.x0 + math.sqrt(1 - a_s) * call.eps
        if gamma == 0 or last:
            yield call.row(x_s)
        else:
            yield call.row(math.sqrt(a_next / a_s) * x_s + math.sqrt(1 - a_next / a_s) * call.n)


def euler(problem: Problem, grid: Grid) -> Iterator[Row]:
    """Euler steps on the probability-flow ODE dy/dsigma = eps (arXiv 2206.00364, algorithm 1 without churn)."""
    for call, s, s_next, scale in sigma_calls(problem, grid):
        yield call.row((y(call, s) + (s_next - s) * call.eps) / scale)


def euler_ancestral(problem: Problem, grid: Grid) -> Iterator[Row]:
    """Euler to sigma_down, then noise back up to the next sigma (k-diffusion's ancestral step)."""
    for call, s, s_next, scale in sigma_calls(problem, grid):
        up = math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2)
        down = math.sqrt(s_next**2 - up**2)
        yield call.row((y(call, s) + (down - s) * call.eps + up * call.n) / scale)


def heun(problem: Problem, grid: Grid) -> Iterator[Row]:
    """Heun's method on dy/dsigma = eps (arXiv 2206.00364, algorithm 1 without churn).

    Even rows take an Euler step; the odd row after it, at the level reached, takes the step again with the mean of both
    slopes. The step to sigma = 0 has no second half. An image-to-image run starts on an even row.
    """
    last: Call | None = None
    for call, s, s_next, scale in sigma_calls(problem, grid):
        if last is None:
            last, start = call, s
            yield call.row((y(call, s) + (s_next - s) * call.eps0) / scale)
        else:
            slope = 0.5 * (last.eps0 + call.eps0)
            yield call.row((y(last, start) + (s - start) * slope) / math.sqrt(1 + s**2))
            last = None


def sigma_calls(problem: Problem, grid: Grid) -> Iterator[tuple[Call, float, float, float]]:
    """(call, sigma, next sigma, what y is divided by at the end of the row); the last row ends on y itself."""
    pairs = list(zip(grid.timesteps, grid.sigmas, grid.sigmas[1:], strict=False))
    for i, (t, s, s_next) in enumerate(pairs[problem.start :], problem.start):
        scale = math.sqrt(1 + s_next**2) if i + 1 < len(pairs) else 1.0
        yield Call(i, t, *problem.level(s), problem.fields["prediction_type"], problem.clip), s, s_next, scale


def y(call: Call, sigma: float) -> Linear:
    return math.sqrt(1 + sigma**2) * call.x


def calls(problem: Problem, timesteps: list[float]) -> Iterator[tuple[int, Call]]:
    for i, t in list(enumerate(timesteps))[problem.start :]:
        a = alpha_bar(problem, t)
        yield i, Call(i, t, math.sqrt(a), math.sqrt(1 - a), problem.fields["prediction_type"], problem.clip)


def below(problem: Problem, ts: list[float]) -> list[float]:
    """Where each step goes to; below 0 at the end."""
    if problem.timesteps is not None:
        return [*ts[1:], -1]
    return [t - problem.schedule.T // problem.steps for t in ts]


def alpha_bar(problem: Problem, t: float) -> float:
    """alpha_bar, also past the end: 1, or that of timestep 0 with `set_alpha_to_one = false`."""
    if t >= 0:
        return problem.schedule.alpha_bar(t)
    return 1.0 if problem.fields["set_alpha_to_one"] else float(problem.schedule.alphas_cumprod[0])
