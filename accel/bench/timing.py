"""Interleaved timing: A, B, A, B in one run, so that clocks, heat and neighbours hit every variant alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MINIMUM_ROUNDS = 5  # fewer samples have no spread worth printing; a time budget never stops before
LEAD_IN_BELOW = 0.05  # seconds
GPU_LEAD_IN_S = 0.5  # while engines of the CPU take their turns, a GPU falls to its idle clocks
_RESAMPLES = 2000

Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Statistics of one call, in seconds.

    Attributes:
        n: number of samples.
        min_s, p50_s, p90_s, mean_s: over the samples.
        samples_s: the samples in the order of the rounds, so that rows can be paired.
    """

    n: int
    min_s: float
    p50_s: float
    p90_s: float
    mean_s: float
    samples_s: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times as fast as a baseline: p50 over p50, with the bootstrap 95 % interval over paired rounds.

    The interval is None with fewer than five rounds.
    """

    ratio: float
    low: float | None
    high: float | None


def timed(call: Call) -> float:
    """Wall time of one call in seconds; the call itself waits for its device."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    finally:
        if collecting:
            gc.enable()


def busy_seconds(call: Call, repeats: int = 3) -> float:
    """Seconds of a call in which anything ran on the GPU, kernel or copy, by CUPTI through torch's profiler; a median.

    What is left of the clock's seconds is the host's alone. Two events around the call would not tell them apart: it
    waits for the GPU, so that the second one comes when everything is over.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    taken = []
    for _ in range(repeats):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            call()
        ran = [one for one in found.events() if one.device_type == DeviceType.CUDA and not one.is_user_annotation]
        taken.append(covered((one.time_range.start, one.time_range.end) for one in ran) / 1e6)
    return float(np.median(taken))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end), which may lie over each other."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def interleave(
    calls: Mapping[str, Mapping[str, Call]],
    samples: Mapping[str, Mapping[str, list[float]]],
    *,
    rounds: int,
    seconds: float | None = None,
    lead_in: Mapping[str, bool],
    lead_in_s: float = 0.0,
    failed: Callable[[str, Exception], None],
    after: Callable[[int], None] = lambda done: None,
    enough: Callable[[], bool] = lambda: False,
) -> None:
    """Fill `samples[scope][name]` with one wall time per round.

    A round times every scope, and within a scope every variant once, starting with another one each round so that
    none always runs after the same neighbour. The samples are the caller's, so an interrupt loses none of them.

    Args:
        calls: what to time, by scope and variant.
        rounds: number of rounds.
        seconds: stop after this long, but not before `MINIMUM_ROUNDS` rounds.
        lead_in: scopes in which each timed call follows an untimed one. A short call after another engine's would
            time how fast caches and sleeping threads come back, not the call.
        lead_in_s: seconds for which that call is repeated, at least once.
        failed: told about a variant that raised; it is left out from then on.
        after: called with the number of rounds done.
        enough: asked after each round, from `MINIMUM_ROUNDS` on, whether to stop.
    """
    broken: set[str] = set()
    started = time.perf_counter()
    for i in range(rounds):
        for scope, by_name in calls.items():
            names = list(by_name)
            shift = i % max(len(names), 1)
            for name in names[shift:] + names[:shift]:
                if name in broken:
                    continue
                try:
                    if lead_in[scope]:
                        _lead_in(by_name[name], lead_in_s)
                    samples[scope][name].append(timed(by_name[name]))
                except Exception as error:
                    broken.add(name)
                    failed(name, error)
        after(i + 1)
        if i + 1 < MINIMUM_ROUNDS:
            continue
        if enough() or seconds is not None and time.perf_counter() - started >= seconds:
            return


def _lead_in(call: Call, seconds: float) -> None:
    began = time.perf_counter()
    call()
    while time.perf_counter() - began < seconds:
        call()


def medians(
    calls: Mapping[str, Call], *, rounds: int, seconds: float | None = None, lead_in: bool = False
) -> dict[str, float]:
    """Median seconds of each call, taking turns; what a call raises is raised.

    Args:
        rounds, seconds, lead_in: as `interleave` takes them.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def failed(name: str, error: Exception) -> None:
        raise error

    interleave({"": calls}, {"": samples}, rounds=rounds, seconds=seconds, lead_in={"": lead_in}, failed=failed)
    return {name: float(np.median(taken)) for name, taken in samples.items()}


def summary(samples: Sequence[float]) -> Timing | None:
    """Statistics of samples in seconds; None without any."""
    if not samples:
        return None
    p50, p90 = np.percentile(samples, (50, 90))
    return Timing(
        n=len(samples),
        min_s=float(min(samples)),
        p50_s=float(p50),
        p90_s=float(p90),
        mean_s=float(np.mean(samples)),
        samples_s=tuple(samples),
    )


def speedup(baseline: Sequence[float], samples: Sequence[float]) -> Ratio | None:
    """Median of `baseline` over median of `samples`; None where one of them has no samples.

    Rounds are resampled as pairs: what slowed one round down slowed both, and cancels.
    """
    n = min(len(baseline), len(samples))
    if not n:
        return None
    a, b = np.asarray(baseline[:n]), np.asarray(samples[:n])
    ratio = float(np.median(a) / np.median(b))
    if n < MINIMUM_ROUNDS:
        return Ratio(ratio=ratio, low=None, high=None)
    picks = np.random.default_rng(0).integers(0, n, (_RESAMPLES, n))
    low, high = np.percentile(np.median(a[picks], axis=1) / np.median(b[picks], axis=1), (2.5, 97.5))
    return Ratio(ratio=ratio, low=float(low), high=float(high))


def apart(baseline: Sequence[float], samples: Sequence[float]) -> Ratio | None:
    """The same for samples of two runs, whose rounds are no pairs: each side is resampled by itself."""
    if not len(baseline) or not len(samples):
        return None
    a, b = np.asarray(baseline), np.asarray(samples)
    ratio = float(np.median(a) / np.median(b))
    if min(len(a), len(b)) < MINIMUM_ROUNDS:
        return Ratio(ratio=ratio, low=None, high=None)
    rng = np.random.default_rng(0)
    medians = [np.median(side[rng.integers(0, len(side), (_RESAMPLES, len(side)))], axis=1) for side in (a, b)]
    low, high = np.percentile(medians[0] / medians[1], (2.5, 97.5))
    return Ratio(ratio=ratio, low=float(low), high=float(high))
