"""One run: probe every variant alone, load them all, warm up, compare the images, then time them interleaved."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..dtypes import SHORT
from ..engines import status
from ..engines.select import refused_by
from ..errors import UserError
from ..pipeline import Pipeline, component_names, opened
from . import clocks, facts, quality, timing, variants, work
from .document import Document
from .probe import probe
from .state import State, temporary_caches
from .variants import Variant
from .work import IMAGE, BenchSettings

Progress = Callable[[str, float], None]
Load = Callable[..., Pipeline]
REFERENCE = "eager"


@dataclass(frozen=True)
class Result:
    """What `measure` returns.

    Attributes:
        document: the numbers.
        images: uint8 [N, H, W, 3] of each variant that made one.
        failed: variants that were named by the user and could not be measured.
    """

    document: Document
    images: Mapping[str, np.ndarray]
    failed: tuple[str, ...]


def measure(
    bundle: str | Path | Bundle,
    chosen: Sequence[Variant] | None = None,
    settings: BenchSettings | None = None,
    *,
    command: str = "",
    load: Load = variants.load,
    progress: Progress = lambda stage, fraction: None,
) -> Result:
    """Measure variants of one bundle against each other. An interrupt returns what was measured so far.

    All variants stay loaded until the end, because they take turns. Where memory does not hold them together they are
    loaded and timed one after another, and the document says so.

    Args:
        bundle: a bundle or its folder; or a pipeline folder, which only torch can run.
        chosen: variants; None for the default set.
        settings: what to measure and how often.
        command: what was typed, for the document.
        load: loads a pipeline from (bundle, variant).
        progress: called with a description and the fraction done.

    Raises:
        UserError: for a damaged bundle, or a size or batch outside its profile.
    """
    bundle = opened(bundle, safety_checker=False)
    settings = settings or BenchSettings()
    names = component_names(bundle)
    work.check_batch(bundle, settings)
    bundle.verify([bundle.component(name).folder for name in names])
    wanted = chosen if chosen is not None else variants.chosen(None)
    same = dict(threads=settings.threads, attention=settings.attention)
    state = State(bundle, [replace(variant, **same) for variant in wanted], settings)
    try:
        with tempfile.TemporaryDirectory(prefix="accel-bench-") as folder, temporary_caches() as caches:
            state.settings = work.with_images(settings, bundle, Path(folder))
            state.environment = facts.environment(state)
            _probe(state, caches, progress)
            _reference(state, load, progress)
            if variants.fit_together(state.live, state.bundle):
                _warm_up(state, state.live, load, progress)
                _floors(state, load, progress)
                facts.count(state)
                _time(state, state.live, progress)
            else:
                _apart(state, load, progress)
                _floors(state, load, progress)
                facts.count(state)
    except KeyboardInterrupt:
        state.interrupted = True
    document = facts.document(state, command)
    images = {name: sample.pixels for name, sample in state.samples_of.items()}
    if state.reference is not None:
        images = {REFERENCE: state.reference.pixels} | images
    failed = tuple(v.name for v in state.variants if v.requested and v.name in state.reasons)
    return Result(document, images, failed)


def _probe(state: State, caches: Mapping[str, str], progress: Progress) -> None:
    for i, variant in enumerate(state.variants):
        if reason := variants.unable(variant, state.bundle):
            state.reasons[variant.name] = reason
        elif state.settings.memory:
            progress(f"{variant.name}: alone in a process", 0.3 * i / len(state.variants))
            process = probe(state.bundle.path, variant, state.settings.call(), caches)
            state.processes[variant.name] = process
            if process.crashed:
                state.reasons[variant.name] = process.crashed


def _reference(state: State, load: Load, progress: Progress) -> None:
    """Eager in float32 makes the images to compare with, and its inputs are what every variant is timed on."""
    progress("reference: eager fp32", 0.3)
    if not (able := status(REFERENCE)).ok:
        state.notes.append(f"parity is not measured: the eager engine cannot run here ({able.detail})")
        return
    if reason := refused_by(state.bundle, REFERENCE):
        state.notes.append(f"parity is not measured: {reason}")
        return
    variant = variants.parse(REFERENCE)
    pipeline = load(state.bundle, variant)
    call = state.settings.call()
    state.recordings, image = work.record(pipeline, call)
    scopes = work.calls(pipeline, state.recordings, call)
    state.reference = quality.sample(scopes["unet"](), image)
    state.again = quality.sample(scopes["unet"](), scopes[IMAGE]())
    if any(variant.name == REFERENCE for variant in state.live):
        state.pipelines[REFERENCE] = pipeline


def _apart(state: State, load: Load, progress: Progress) -> None:
    """One variant after another, each alone in memory, the reference first."""
    state.notes.append(
        "memory does not hold all variants at once: each was loaded and timed by itself, so that clocks and heat may "
        "differ between them, and the intervals of the ratios mean less"
    )
    done, full = 0, state.settings.rounds
    for variant in sorted(state.live, key=lambda one: one.name != REFERENCE):
        _warm_up(state, [variant], load, progress)
        _time(state, [variant], progress)
        done = min(done or full, state.rounds_done)
        pipeline = state.pipelines.pop(variant.name, None)
        state.calls.clear()
        if pipeline is not None:
            pipeline.close()
    state.rounds_done = done


def _warm_up(state: State, group: Sequence[Variant], load: Load, progress: Progress) -> None:
    call, partial = state.settings.call(), dict[str, str]()
    for i, variant in enumerate(group):
        name = variant.name
        progress(f"{name}: warm-up", 0.35 + 0.25 * i / len(group))
        try:
            pipeline = state.pipelines.get(name) or load(state.bundle, variant)
            if not state.recordings:
                state.recordings, _ = work.record(pipeline, call)
            scopes = work.calls(pipeline, state.recordings, call)
            first: dict[str, float] = {}
            outputs: dict[str, Any] = {}
            failed = ""
            for scope, function in scopes.items():
                try:
                    first[scope] = timing.timed(function)
                    for _ in range(max(2, state.settings.warmup) - 1):
                        started = time.perf_counter()
                        outputs[scope] = function()
                        state.warm.setdefault(scope, []).append(time.perf_counter() - started)
                except UserError as error:  # such as a VAE that overflows in float16: the UNet is still worth a row
                    failed = f"{scope}: {error.message}"
            if not outputs:
                raise UserError(failed, "see accel doctor")
            if failed:
                partial[name] = failed
            else:
                state.samples_of[name] = quality.sample(outputs["unet"], outputs[IMAGE])
        except Exception as error:
            state.reasons[name] = _why(error)
            state.pipelines.pop(name, None)
            continue
        state.pipelines[name] = pipeline
        state.first_calls[name] = first
        unet = pipeline.engines["unet"]
        state.descriptions[name], state.devices[name] = unet.description, unet.runs_on
        for scope in outputs:
            state.calls.setdefault(scope, {})[name] = scopes[scope]
            state.samples.setdefault(scope, {})[name] = []
    state.partly |= partial


def _floors(state: State, load: Load, progress: Progress) -> None:
    """What a low precision alone does to the image, in torch: the honest measure for every engine that uses it."""
    if state.reference is None:
        return
    call = state.settings.call()
    unet = state.bundle.component("unet")
    wanted = {v.dtype for v in state.live} | {d for d, n in SHORT.items() if n == unet.dtype}
    for dtype in sorted(wanted - {"", "fp32"}):
        name = f"{REFERENCE}:{dtype}"
        progress(f"noise floor: {name}", 0.6)
        if name in state.samples_of:
            state.floors[name] = state.samples_of[name]
            continue
        try:
            pipeline = load(state.bundle, variants.parse(name))
            scopes = work.calls(pipeline, state.recordings, call)
            state.floors[name] = quality.sample(scopes["unet"](), scopes[IMAGE]())
        except Exception as error:
            state.floors[name] = _why(error)


def _time(state: State, group: Sequence[Variant], progress: Progress) -> None:
    rounds, names = state.settings.rounds, {variant.name for variant in group}
    calls = {scope: {n: call for n, call in own.items() if n in names} for scope, own in state.calls.items()}

    def after(done: int) -> None:
        state.rounds_done = done
        progress(f"round {done} of {rounds}", 0.65 + 0.35 * done / rounds)

    def failed(name: str, error: Exception) -> None:
        state.reasons[name] = f"failed in round {state.rounds_done + 1}: {_why(error)}"

    progress("rounds", 0.65)
    gpu = state.environment["device"] == "cuda"
    with clocks.watch(state.clocks) if gpu else nullcontext():
        timing.interleave(
            calls,
            state.samples,
            rounds=rounds,
            seconds=state.settings.seconds,
            lead_in={scope: gpu or min(state.warm[scope]) < timing.LEAD_IN_BELOW for scope in calls},
            lead_in_s=timing.GPU_LEAD_IN_S if gpu else 0.0,
            failed=failed,
            after=after,
        )
    _busy(state, calls)
    if found := state.clocks.summary():  # of all groups, where they are timed one after another
        state.environment["gpu_clocks"] = found


def _busy(state: State, calls: Mapping[str, Mapping[str, timing.Call]]) -> None:
    """How long the same calls keep the GPU at work, of the variants that run on one."""
    for scope, by_name in calls.items():
        for name, call in by_name.items():
            if state.devices[name] != "cuda" or name in state.reasons:
                continue
            try:
                state.busy_seconds.setdefault(scope, {})[name] = timing.busy_seconds(call)
            except Exception as error:
                state.notes.append(f"{name}, {scope}: not known how long the GPU was busy: {_why(error)}")


def _why(error: Exception) -> str:
    """One line: what a person can act on, or the type and first line of a library's error."""
    if isinstance(error, UserError):
        return error.message
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
