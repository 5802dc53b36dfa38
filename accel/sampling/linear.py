"""Samplers as tables: every step is a linear combination, and one loop runs any table on numpy and torch arrays alike.

Nearly every sampler is linear in its state x, in the model's predictions and in noise; only the coefficients differ.
So a sampler is a function that makes a table of coefficients, in float64 and in its paper's notation; `step` computes
one row of any table, and `run` is the only loop. A row is one call of the model. With x_i the state at row i and
p_i = model(x_i, t_i), a later state is a combination of these variables, of this row and of rows before it:

    ("x", i)   the state that the model was called with; of unit variance in every sampler but flow matching
    ("p", i)   what the model predicted
    ("m", i)   the x0 that follows from both, clipped if the scheduler says so
    ("s", i)   another state that the row defines for later rows (UniPC's corrected one)
    ("n", i)   fresh standard normal noise

Arrays meet only `+` and `*` with Python floats: their dtype is kept, and nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import UserError

Model = Callable[[Any, float], Any]
Noise = Callable[[int], Any]
Callback = Callable[[int, float, Any], None]
Constrain = Callable[[int, Any], Any]
Variable = tuple[str, int]
Terms = tuple[tuple[Variable, float], ...]


class Linear:
    """A linear combination of variables: `0.5 * row.x - sigma * row.eps`."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Variable, float]):
        self.terms = dict(terms)

    def __add__(self, other: Linear) -> Linear:
        terms = dict(self.terms)
        for variable, factor in other.terms.items():
            terms[variable] = terms.get(variable, 0.0) + factor
        return Linear(terms)

    def __mul__(self, factor: float) -> Linear:
        return Linear({variable: factor * own for variable, own in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Linear:
        return self * -1.0

    def __sub__(self, other: Linear) -> Linear:
        return self + -other

    def __truediv__(self, divisor: float) -> Linear:
        return self * (1 / divisor)

    def frozen(self) -> Terms:
        """The terms that count, as Python floats."""
        return tuple((variable, float(factor)) for variable, factor in self.terms.items() if factor != 0)


ZERO = Linear({})


@dataclass(frozen=True)
class Row:
    """One call of the model and what becomes of it.

    Attributes:
        t: the timestep that the model is given.
        level: (alpha, sigma) of the state: an image noised for this row is alpha x0 + sigma noise.
        clean: (a, b) such that x0 = a x + b prediction.
        next: the state after this row.
        stored: the value of ("s", i), if the row defines one.
    """

    t: float
    level: tuple[float, float]
    clean: tuple[float, float]
    next: Terms
    stored: Terms = ()


@dataclass(frozen=True)
class Clip:
    """What is done to each predicted x0.

    Attributes:
        limit: clip to [-limit, limit]; with a ratio, the most that the dynamic threshold may be.
        ratio: quantile for dynamic thresholding (Imagen, arXiv 2205.11487, section 2.3); None for plain clipping.
    """

    limit: float
    ratio: float | None = None

    def __call__(self, x0: Any) -> Any:
        if self.ratio is None:
            return x0.clip(-self.limit, self.limit)
        # Per image: s is the quantile of |x0|, at least 1; x0 is clipped to [-s, s] and divided by s.
        flat = abs(x0).reshape(len(x0), -1)
        if isinstance(x0, np.ndarray):
            s = np.quantile(flat.astype(np.float64), self.ratio, axis=1).astype(x0.dtype)
        else:
            s = flat.float().quantile(self.ratio, dim=1).to(x0.dtype)
        s = s.clip(1.0, self.limit).reshape(-1, *[1] * (x0.ndim - 1))
        return (x0 / s).clip(-1.0, 1.0)


@dataclass(frozen=True)
class Table:
    """A sampler's whole run.

    Attributes:
        rows: from high noise to low.
        timesteps: of all rows of the full grid.
        first: index of the first row in the full grid; above 0 for image to image.
        scale: what pure noise of unit variance is multiplied by at the start.
        clip: what is done to each predicted x0, or None.
        name: of the sampler, for errors.
    """

    rows: tuple[Row, ...]
    timesteps: tuple[float, ...]
    first: int = 0
    scale: float = 1.0
    clip: Clip | None = None
    name: str = ""

    def noised(self, x0: Any, eps: Any, i: int) -> Any:
        """An image with the noise that the state has before row i; arrays of one shape and dtype."""
        alpha, sigma = self.rows[i - self.first].level
        return alpha * x0 + sigma * eps

    def row(self, state: State) -> Row:
        """The row that comes next."""
        return self.rows[state.row - self.first]

    def over(self, state: State) -> bool:
        """Whether no row is left."""
        return state.row - self.first >= len(self.rows)

    @cached_property
    def last_use(self) -> dict[Variable, int]:
        """The last row that reads each variable."""
        found: dict[Variable, int] = {}
        for i, row in enumerate(self.rows, self.first):
            for variable, _ in (*row.next, *row.stored):
                found[variable] = i
        return found

    @property
    def draws(self) -> list[int]:
        """The rows that draw noise."""
        return sorted(i for kind, i in self.last_use if kind == "n")


@dataclass(frozen=True)
class State:
    """A run between two calls of the model.

    Attributes:
        x: the state that the model is called with next; after the last row the result.
        row: that row, counted from the start of the full grid.
        known: the variables that later rows read.
    """

    x: Any
    row: int
    known: Mapping[Variable, Any]


def begin(table: Table, x: Any, *, noised: bool = False) -> State:
    """The state before the first row; arguments as in `run`."""
    return State(table.scale * x if table.scale != 1 and not noised else x, table.first, {})


def step(table: Table, state: State, prediction: Any, noise: Noise | None = None) -> State:
    """The state after one row, whose model was called with `state.x` and `table.row(state).t`.

    Args:
        prediction: what the model returned, like x.
        noise: as in `run`.
    """
    i, row = state.row, table.row(state)
    last_use, known = table.last_use, dict(state.known)
    known["x", i], known["p", i] = state.x, prediction
    if ("m", i) in last_use:
        a, b = row.clean
        x0 = b * prediction if a == 0 else a * state.x + b * prediction
        known["m", i] = table.clip(x0) if table.clip else x0
    if row.stored:
        known["s", i] = _combined(row.stored, known)
    if ("n", i) in last_use:
        if noise is None:
            message = f"sampler {table.name} adds noise after step {i}, and none was given"
            raise UserError(message, "pass noise=; see needs_noise()")
        known["n", i] = noise(i)
    x = _combined(row.next, known)
    return State(x, i + 1, {variable: value for variable, value in known.items() if last_use.get(variable, -1) > i})


def run(
    table: Table,
    model: Model,
    x: Any,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    noised: bool = False,
) -> Any:
    """Run a table.

    Args:
        model: (x, t) -> prediction, like x; t is a Python number.
        x: N(0, 1) of any shape, numpy or torch, floating; or noised already for the first row (`Table.noised`).
        noise: i -> standard normal array like x; asked for at each of `table.draws`.
        callback: called as (i, t, x) after row i; may raise to stop.
        constrain: (i, x) -> what x becomes after row i: inpainting puts what is kept back into it.
        noised: whether x is noised already. `i` counts from the start of the full grid either way.

    Returns:
        The last state, like x.
    """
    state = begin(table, x, noised=noised)
    for i, row in enumerate(table.rows, table.first):
        state = step(table, state, model(state.x, row.t), noise)
        if constrain:
            state = replace(state, x=constrain(i, state.x))
        if callback:
            callback(i, row.t, state.x)
    return state.x


def _combined(terms: Terms, known: Mapping[Variable, Any]) -> Any:
    total = None
    for variable, factor in terms:
        term = known[variable] if factor == 1 else factor * known[variable]
        total = term if total is None else total + term
    return total


def conversions(prediction: str, alpha: float, sigma: float, t: float) -> tuple[tuple[float, float], ...]:
    """((a, b), (c, d)) such that x0 = a x + b p and eps = c x + d p, where x = alpha x0 + sigma eps."""
    if prediction == "v_prediction":  # v = alpha eps - sigma x0 (arXiv 2202.00512)
        return (alpha, -sigma), (sigma, alpha)
    if prediction == "sample":
        return (0.0, 1.0), (1 / sigma, -alpha / sigma)
    if prediction == "flow_prediction":  # eps - x0, where alpha + sigma = 1
        return (1.0, -sigma), (1.0, alpha)
    if alpha == 0:
        raise UserError(
            f"at timestep {t} the schedule has no signal left (rescale_betas_zero_snr), so x0 does not follow from eps",
            "use a model trained for v_prediction, or a grid that starts lower",
        )
    return (1 / alpha, -sigma / alpha), (0.0, 1.0)


class Call:
    """A call of the model while its row is being written: the variables as `Linear`, and the row's level.

    Attributes:
        x, x0, p, n: state, clipped x0, prediction and noise.
        eps: the noise that the prediction stands for.
        eps0: the noise that follows from the clipped x0; the same as eps where nothing is clipped.
    """

    def __init__(self, i: int, t: float, alpha: float, sigma: float, prediction: str, clip: Clip | None):
        self.i, self.t, self.alpha, self.sigma = i, t, alpha, sigma
        self.clean, (c, d) = conversions(prediction, alpha, sigma, t)
        self.x, self.p, self.x0, self.n, self.s = (Linear({(kind, i): 1.0}) for kind in "xpmns")
        self.eps = c * self.x + d * self.p
        self.eps0 = self.eps if clip is None else (self.x - alpha * self.x0) / sigma

    @property
    def lam(self) -> float:
        """lambda = log(alpha / sigma), half the log signal-to-noise ratio."""
        return lam(self.alpha, self.sigma)

    def row(self, following: Linear, stored: Linear = ZERO) -> Row:
        return Row(self.t, (self.alpha, self.sigma), self.clean, following.frozen(), stored.frozen())


def lam(alpha: float, sigma: float) -> float:
    """log(alpha / sigma); infinite where no noise is left."""
    return math.inf if sigma == 0 else math.log(alpha) - math.log(sigma)
