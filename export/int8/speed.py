"""Benchmark an int8 component against its float one on each engine of this machine, interleaved as in `accel bench`."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from accel.arrays import synchronize
from accel.bench import timing
from accel.bench.state import temporary_caches
from accel.bundle import MANIFEST, Bundle, finalize
from accel.engines import Engine, computing_in, engine_file_engines, facts, fitting_engine_file, load_engine, status
from accel.errors import UserError
from accel.int8.formats import INT8, Format
from accel.machine import machine_name

from ..graph import fp16
from ..graph.trace import example
from ..tensorrt.build import build
from .audit import audit

SECONDS, ROUNDS = 20.0, 25  # per engine, whichever comes first
FASTER = 1.05  # least speedup to call int8 faster; a smaller one may be noise
CLEARLY = 1.1  # times FASTER: a speedup this far from it, with its whole interval, needs no more rounds


class Pair(NamedTuple):
    """Two bundles with the same component: in int8, and in the float dtype that it is compared with."""

    int8: Bundle
    float: Bundle


def engines_for(dtype: str, form: Format = INT8) -> tuple[str, ...]:
    """Engines of this machine that a number format with the rest in `dtype` is meant for: with float16, TensorRT."""
    able = [engine for engine in computing_in(form.name) if dtype == "float32" or facts(engine).engine_files]
    return tuple(engine for engine in able if status(engine).ok)


def pair(
    int8: Bundle, floating: Bundle, component: str, dtype: str, scratch: Path, engines: Sequence[str] | None = None
) -> Pair:
    """What to compare: the bundles themselves or, for TensorRT, copies that its engine files may be built into.

    Args:
        dtype: of what is not int8; with float16, the float32 component of `floating` is converted to it.
        scratch: folder for the copies.
        engines: where they will be compared; those for int8 by default.
    """
    if not set(engine_file_engines()) & set(engines_for(dtype) if engines is None else engines):
        return Pair(int8, floating)
    baseline = _copied if dtype == "float32" else _in_float16
    return Pair(
        _copied(int8, component, scratch / f"{component}-int8"),
        baseline(floating, component, scratch / f"{component}-float"),
    )


def measure(
    pair: Pair,
    component: str,
    engines: Sequence[str],
    *,
    threads: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Measure the speed of both, and audit which layers really run in int8.

    Args:
        engines: where to measure (`engines_for`).
        threads: CPU threads of the engines; 0 for their own default.

    Returns:
        {"machine", "against": dtype of the float component, "engines": {engine: {"on", "float_seconds",
        "int8_seconds", "speedup", "interval" (95 %, of the speedup), "faster", "rounds"} or {"on", "error", "faster"}},
        "audit": {engine: `audit.audit`}}.
    """
    results, audits = {}, {}
    for engine in engines:
        progress(f"{component}: speed on {engine}")
        on = machine_name()
        try:
            # Engines cache what they compile by the bundle, and this one is not finished. TensorRT's engine files are
            # kept: they carry the user's signature, whose key is in the user's own cache.
            with contextlib.nullcontext() if facts(engine).engine_files else temporary_caches():
                if facts(engine).engine_files:
                    for bundle in pair:
                        build(bundle, [component], engine=engine)
                    on = fitting_engine_file(pair.int8, component, engines=[engine]).identity["gpu"]
                audits[engine] = audit(pair.int8, pair.int8.component(component), engine)
                results[engine] = {"on": on} | _benchmark(pair, component, engine, threads)
        except UserError as error:
            results[engine] = {"on": on, "error": error.message, "faster": False}
    return {
        "machine": machine_name(),
        "against": pair.float.component(component).dtype,
        "engines": results,
        "audit": audits,
    }


def _benchmark(pair: Pair, component: str, engine: str, threads: int) -> dict[str, Any]:
    """Time both on one engine, taking turns as in `accel bench`."""
    options: dict[str, Any] = {} if facts(engine).engine_files else {"threads": threads}
    once = {"cache": False} if engine == "openvino" else {}  # the float network is loaded this once
    runners = [
        load_engine(bundle, component, engine, verify=False, **options, **more)
        for bundle, more in zip(pair, ({}, once), strict=True)
    ]
    calls = {name: partial(_call, runner, _feeds(runner)) for name, runner in zip(Pair._fields, runners, strict=True)}
    for call in calls.values():
        call()
    quick = min(map(timing.timed, calls.values())) < timing.LEAD_IN_BELOW
    samples: dict[str, list[float]] = {name: [] for name in calls}

    def failed(name: str, error: Exception) -> None:
        raise error

    timing.interleave(
        {component: calls},
        {component: samples},
        rounds=ROUNDS,
        seconds=SECONDS,
        lead_in={component: quick},
        failed=failed,
        enough=lambda: decided(samples["float"], samples["int8"]),
    )
    for runner in runners:
        runner.close()
    speedup = timing.speedup(samples["float"], samples["int8"])
    return {
        "float_seconds": timing.summary(samples["float"]).p50_s,
        "int8_seconds": timing.summary(samples["int8"]).p50_s,
        "speedup": round(speedup.ratio, 3),
        "interval": [round(speedup.low, 3), round(speedup.high, 3)],
        "faster": speedup.ratio >= FASTER,
        "rounds": len(samples["int8"]),
    }


def decided(floating: Sequence[float], int8: Sequence[float]) -> bool:
    """Whether the 95 % interval of the speedup is clearly above or clearly below what counts as faster."""
    found = timing.speedup(floating, int8)
    return found.low is not None and (found.low > FASTER * CLEARLY or found.high < FASTER / CLEARLY)


def _feeds(engine: Engine) -> dict[str, Any]:
    """Inputs on the engine's own device, so that copies to a GPU are not timed."""
    sizes = {name: limits.opt for name, limits in engine.component.dims.items()}
    feeds = example(engine.component.inputs, sizes, vocabulary=1)  # which words does not matter to the time
    return {name: engine.array(tensor.numpy()) for name, tensor in feeds.items()}


def _call(engine: Engine, feeds: dict[str, Any]) -> None:
    for value in engine(**feeds).values():
        synchronize(value)


def _in_float16(bundle: Bundle, component: str, folder: Path) -> Bundle:
    """A bundle of one component, converted to float16."""
    record = fp16.write(bundle, component, folder / component)
    finalize(folder, replace(bundle.manifest, precision="fp16", components={component: record}))
    return Bundle.open(folder)


def _copied(bundle: Bundle, component: str, folder: Path) -> Bundle:
    """A copy of one component of a bundle. (ONNX's own loader refuses weights that are links.)"""
    folder.mkdir(parents=True)
    shutil.copyfile(bundle.path / MANIFEST, folder / MANIFEST)
    bundle.copy(folder, component)
    return Bundle.open(folder)
