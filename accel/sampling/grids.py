"""Where a sampler calls the model: timesteps and noise levels, computed as diffusers' schedulers do, to the last bit.

`sigma` is variance exploding, sqrt((1 - alpha_bar) / alpha_bar), or the share of noise with `use_flow_sigmas`. The
numbers are rounded to float32 where diffusers rounds them: a timestep that is cut to a whole number depends on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from .linear import Clip
from .noise_schedule import ALPHA_BAR_FLOOR, NoiseSchedule
from .scheduler_config import refused

# What `--sigmas` may be -> the scheduler field that it stands for.
SIGMAS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
    "flow": "use_flow_sigmas",
}


@dataclass(frozen=True)
class Problem:
    """What a sampler is asked for.

    Attributes:
        schedule: the noise schedule.
        fields: the fields of the sampler's scheduler class, complete.
        steps: number of steps.
        timesteps: the grid itself, highest first, where the caller gives it.
        start: number of leading rows to skip (image to image).
        eta: DDIM's, and TCD's gamma.
    """

    schedule: NoiseSchedule
    fields: Mapping[str, Any]
    steps: int
    timesteps: tuple[float, ...] | None = None
    start: int = 0
    eta: float = 0.0

    @property
    def clip(self) -> Clip | None:
        """The x0 clipping that the fields ask for; thresholding goes before plain clipping."""
        if self.fields.get("thresholding"):
            return Clip(float(self.fields["sample_max_value"]), float(self.fields["dynamic_thresholding_ratio"]))
        return Clip(float(self.fields["clip_sample_range"])) if self.fields.get("clip_sample") else None

    @property
    def flow(self) -> bool:
        return bool(self.fields.get("use_flow_sigmas"))

    def level(self, sigma: float) -> tuple[float, float]:
        """(alpha, sigma) of the state that the model is given at a noise level of `Grid.sigmas`."""
        return (1 - sigma, sigma) if self.flow else variance_preserving(sigma)


@dataclass(frozen=True)
class Grid:
    """Timesteps of the rows, and their sigmas with the one that the last row ends on; no sigmas where t says it all."""

    timesteps: list[float]
    sigmas: list[float]


def variance_preserving(sigma: float) -> tuple[float, float]:
    """(alpha, sigma) of unit variance at a variance-exploding sigma."""
    scale = math.sqrt(1 + sigma**2)
    return 1 / scale, sigma / scale


def discrete(problem: Problem) -> Grid:
    """Whole timesteps (DDIM, DDPM): the spacings of arXiv 2305.08891, table 2."""
    given = problem.timesteps
    ts = spaced(problem, points=problem.steps, whole=True) if given is None else given
    return Grid(_numbers(ts), [])


def distilled(problem: Problem) -> Grid:
    """Every k-th of the timesteps that an LCM was distilled on (arXiv 2310.04378, section 4.3)."""
    if problem.timesteps is not None:
        return Grid(_numbers(problem.timesteps), [])
    schedule, steps, original = problem.schedule, problem.steps, problem.fields["original_inference_steps"]
    if not 1 <= original <= schedule.T:
        raise refused("original_inference_steps", original, f"use a whole number from 1 to {schedule.T}")
    if steps > original:
        raise UserError(
            f"{steps} steps, but the model was distilled on {original} (original_inference_steps)",
            f"use at most {original} steps",
        )
    grid = np.arange(1, original + 1) * (schedule.T // original) - 1
    chosen = np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)
    return Grid(_numbers(grid[::-1][chosen]), [])


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
    check_steps(steps, T)
    if steps == 1:
        return [max(0, T * 2 // 5 - 1) if one_step is None else one_step]
    return [T - 1 - i * (T // steps) for i in range(steps)]


def dmd2(problem: Problem) -> Grid:
    given = problem.timesteps
    ts = dmd2_timesteps(problem.steps, problem.schedule.T) if given is None else given
    return Grid(_numbers(ts), [])


def variance_exploding(problem: Problem) -> Grid:
    """Timesteps with fractions (Euler, LMS); a spacing of sigmas is put between the grid's own ends."""
    fields, steps = problem.fields, problem.steps
    train = train_sigmas(problem.schedule)
    given = problem.timesteps
    ts = np.array(spaced(problem, points=steps, whole=False) if given is None else given, np.float32)
    sigmas = np.interp(ts, np.arange(len(train)), train)
    if fields.get("interpolation_type") == "log_linear":
        # One level more than steps: the run ends on the lowest of them, not on zero.
        sigmas = np.exp(np.linspace(np.log(train[-1]), np.log(train[0]), steps + 1, dtype=np.float32))
    if kind := sigma_spacing(problem):
        sigmas = respaced(kind, fields, float(sigmas[0]), float(sigmas[-1]), steps)
        ts = timesteps_of(sigmas, np.log(train))
    last = float(train[0]) if fields.get("final_sigmas_type") == "sigma_min" else 0.0
    levels = _float32([*sigmas, last])[: steps + 1]
    if fields.get("timestep_type") == "continuous" and fields["prediction_type"] == "v_prediction":
        return Grid([0.25 * math.log(s) for s in levels[:-1]], levels)
    return Grid(_float32(ts), levels)


def heun(problem: Problem) -> Grid:
    """As `variance_exploding`, every level but the first twice: where a step arrives, and where the next begins."""
    once = variance_exploding(problem)
    (t, *ts), (s, *sigmas, last) = once.timesteps, once.sigmas
    return Grid([t, *(t for t in ts for _ in "12")], [s, *(s for s in sigmas for _ in "12"), last])


def logarithmic(problem: Problem) -> Grid:
    """Whole timesteps with their sigmas (DPM-Solver, DEIS, UniPC), one point more than steps and the lowest dropped."""
    fields, steps, schedule = problem.fields, problem.steps, problem.schedule
    train = train_sigmas(schedule)
    kind, own_end = sigma_spacing(problem), "final_sigmas_type" not in fields
    if kind:
        sigmas = respaced(kind, fields, float(train[-1]), float(train[0]), steps)
        ts = timesteps_of(sigmas, np.log(train))
        # The multistep solver cuts a cosine schedule's timesteps to whole numbers, the others round them.
        cut = "euler_at_final" in fields and fields["beta_schedule"] == "squaredcos_cap_v2"
        ts = np.floor(np.round(ts) if kind in ("karras", "lu") and not cut else ts)
    elif problem.flow:
        sigmas = _flow_sigmas(problem)
        ts = np.floor(sigmas * schedule.T)
    else:
        given = problem.timesteps
        ts = np.array(spaced(problem, points=steps + 1, whole=True) if given is None else given, np.float64)
        sigmas = np.interp(ts, np.arange(len(train)), train)
    if fields.get("final_sigmas_type") == "zero":
        last = 0.0
    elif (kind or problem.flow) and (own_end or "predict_x0" in fields):
        last = float(sigmas[-1])
    else:
        last = float(train[0])
    levels = _float32([*sigmas, last])
    return Grid(_numbers(ts), levels)


def spaced(problem: Problem, *, points: int, whole: bool) -> list[float]:
    """The grids of arXiv 2305.08891, table 2, from high noise to low. `whole` rounds linspace to trained timesteps."""
    schedule, steps, fields = problem.schedule, problem.steps, problem.fields
    check_steps(steps, schedule.T)
    end = schedule.T - _clipped(problem)
    if fields.get("timestep_spacing", "linspace") == "trailing":
        # Cut to length: rounding gives this range one entry too many, t = -1, for some step counts (61, 103, ...).
        ts = np.round(np.arange(end, 0, -schedule.T / steps)[:steps]) - 1
    elif fields.get("timestep_spacing", "linspace") == "leading":
        ts = np.arange(points)[::-1][:steps] * (end // points) + fields["steps_offset"]
    else:
        ts = np.linspace(0, end - 1, points)[::-1][:steps]
        ts = np.round(ts) if whole else ts
    return _numbers(ts)


def sigma_spacing(problem: Problem) -> str | None:
    """Which of `SIGMAS` replaces the spacing of timesteps, if any."""
    on = [name for name, field in SIGMAS.items() if name != "flow" and problem.fields.get(field)]
    if len(on) > 1:
        fields = " and ".join(SIGMAS[name] for name in on)
        raise UserError(f"scheduler config: {fields} exclude each other", "set one of them to false")
    if on and problem.timesteps is not None:
        raise UserError(
            f"timesteps are given, but the sigmas are spaced by {SIGMAS[on[0]]}",
            'give steps instead, or sigmas="none" (--sigmas none)',
        )
    return on[0] if on else None


def respaced(kind: str, fields: Mapping[str, Any], high: float, low: float, steps: int) -> np.ndarray:
    """Sigmas from high to low, float64 [steps].

    karras: arXiv 2206.00364, eq. 5 with rho = 7. exponential, lu: even in log sigma (arXiv 2206.00927). beta: quantiles
    of Beta(0.6, 0.6) (arXiv 2407.12173).
    """
    high = high if fields.get("sigma_max") is None else float(fields["sigma_max"])
    low = low if fields.get("sigma_min") is None else float(fields["sigma_min"])
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    if kind == "beta":
        return np.array([low + beta_quantile(q, 0.6) * (high - low) for q in 1 - ramp])
    if kind == "lu":
        high, low = (float(np.log(np.float32(s))) for s in (high, low))
        return np.exp(high + ramp * (low - high))
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def timesteps_of(sigmas: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Timesteps with fractions of sigmas, interpolated in log sigma; `logs` is float32 [T], rising."""
    log = np.log(np.maximum(sigmas, 1e-10))
    low = np.clip(np.searchsorted(logs.astype(np.float64), log, side="right") - 1, 0, len(logs) - 2)
    weight = np.clip((logs[low] - log) / (logs[low] - logs[low + 1]), 0, 1)
    return (1 - weight) * low + weight * (low + 1)


def train_sigmas(schedule: NoiseSchedule) -> np.ndarray:
    """sqrt((1 - alpha_bar) / alpha_bar) of every training timestep, float32 [T], finite also at zero SNR."""
    a = schedule.alphas_cumprod.astype(np.float32)
    a = np.where(a == 0, np.float32(ALPHA_BAR_FLOOR), a)
    return np.sqrt((1 - a) / a)


def beta_quantile(q: float, a: float) -> float:
    """The q-quantile of the symmetric Beta(a, a) distribution, by bisection of its distribution function."""
    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _beta_cdf(middle, a) < q else (low, middle)
    return q if q in (0.0, 1.0) else (low + high) / 2


def _beta_cdf(x: float, a: float) -> float:
    """The regularised incomplete beta function I_x(a, a): x^a (1-x)^a / (a B) times 2F1(2a, 1; a + 1; x)."""
    if x > 0.5:
        return 1 - _beta_cdf(1 - x, a)
    term = total = 1.0
    n = 0
    while term > 1e-17 * total:
        term *= (2 * a + n) / (a + 1 + n) * x
        total, n = total + term, n + 1
    log_beta = 2 * math.lgamma(a) - math.lgamma(2 * a)
    return total * math.exp(a * (math.log(x) + math.log1p(-x)) - log_beta) / a if x > 0 else 0.0


def _flow_sigmas(problem: Problem) -> np.ndarray:
    """Shares of noise of flow matching, shifted (arXiv 2403.03206, eq. 23): s' = c s / (1 + (c - 1) s)."""
    fields, steps, shift = problem.fields, problem.steps, problem.fields["flow_shift"]
    if problem.timesteps is not None:
        raise UserError("timesteps are given, but the sigmas follow from use_flow_sigmas", "give steps instead")
    if "predict_x0" not in fields:
        sigmas = 1.0 - np.linspace(1, 1 / problem.schedule.T, steps + 1)
        return np.flip(shift * sigmas / (1 + (shift - 1) * sigmas))[:-1]
    sigmas = np.linspace(1, 1 / problem.schedule.T, steps + 1)[:-1]
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    if fields["shift_terminal"]:
        if steps < 2:
            raise refused("shift_terminal", fields["shift_terminal"], "use at least 2 steps, or set it to null")
        sigmas = 1 - (1 - sigmas) / ((1 - sigmas[-1]) / (1 - fields["shift_terminal"]))
    sigmas[0] -= 1e-6 if abs(sigmas[0] - 1) < 1e-6 else 0.0  # lambda is infinite at 1
    return sigmas


def _clipped(problem: Problem) -> int:
    """How many of the noisiest timesteps `lambda_min_clipped` leaves out."""
    limit = float(problem.fields.get("lambda_min_clipped", -math.inf))
    return 0 if limit == -math.inf else int(np.sum(-np.log(train_sigmas(problem.schedule)) < limit))


def check_steps(steps: int, limit: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= limit:
        raise UserError(f"invalid steps: {steps!r} (expected an integer from 1 to {limit})", "such as 4 or 25")


def verify(problem: Problem, grid: Grid, order: int) -> None:
    """Refuse a grid that leaves the schedule or does not fall at every step; only the end may stay where it was.

    Args:
        order: rows per step.
    """
    ts, sigmas = grid.timesteps, [*grid.sigmas[:1], *grid.sigmas[1::order]]
    given = problem.timesteps
    if not ts or given is not None and any(b >= a for a, b in zip(given, given[1:], strict=False)):
        raise UserError(f"timesteps {_short(given or ts)} must fall strictly", "use fewer steps, or other timesteps")
    if any(b >= a for a, b in zip(sigmas, sigmas[1:-1], strict=False)) or sigmas and sigmas[-1] > sigmas[-2]:
        message = f"noise levels {_short(sigmas)}, and with them the timesteps, must fall strictly"
        raise UserError(message, "use fewer steps, or another timestep_spacing")
    if problem.fields.get("timestep_type") != "continuous" and (max(ts) > problem.schedule.T - 1 or min(ts) < 0):
        message = f"timesteps {_short(ts)} leave the schedule's 0..{problem.schedule.T - 1}"
        raise UserError(message, "use fewer steps, or a lower steps_offset")


def _float32(values: Any) -> list[float]:
    return _numbers(np.asarray(values, np.float32))


def _numbers(values: Any) -> list[float]:
    """Python numbers, whole where they are."""
    return [int(v) if v == int(v) else v for v in map(float, values)]


def _short(ts: Sequence[float]) -> str:
    return str(list(ts)) if len(ts) <= 6 else f"[{ts[0]}, {ts[1]}, {ts[2]}, ..., {ts[-1]}]"
