"""Is int8 worth it? Speed against float of the same component on this machine, engine by engine, taking turns."""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from accel.bundle import Bundle
from accel.engines import Engine, load_engine, status
from accel.errors import UserError
from accel.machine import machine_name

from .int8_audit import ENGINES, audit
from .onnx import example

SECONDS, ROUNDS = 20.0, 25  # per engine, whichever comes first; at least three rounds
FASTER = 1.05  # closer to 1 than this, noise could have decided


def judge(
    low: Bundle, high: Bundle, name: str, parity: dict[str, Any], *, threads: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The verdict on one component, for the manifest.

    Args:
        low: the int8 bundle, complete.
        high: the float bundle that it was made from.
        parity: what was measured on pictures, with `ok`.
        threads: of the engines; 0 lets them choose.

    Returns:
        {"machine", "parity", "engines": {engine: {"float_seconds", "int8_seconds", "speedup", "faster"}},
        "audit": {engine: ...}, "offered": engines on which int8 is faster, within the budget, and really int8}.
    """
    engines, audits = {}, {}
    with _own_cache():
        for engine in ENGINES:
            if not status(engine).ok:
                continue
            say(f"{name}: speed on {engine}")
            try:
                audits[engine] = audit(low, low.component(name), engine)
                engines[engine] = _race(low, high, name, engine, threads)
            except UserError as error:
                engines[engine] = {"error": error.message, "faster": False}
    offered = [
        engine for engine, entry in engines.items() if entry["faster"] and parity["ok"] and audits[engine]["ok"]
    ]  # fmt: skip
    return {
        "machine": machine_name(), "parity": parity, "engines": engines, "audit": audits, "offered": offered
    }  # fmt: skip


def _race(low: Bundle, high: Bundle, name: str, engine: str, threads: int) -> dict[str, Any]:
    runners = {
        "int8": load_engine(low, name, engine, verify=False, threads=threads),
        "float": load_engine(high, name, engine, verify=False, threads=threads),
    }
    feeds = {kind: _feeds(runner) for kind, runner in runners.items()}
    for kind, runner in runners.items():
        runner(**feeds[kind])
    times: dict[str, list[float]] = {kind: [] for kind in runners}
    until = time.perf_counter() + SECONDS
    while len(times["float"]) < 3 or (time.perf_counter() < until and len(times["float"]) < ROUNDS):
        for kind, runner in runners.items():
            started = time.perf_counter()
            runner(**feeds[kind])
            times[kind].append(time.perf_counter() - started)
    for runner in runners.values():
        runner.close()
    seconds = {kind: statistics.median(values) for kind, values in times.items()}
    speedup = seconds["float"] / seconds["int8"]
    return {
        "float_seconds": seconds["float"], "int8_seconds": seconds["int8"], "speedup": round(speedup, 3),
        "faster": speedup >= FASTER, "rounds": len(times["float"]),
    }  # fmt: skip


def _feeds(engine: Engine) -> dict[str, np.ndarray]:
    sizes = {name: limits.opt for name, limits in engine.component.dims.items()}
    return {name: tensor.numpy() for name, tensor in example(engine.component.inputs, sizes).items()}


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
