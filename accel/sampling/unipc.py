"""UniPC (arXiv 2302.04867): a predictor, and a corrector that uses the next call of the model at no further cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from .grids import Grid, Problem
from .linear import Call, Linear, Row, lam
from .multistep import levels_of


def unipc(problem: Problem, grid: Grid) -> Iterator[Row]:
    """UniPC-p, B(h) = h (bh1) or expm1(h) (bh2), on x0 or on eps (algorithms 5 to 8)."""
    fields, n = problem.fields, len(grid.timesteps)
    past: list[Call] = []
    states: list[Linear] = []
    order = 1
    for call, end in levels_of(problem, grid):
        state = call.x
        if past and call.i - 1 not in fields["disable_corrector"]:
            state = _step(problem, past[-1], states[-1], past[-2 : -order - 1 : -1], (call.alpha, call.sigma), call)
        past.append(call)
        states.append(state if state is call.x else call.s)
        order = min(fields["solver_order"], len(past))
        if fields["lower_order_final"]:
            order = min(order, n - call.i)
        following = _step(problem, call, states[-1], past[-2 : -order - 1 : -1], end, None)
        yield call.row(following) if state is call.x else call.row(following, stored=state)


def _step(
    problem: Problem, last: Call, x: Linear, before: Sequence[Call], end: tuple[float, float], new: Call | None
) -> Linear:
    """From x at the level of `last` to `end`: the corrector if the prediction there, `new`, is known."""
    data, bh1 = problem.fields["predict_x0"], problem.fields["solver_type"] == "bh1"
    (alpha, sigma), h = end, lam(*end) - last.lam
    if h == 0:
        return x

    def m(call: Call) -> Linear:
        return call.x0 if data else call.eps

    signed = -h if data else h
    phi = math.expm1(signed)
    scale = alpha if data else sigma
    keep = sigma / last.sigma if data else alpha / last.alpha
    following = keep * x - scale * phi * m(last)
    ratios = [(call.lam - last.lam) / h for call in before]
    slopes = [(m(call) - m(last)) / ratio for call, ratio in zip(before, ratios, strict=True)]
    if new is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, m(new) - m(last)]
    if not slopes:
        return following
    b = signed if bh1 else phi
    if len(slopes) == 1:
        weights = [0.5]
    else:
        powers = np.array([[ratio**k for ratio in ratios] for k in range(len(ratios))])
        moments = [_phi(k + 2, signed) * math.factorial(k + 1) * signed / b for k in range(len(ratios))]
        weights = np.linalg.solve(powers, np.array(moments)).tolist()
    for weight, slope in zip(weights, slopes, strict=True):
        following = following - scale * b * weight * slope
    return following


def _phi(k: int, h: float) -> float:
    """phi_k(h) = (phi_(k-1)(h) - 1 / (k-1)!) / h, with phi_0 = exp; so phi_1 = expm1(h) / h."""
    return math.expm1(h) / h if k == 1 else (_phi(k - 1, h) - 1 / math.factorial(k - 1)) / h
