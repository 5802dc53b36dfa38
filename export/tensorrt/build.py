"""Build TensorRT engine files of a bundle's components, with TensorRT 10, 11 or RTX.

Networks are strongly typed: the graph decides the precision, and no precision flag is used, because 11 and RTX have
none. An engine file is kept only when it passes the audit and, where TensorRT builds on the GPU, can be deserialized.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph, graph_file
from accel.errors import UserError
from accel.int8.config import is_product
from accel.int8.formats import FORMATS, Format
from accel.trt import engine_files, library, preflight
from accel.trt.cuda import Cuda
from accel.trt.engine_files import EngineFile, Here
from accel.trt.flavours import target_number, target_of
from accel.trt.library import Library

from . import audit, shapes, timing_cache
from .child import compile_apart
from .compiler import Job
from .memory import Estimate, estimate
from .options import BuildOptions

Progress = Callable[[str, float], None]
Announce = Callable[[str], None]


@dataclass(frozen=True)
class _Place:
    """What engine files are built with and for.

    Attributes:
        cuda: the GPU of a flavour that builds on one, else None.
    """

    found: Library
    here: Here
    cuda: Cuda | None
    targets: tuple[str, ...]

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What is built for, as targets: a flavour that builds on a GPU builds for that one."""
        return self.targets if self.cuda is None else (target_of(self.cuda.gpu.compute_capability),)


def place(
    engine: str = "tensorrt", *, device: int | None = None, targets: Sequence[str] = (), forms: Sequence[Format] = ()
) -> _Place:
    """The library of an engine and, where it needs one to build, the GPU.

    Args:
        forms: of what is to be built. Without targets, those of the default ones that can compute them are built for.

    Raises:
        UserError: when either is missing.
    """
    found = library.load(engine)
    if not found.flavour.gpu_to_build:
        least = max((form.capability for form in forms), default=0)
        if least and not targets:
            targets = [target for target in found.flavour.default_targets if target_number(target) >= least]
        targets = sorted(targets, key=found.flavour.targets.index)
        return _Place(found, Here.anywhere(found, targets), None, tuple(targets))
    cuda = Cuda(device or 0)
    return _Place(found, Here.of(found, cuda), cuda, ())


def build(
    bundle: Bundle,
    components: Sequence[str] = (),
    *,
    engine: str = "tensorrt",
    targets: Sequence[str] = (),
    profiles: Sequence[str] = (),
    options: BuildOptions | None = None,
    device: int | None = None,
    force: bool = False,
    progress: Progress = lambda stage, fraction: None,
    announce: Announce = lambda line: None,
) -> list[EngineFile]:
    """Build an engine file of each component into the bundle's `engines/<key>/`.

    Args:
        components: their names; all of the bundle's by default.
        engine: "tensorrt", or "tensorrt-rtx", which needs no GPU.
        targets: compute capabilities that the engine files are for ("sm86", "sm89", ...), of a flavour that builds for
            other cards; by default Ampere and every later one.
        profiles: names of shape profiles, which become the optimization profiles of each engine; the bundle's own by
            default.
        device: index of the GPU to build on and for, 0 by default.
        force: rebuild engines that already exist.
        progress: called with a description and the fraction done.
        announce: called with lines for people: the memory needed, the precisions found.

    Raises:
        UserError: when TensorRT or the GPU is missing, when TensorRT rejects the graph or fails, or when the engine
            does not compute in the precision of its graph.
    """
    options = options or BuildOptions()
    options.check(library.load(engine), targets, device)
    chosen = shapes.profiles_of(bundle, profiles)
    records = [bundle.component(name) for name in components or bundle.manifest.components]
    forms = [FORMATS[component.format] for component in records if component.int8]
    where = place(engine, device=device, targets=targets, forms=forms)
    if where.targets and not targets:
        announce(f"for {', '.join(where.targets)}: the others have no {forms[0].name}")
    described = []
    for component in records:  # all checks come before the first build, which takes minutes
        if component.int8:
            options.check_format(FORMATS[component.format], component.name, where.capabilities)
        described.append([shapes.described(bundle, component, profile) for profile in chosen])
    bundle.verify([component.folder for component in records])
    built = []
    for i, component in enumerate(records):

        def step(stage: str, fraction: float, i: int = i, name: str = component.name) -> None:
            progress(f"{name}: {stage}", (i + fraction) / len(records))

        built.append(_build_one(bundle, component, described[i], options, where, force, step, announce))
    progress("done", 1.0)
    return built


def _build_one(
    bundle: Bundle,
    component: Component,
    profiles: Sequence[Any],
    options: BuildOptions,
    where: _Place,
    force: bool,
    progress: Progress,
    announce: Announce,
) -> EngineFile:
    identity = engine_files.identity(bundle, component, where.here, profiles, options.identity())
    key = engine_files.key_of(identity)
    if not force and (existing := _existing(bundle, component, key, where.here)):
        announce(f"{component.name}: {key[:8]} is already built")
        return existing
    nodes = audit.expected(bundle, component)
    if odd := audit.unexplained(component, graph(bundle, component), nodes):
        raise UserError(
            f"{component.name} was to run in {wanted(component)}, but its graph has {len(odd)} layers in float32 that "
            f"its manifest does not name: {', '.join(odd[:3])}",
            f"export it again with --precision {wanted(component)}",
        )
    if level := _unfused(component):
        announce(
            f"{component.name}: int8 level {level} takes attention apart, which is one kernel in float16, and writes "
            "every score to memory; exported with --int8-level all it stays whole"
        )
    needed = _estimate(bundle, component, profiles, options)
    announce(f"{component.name}: building needs {needed.text(where.cuda is not None)}{_free(where.cuda, needed)}")
    started = time.perf_counter()
    done = compile_apart(job(bundle, component, profiles, options, where), progress)
    counts = audit.audit(done.layers, nodes)
    announce(f"{component.name}: {audit.check(component.name, wanted(component), counts)}")
    if done.warnings:
        more = f" (and {len(done.warnings) - 1} more in its record)" if len(done.warnings) > 1 else ""
        announce(f"{component.name}: TensorRT warned: {done.warnings[0]}{more}")
    record = {
        "component": component.name,
        "key": key,
        "identity": identity,
        "plan": {
            "file": f"{component.name}.plan",
            "bytes": len(done.data),
            "sha256": engine_files.digest_bytes(done.data),
        },
        "audit": counts | {"wanted": wanted(component)},
        "estimate": asdict(needed),
        "measured": {
            "activations": done.activations,
            "host": done.peak_memory,
            "cpu_seconds": done.cpu_seconds,
            "attentions": done.attentions,
        },
        "warnings": done.warnings,
        "seconds": round(time.perf_counter() - started, 2),
        "built": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
    }
    return engine_files.save(bundle, done.data, record)


def job(
    bundle: Bundle,
    component: Component,
    profiles: Sequence[Any],
    options: BuildOptions,
    where: _Place,
    *,
    what: str = "build",
) -> Job:
    """What the compiler is to do for a component."""
    cached = options.timing_cache and where.found.flavour.timing_cache
    refitted = options.refittable or options.strip_plan  # by the names and shapes of the bundle's own graph
    return Job(
        engine=where.found.flavour.engine,
        name=component.name,
        graph=str(graph_file(bundle, component).resolve()),
        profiles=list(profiles),
        options=asdict(options),
        targets=list(where.targets),
        device=where.cuda.index if where.cuda else 0,
        timing_cache=str(timing_cache.path_for(where.here)) if cached else "",
        forms=[] if refitted else list(where.found.flavour.forms),
        what=what,
    )


def wanted(component: Component) -> str:
    """The precision of a component's graph: int8 or fp8 where it computes so, else that of its weights."""
    if component.format in ("int8", "fp8"):
        return component.format
    return {"float16": "fp16", "bfloat16": "bf16"}.get(component.dtype, "fp32")


def _unfused(component: Component) -> str:
    """The int8 level of a component that has products of attention in it; "" where it has none."""
    if any(map(is_product, component.int8.get("layers", ()))):
        return component.int8["config"]["level"]
    return ""


def _existing(bundle: Bundle, component: Component, key: str, here: Here) -> EngineFile | None:
    try:
        file = engine_files.read(bundle, key, component.name)
    except UserError:
        return None
    return file if preflight.check(bundle, file, here).ok else None


def _estimate(bundle: Bundle, component: Component, profiles: Sequence[Any], options: BuildOptions) -> Estimate:
    largest = {name: max(profile["dims"][name][2] for profile in profiles) for name in component.dims}
    return estimate(bundle, component, largest, options.workspace)


def _free(cuda: Cuda | None, needed: Estimate) -> str:
    if cuda is None:
        return ""
    cuda.release()
    free = cuda.free()
    return f"; only {free / 1e9:.1f} GB are free on the GPU" if free < needed.device else ""
