"""Is int8 worth it? Speed against float of the same component on this machine, engine by engine, taking turns."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accel.arrays import synchronize
from accel.bundle import Bundle
from accel.engines import Engine, fitting_engine_file, load_engine, status
from accel.errors import UserError
from accel.machine import machine_name

from ..graph.trace import example
from ..tensorrt.build import build
from .audit import ENGINES, audit

SECONDS, ROUNDS = 20.0, 25  # per engine, whichever comes first; at least three rounds
FASTER = 1.05  # closer to 1 than this, noise could have decided


def engines_for(dtype: str) -> tuple[str, ...]:
    """Engines of this machine that int8 with the rest in `dtype` is made for: with float16, TensorRT alone."""
    return tuple(engine for engine in (ENGINES if dtype == "float32" else ("tensorrt",)) if status(engine).ok)


def judge(
    low: Bundle,
    high: Bundle,
    name: str,
    parity: dict[str, Any],
    engines: Sequence[str],
    *,
    threads: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The verdict on one component, for the manifest.

    Args:
        low: the int8 bundle, complete. On TensorRT engine files are built into it, and into the other.
        high: the bundle of what it competes with: float32, or float16 where int8 has float16 around it.
        parity: what was measured on images, with `ok`.
        engines: where to measure (`engines_for`).
        threads: of the engines; 0 lets them choose.

    Returns:
        {"machine", "parity", "against": dtype of `high`, "engines": {engine: {"on", "float_seconds", "int8_seconds",
        "speedup", "faster", "rounds"} or {"on", "error", "faster"}}, "audit": {engine: ...}, "offered": engines on
        which int8 is faster, within the budget, and really int8}.
    """
    found, audits = {}, {}
    for engine in engines:
        say(f"{name}: speed on {engine}")
        on = machine_name()
        try:
            # Its engine files carry the user's signature, whose key lies in the user's own cache.
            with contextlib.nullcontext() if engine == "tensorrt" else _own_cache():
                if engine == "tensorrt":
                    for bundle in (low, high):
                        build(bundle, [name])
                    on = fitting_engine_file(low, name).identity["gpu"]
                audits[engine] = audit(low, low.component(name), engine)
                found[engine] = {"on": on} | _race(low, high, name, engine, threads)
        except UserError as error:
            found[engine] = {"on": on, "error": error.message, "faster": False}
    return {
        "machine": machine_name(),
        "parity": parity,
        "against": high.component(name).dtype,
        "engines": found,
        "audit": audits,
        "offered": [
            engine for engine, entry in found.items() if entry["faster"] and parity["ok"] and audits[engine]["ok"]
        ],
    }


def _race(low: Bundle, high: Bundle, name: str, engine: str, threads: int) -> dict[str, Any]:
    options = {} if engine == "tensorrt" else {"threads": threads}
    runners = {
        "int8": load_engine(low, name, engine, verify=False, **options),
        "float": load_engine(high, name, engine, verify=False, **options),
    }
    feeds = {kind: _feeds(runner) for kind, runner in runners.items()}
    for kind, runner in runners.items():
        _call(runner, feeds[kind])
    times: dict[str, list[float]] = {kind: [] for kind in runners}
    until = time.perf_counter() + SECONDS
    while len(times["float"]) < 3 or (time.perf_counter() < until and len(times["float"]) < ROUNDS):
        for kind, runner in runners.items():
            started = time.perf_counter()
            _call(runner, feeds[kind])
            times[kind].append(time.perf_counter() - started)
    for runner in runners.values():
        runner.close()
    seconds = {kind: statistics.median(values) for kind, values in times.items()}
    speedup = seconds["float"] / seconds["int8"]
    return {
        "float_seconds": seconds["float"],
        "int8_seconds": seconds["int8"],
        "speedup": round(speedup, 3),
        "faster": speedup >= FASTER,
        "rounds": len(times["float"]),
    }


def _feeds(engine: Engine) -> dict[str, Any]:
    """Inputs where the engine wants them: copies to a GPU are not what is compared."""
    sizes = {name: limits.opt for name, limits in engine.component.dims.items()}
    return {name: engine.array(tensor.numpy()) for name, tensor in example(engine.component.inputs, sizes).items()}


def _call(engine: Engine, feeds: Mapping[str, Any]) -> None:
    for value in engine(**feeds).values():
        synchronize(value)


@contextlib.contextmanager
def _own_cache() -> Iterator[None]:
    """Engines compiled here are of bundles that do not exist yet under this name: keep them out of the user's cache."""
    before = os.environ.get("ACCEL_CACHE")
    with tempfile.TemporaryDirectory(prefix="accel-verdict-") as folder:
        os.environ["ACCEL_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["ACCEL_CACHE"]
            else:
                os.environ["ACCEL_CACHE"] = before
