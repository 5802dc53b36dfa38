"""Samplers that use what the model predicted before: DPM-Solver++ (multistep and singlestep), DEIS, LMS and PNDM.

lambda is log(alpha / sigma), h its growth over a step. `D_k` are the divided differences of the predictions. An
image-to-image run starts without history, so at first order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import UserError
from .grids import Grid, Problem, discrete, refused
from .linear import Call, Linear, Row, lam
from .one_step import alpha_bar, below, calls, sigma_calls, y


def levels_of(problem: Problem, grid: Grid) -> Iterator[tuple[Call, tuple[float, float]]]:
    """(call, (alpha, sigma) that its row ends on)."""
    levels = [problem.level(s) for s in grid.sigmas]
    for i in range(problem.start, len(grid.timesteps)):
        call = Call(i, grid.timesteps[i], *levels[i], problem.fields["prediction_type"], problem.clip)
        yield call, levels[i + 1]


def dpmpp_multistep(problem: Problem, grid: Grid) -> Iterator[Row]:
    """DPM-Solver++, multistep, orders 1 to 3 (arXiv 2211.01095, algorithm 2 and appendix D), as ODE or SDE."""
    fields, n, past = problem.fields, len(grid.timesteps), []
    few = fields["lower_order_final"] and n < 15
    for call, end in levels_of(problem, grid):
        past.append(call)
        order = min(fields["solver_order"], len(past))
        if call.i == n - 1 and (few or fields["euler_at_final"] or fields["final_sigmas_type"] == "zero"):
            order = 1
        elif call.i == n - 2 and few:
            order = min(order, 2)
        d = [call.x0]
        h = lam(*end) - call.lam
        if order > 1:
            r0 = (past[-1].lam - past[-2].lam) / h if h else math.inf
            d.append((past[-1].x0 - past[-2].x0) / r0)
        if order > 2:
            r1 = (past[-2].lam - past[-3].lam) / h if h else math.inf
            before = (past[-2].x0 - past[-3].x0) / r1
            bend = (d[1] - before) / (r0 + r1)
            d = [d[0], d[1] + r0 * bend, bend]
        yield call.row(_dpmpp(problem, call, call, end, d, exact=order > 2 or fields["solver_type"] == "heun"))


def dpmpp_singlestep(problem: Problem, grid: Grid) -> Iterator[Row]:
    """DPM-Solver++, singlestep, orders 1 to 3 (arXiv 2211.01095, algorithm 1): steps of one, two or three calls."""
    fields, past = problem.fields, []
    orders = _singlestep_orders(fields, len(grid.timesteps))
    for call, end in levels_of(problem, grid):
        past.append(call)
        order = min(orders[call.i], len(past))
        first = past[-order]
        h = lam(*end) - first.lam
        d, exact = [first.x0], fields["solver_type"] == "heun"
        if order > 1:
            r0 = (call.lam - first.lam) / h
            d.append((call.x0 - first.x0) / r0)
        if order > 2:
            r1 = (past[-2].lam - first.lam) / h
            middle = (past[-2].x0 - first.x0) / r1
            if exact:
                d = [d[0], (r0 * middle - r1 * d[1]) / (r0 - r1), 2 * (d[1] - middle) / (r0 - r1)]
            exact = True
        # A step that image to image begins in the middle goes on from where it is.
        base = next((before for before in reversed(past) if orders[before.i] == 1), past[0])
        yield call.row(_dpmpp(problem, base, first, end, d, exact=exact, noise=call.n))


def _dpmpp(
    problem: Problem,
    base: Call,
    first: Call,
    end: tuple[float, float],
    d: Sequence[Linear],
    *,
    exact: bool,
    noise: Linear | None = None,
) -> Linear:
    """From `base.x`, at the level of `first`, to `end`; `exact` integrates D_1, without it the midpoint rule."""
    (alpha, sigma), h = end, lam(*end) - first.lam
    if h == 0:
        return base.x
    sde = problem.fields["algorithm_type"] == "sde-dpmsolver++"
    g = 2 * h if sde else h
    decay = -math.expm1(-g)
    x = sigma / first.sigma * (math.exp(-h) if sde else 1.0) * base.x + alpha * decay * d[0]
    if len(d) > 1:
        x = x + alpha * (1 - decay / g if exact else 0.5 * decay) * d[1]
    if len(d) > 2:
        x = x + alpha * ((decay - g) / g**2 + (-0.5 if sde else 0.5)) * d[2]
    return x + sigma * math.sqrt(decay) * (noise or first.n) if sde else x


def _singlestep_orders(fields: Mapping[str, Any], steps: int) -> list[int]:
    """The order at each row: 1 begins a step. Whole steps of the solver's order, and smaller ones at the end."""
    order, zero = fields["solver_order"], fields["final_sigmas_type"] == "zero"
    whole = list(range(1, order + 1))
    if fields["lower_order_final"] or steps % order or zero:
        full, rest = divmod(steps, order)
        if order == 3 and rest == 0:
            orders = whole * (full - 1) + [1, 2, 1]
        elif order == 2 and rest == 0:
            orders = whole * (full - 1) + [1, 1]
        else:
            orders = whole * full + whole[:rest]
    else:
        orders = whole * (steps // order)
    return [*orders[:-1], 1] if zero else orders


def deis(problem: Problem, grid: Grid) -> Iterator[Row]:
    """DEIS (arXiv 2204.13902), log-rho multistep, orders 1 to 3: rho = sigma / alpha.

    eps is a polynomial in log rho through its last values; its Lagrange polynomials are integrated over rho exactly.
    """
    fields, n, past = problem.fields, len(grid.timesteps), []
    few = fields["lower_order_final"] and n < 15
    for call, (alpha, sigma) in levels_of(problem, grid):
        past.append(call)
        order = min(fields["solver_order"], len(past))
        if few:
            order = min(order, n - call.i)
        x = 1 / call.alpha * call.x
        logs = [-before.lam for before in past[: -order - 1 : -1]]
        for k, before in enumerate(past[: -order - 1 : -1]):
            basis = _lagrange(logs, k)
            x = x + (_rho_integral(basis, sigma / alpha) - _rho_integral(basis, call.sigma / call.alpha)) * before.eps0
        yield call.row(alpha * x)


def _lagrange(nodes: Sequence[float], k: int) -> np.ndarray:
    """Coefficients, lowest power first, of the polynomial that is 1 at nodes[k] and 0 at the others."""
    others = [node for j, node in enumerate(nodes) if j != k]
    top = np.polynomial.polynomial.polyfromroots(others) if others else np.ones(1)
    return top / math.prod(nodes[k] - node for node in others)


def _rho_integral(basis: np.ndarray, rho: float) -> float:
    """An antiderivative of basis(log rho) over rho: rho times (p - p' + p'' - ...)(log rho)."""
    total, sign = 0.0, 1.0
    while basis.size and basis.any():
        total += sign * float(np.polynomial.polynomial.polyval(math.log(rho), basis))
        basis, sign = np.polynomial.polynomial.polyder(basis), -sign
    return rho * total


def lms(problem: Problem, grid: Grid) -> Iterator[Row]:
    """Linear multistep of order 4 on dy/dsigma = eps (k-diffusion's LMS): the polynomial through the last slopes."""
    past: list[tuple[Call, float]] = []
    nodes, weights = np.polynomial.legendre.leggauss(4)
    for call, s, s_next, scale in sigma_calls(problem, grid):
        past = [(call, s), *past][:4]
        at = (s_next + s) / 2 + (s_next - s) / 2 * nodes
        state = y(call, s)
        for k, (before, _) in enumerate(past):
            basis = _lagrange([sigma for _, sigma in past], k)
            integral = (s_next - s) / 2 * weights @ np.polynomial.polynomial.polyval(at, basis)
            state = state + float(integral) * before.eps
        yield call.row(state / scale)


def pndm_grid(problem: Problem) -> Grid:
    """The rows of `pndm`: its second timestep twice, or twelve rows of Runge-Kutta with `skip_prk_steps = false`."""
    if problem.timesteps is not None:
        raise UserError("sampler pndm takes no timesteps of its own", "give steps instead, or another sampler")
    ts, steps = discrete(problem).timesteps, problem.steps
    if problem.fields["skip_prk_steps"]:
        return Grid([*ts[:2], *ts[1:]], [])
    if steps < 4:
        raise refused("skip_prk_steps", False, "use at least 4 steps, or set it to true")
    half = problem.schedule.T // steps // 2
    return Grid([u for t, end in zip(ts, ts[1:4], strict=False) for u in (t, end + half, end + half, end)] + ts[3:], [])


def pndm(problem: Problem, grid: Grid) -> Iterator[Row]:
    """PNDM (arXiv 2202.09778): pseudo linear multistep of order 4 with the transfer of eq. 11, as diffusers runs it.

    The history is of raw predictions, which one transfer turns into eps. The start is a second-order step of two calls,
    or with `skip_prk_steps = false` three steps of pseudo Runge-Kutta (eq. 13), four calls each.
    """
    step, past = problem.schedule.T // problem.steps, []
    plms = problem.fields["skip_prk_steps"]
    if problem.start and not plms:
        raise refused("skip_prk_steps", False, "for image to image set it to true, or use --sampler ddim")
    weights = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    stages: list[Call] = []
    first: Call | None = None
    for i, call in calls(problem, grid.timesteps):
        end = below(problem, [call.t])[0]
        if not plms and i < 12:
            stages = [*stages, call] if i % 4 else [call]
            if i % 4 == 0:
                past.append(call.p)
            end = call.t if i % 2 else call.t - step // 2
            mean = [1.0] if i % 4 < 3 else [1 / 6, 1 / 3, 1 / 3, 1 / 6]
            p = _sum(mean, [c.p for c in stages[-len(mean) :]])
            yield call.row(_transfer(problem, stages[0], stages[0].t, end, p))
        elif plms and i == problem.start + 1 and first is not None:
            p = _sum([0.5, 0.5], [first.p, call.p])
            yield call.row(_transfer(problem, first, call.t + step, call.t, p))
        else:
            first = first or call
            past = [*past, call.p][-4:]
            yield call.row(_transfer(problem, call, call.t, end, _sum(weights[len(past)], past[::-1])))


def _transfer(problem: Problem, call: Call, t: float, end: float, p: Linear) -> Linear:
    """eq. 11: from `call.x` at timestep t to `end` along the prediction p."""
    a, b = alpha_bar(problem, t), alpha_bar(problem, end)
    eps = math.sqrt(a) * p + math.sqrt(1 - a) * call.x if problem.fields["prediction_type"] == "v_prediction" else p
    return math.sqrt(b / a) * call.x - (b - a) / (a * math.sqrt(1 - b) + math.sqrt(a * (1 - a) * b)) * eps


def _sum(factors: Sequence[float], terms: Sequence[Linear]) -> Linear:
    total = factors[0] * terms[0]
    for factor, term in zip(factors[1:], terms[1:], strict=True):
        total = total + factor * term
    return total
