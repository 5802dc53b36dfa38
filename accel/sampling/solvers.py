"""The samplers' update rules: pure functions of (model, x, schedule, timesteps), in the papers' notation.

Every step is linear in its arrays: x <- a x + b model(x, t) [+ ...]. The coefficients are combined in float64 from
alpha_bar before they touch an array, and arrays meet only `+` and `*` with Python floats. So numpy and torch arrays
work alike, keep their dtype, and nothing is changed in place. x has unit variance at the start and in every call of the
model, with every solver (Euler too, see there), so one can be exchanged for another without rescaling anything.

`model(x, t)` returns the prediction that `schedule.prediction_type` names; guidance is the caller's business.
`noise(i)` returns standard normal noise like x for step i. `callback(i, t, x)` runs after step i, may raise to stop.
`constrain(i, x)` returns what x becomes after step i: inpainting puts what is kept back into it.
`i` always counts from the start of the full grid, so that an image-to-image run with `start` meets the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UserError
from .noise_schedule import NoiseSchedule, add_noise

Model = Callable[[Any, float], Any]
Noise = Callable[[int], Any]
Callback = Callable[[int, float, Any], None]
Constrain = Callable[[int, Any], Any]
Timesteps = Sequence[float]


def sample_dmd2(
    model: Model,
    x: Any,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    start: int = 0,
) -> Any:
    """DMD2's few-step sampler (arXiv 2405.14867, section 4.5): predict x0, re-noise with fresh noise, repeat.

    x: N(0, 1) of any shape (noised at `timesteps[start]` if start > 0). Returns the last x0, like x.
    The one-step model is conditioned on t = 399 but trained on unit-variance noise, so x is never rescaled.
    """
    ts = _checked(schedule, timesteps, start)
    for i in range(start, len(ts)):
        (cx, cp), _ = _predictions(schedule, schedule.alpha_bar(ts[i]), ts[i])
        x = cx * x + cp * model(x, ts[i])
        if i + 1 < len(ts):
            x = add_noise(schedule, x, _draw("dmd2", noise, i), ts[i + 1])
        if constrain:
            x = constrain(i, x)
        if callback:
            callback(i, ts[i], x)
    return x


def sample_ddim(
    model: Model,
    x: Any,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    start: int = 0,
) -> Any:
    """DDIM (arXiv 2010.02502, eq. 12 and 16); eta = 0 is deterministic, eta = 1 is DDPM's ancestral sampling.

    Each step goes to the next timestep of the grid. x and return value as in `sample_dmd2`.
    """
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta} is outside 0..1", "use 0 for a deterministic sampler, 1 for DDPM's")
    ts = _checked(schedule, timesteps, start)
    last = 1.0 if schedule.set_alpha_to_one else float(schedule.alphas_cumprod[0])
    for i in range(start, len(ts)):
        a = schedule.alpha_bar(ts[i])
        a_next = schedule.alpha_bar(ts[i + 1]) if i + 1 < len(ts) else last
        # At t = 0 with set_alpha_to_one = false the step stays where it is; rounding must not make that negative.
        std = eta * math.sqrt(max(0.0, (1 - a_next) / (1 - a) * (1 - a / a_next)))
        toward = math.sqrt(max(0.0, 1 - a_next - std**2))
        (x0x, x0p), (ex, ep) = _predictions(schedule, a, ts[i])
        root = math.sqrt(a_next)
        x = (root * x0x + toward * ex) * x + (root * x0p + toward * ep) * model(x, ts[i])
        if std > 0:
            x = x + std * _draw("ddim", noise, i)
        if constrain:
            x = constrain(i, x)
        if callback:
            callback(i, ts[i], x)
    return x


def sample_euler(
    model: Model,
    x: Any,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    start: int = 0,
) -> Any:
    """Euler steps on the probability-flow ODE dx/dsigma = eps (arXiv 2206.00364, algorithm 1 without churn).

    That ODE lives in y = x0 + sigma eps; the state is kept as x = y / sqrt(1 + sigma^2), which is both the model's
    scaled input and a sample of unit variance: what the other samplers take, and what `add_noise` makes for start > 0.
    """
    ts = _checked(schedule, timesteps, start)
    sigmas = [schedule.sigma(t) for t in ts] + [0.0]
    if start == 0 and schedule.timestep_spacing != "leading":
        # y starts as sigma_max N(0, 1); a leading grid starts lower, and there it is sqrt(1 + sigma_max^2) N(0, 1).
        x = (sigmas[0] / math.sqrt(1 + sigmas[0] ** 2)) * x
    for i in range(start, len(ts)):
        s, s_next = sigmas[i], sigmas[i + 1]
        _, (ex, ep) = _predictions(schedule, 1 / (1 + s**2), ts[i])
        scale, scale_next = math.sqrt(1 + s**2), math.sqrt(1 + s_next**2)
        x = ((scale + (s_next - s) * ex) / scale_next) * x + ((s_next - s) * ep / scale_next) * model(x, ts[i])
        if constrain:
            x = constrain(i, x)
        if callback:
            callback(i, ts[i], x)
    return x


def sample_dpmpp_2m(
    model: Model,
    x: Any,
    schedule: NoiseSchedule,
    timesteps: Timesteps,
    *,
    noise: Noise | None = None,
    callback: Callback | None = None,
    constrain: Constrain | None = None,
    start: int = 0,
) -> Any:
    """DPM-Solver++(2M), midpoint (arXiv 2211.01095, algorithm 2), ending on sigma = 0.

    First step and last step are first order: one has no history, the other an infinite lambda, where it returns x0.
    x and return value as in `sample_dmd2`.
    """
    ts = _checked(schedule, timesteps, start)
    sigmas = [schedule.sigma(t) for t in ts]
    m_last, h_last = None, math.inf
    for i in range(start, len(ts)):
        s = sigmas[i]
        (cx, cp), _ = _predictions(schedule, 1 / (1 + s**2), ts[i])
        m = cx * x + cp * model(x, ts[i])
        if i + 1 == len(ts):
            x = m
        else:
            s_next = sigmas[i + 1]
            alpha, alpha_next = 1 / math.sqrt(1 + s**2), 1 / math.sqrt(1 + s_next**2)
            h = math.log(s) - math.log(s_next)
            keep, move = alpha_next * s_next / (alpha * s), -alpha_next * math.expm1(-h)
            if m_last is None:
                x = keep * x + move * m
            else:
                extra = 0.5 * h / h_last  # 1 / (2 r) with r = h_last / h
                x = keep * x + (move * (1 + extra)) * m + (-move * extra) * m_last
            m_last, h_last = m, h
        if constrain:
            x = constrain(i, x)
        if callback:
            callback(i, ts[i], x)
    return x


def _predictions(schedule: NoiseSchedule, a: float, t: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """((x0x, x0p), (ex, ep)) such that x0 = x0x x + x0p prediction and eps = ex x + ep prediction, at alpha_bar = a."""
    alpha, sigma = math.sqrt(a), math.sqrt(1 - a)
    if schedule.prediction_type == "v_prediction":  # v = alpha eps - sigma x0
        return (alpha, -sigma), (sigma, alpha)
    if schedule.prediction_type == "sample":
        return (0.0, 1.0), (1 / sigma, -alpha / sigma)
    if a == 0:
        raise UserError(
            f"at timestep {t} the schedule has no signal left (rescale_betas_zero_snr), so x0 does not follow from eps",
            "use a model trained for v_prediction, or a grid that starts lower",
        )
    return (1 / alpha, -sigma / alpha), (0.0, 1.0)


def _draw(name: str, noise: Noise | None, i: int) -> Any:
    if noise is None:
        raise UserError(
            f"sampler {name} adds noise after step {i}, and none was given", "pass noise=; see needs_noise()"
        )
    return noise(i)


def _checked(schedule: NoiseSchedule, timesteps: Timesteps, start: int) -> list[float]:
    """The grid as Python numbers, verified: within the schedule, strictly falling, longer than `start`."""
    ts = [int(t) if t == int(t) else float(t) for t in timesteps]
    if not ts or any(b >= a for a, b in zip(ts, ts[1:], strict=False)):
        raise UserError(f"timesteps {_short(ts)} must fall strictly", "use fewer steps, or another timestep_spacing")
    if ts[0] > schedule.T - 1 or ts[-1] < 0:
        message = f"timesteps {_short(ts)} leave the schedule's 0..{schedule.T - 1}"
        raise UserError(message, "use fewer steps, or a lower steps_offset")
    if isinstance(start, bool) or not isinstance(start, int) or not 0 <= start < len(ts):
        raise UserError(f"start = {start!r} with {len(ts)} steps", f"use a whole number from 0 to {len(ts) - 1}")
    return ts


def _short(ts: Sequence[float]) -> str:
    return str(list(ts)) if len(ts) <= 6 else f"[{ts[0]}, {ts[1]}, {ts[2]}, ..., {ts[-1]}]"
