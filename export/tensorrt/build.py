"""Build TensorRT engines from ONNX graphs, through the Python API that TensorRT 10 and 11 share.

Networks are strongly typed: the graph decides the precision, and no precision flag is used, because 11 has none. An
engine file is kept only when it can be deserialized and passes the audit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from accel import interrupt
from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph_file
from accel.errors import UserError
from accel.trt import engine_files, library, preflight
from accel.trt.cuda import Cuda
from accel.trt.engine_files import EngineFile, Here

from . import audit, shapes, timing_cache
from .memory import Estimate, estimate

HARDWARE = ("none", "ampere_plus", "same_compute_capability")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class BuildOptions:
    """Options of the builder config, by TensorRT's names where it has one.

    Attributes:
        optimization_level: builder optimization level, 0 to 5; a higher one searches longer.
        tf32: let float32 layers compute in TF32 (10-bit mantissa). TensorRT's default is on, ours is off.
        workspace: limit of the workspace memory pool (scratch memory of one layer) in bytes; None for TensorRT's own.
        timing_cache: use the timing cache of earlier builds on this GPU, and extend it.
        refittable: the weights can be refitted after the build (LoRA).
        version_compatible: runs on later TensorRT of the same and the next major version too; may be slower.
        hardware_compatible: hardware compatibility level: "none" (this GPU model), "ampere_plus" or
            "same_compute_capability"; may be slower.
        strip_plan: leave the weights out of the engine file; they are refitted from the bundle at load.
        weight_streaming: weights may stay in host memory and be streamed to the GPU.
    """

    optimization_level: int = 3
    tf32: bool = False
    workspace: int | None = None
    timing_cache: bool = True
    refittable: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"
    strip_plan: bool = False
    weight_streaming: bool = False

    def check(self, tensorrt: str) -> None:
        """Raise UserError for a value that TensorRT does not accept, or that this version computes wrongly."""
        if not 0 <= self.optimization_level <= 5:
            wrong = f"invalid optimization level: {self.optimization_level}"
            raise UserError(wrong, "use 0 (fast build) to 5 (longest search)")
        if self.workspace is not None and self.workspace < 1 << 20:
            raise UserError(
                f"workspace too small: {self.workspace} bytes", "give at least 1M, or leave --workspace out"
            )
        if self.hardware_compatible not in HARDWARE:
            wrong = f"unknown hardware compatibility {self.hardware_compatible!r}"
            raise UserError(wrong, f"one of: {', '.join(HARDWARE)}")
        if self.refittable or self.strip_plan:
            library.refuse_broken_refit(tensorrt)

    def check_int8(self, what: str) -> None:
        """Raise UserError for options that do not go with an int8 graph."""
        if self.refittable:
            raise UserError(
                f"{what} is int8, and cannot be refittable: its scales belong to its present weights",
                "leave out --refittable, and fuse a LoRA before export: accel export MODEL OUT --lora FILE",
            )

    def identity(self) -> dict[str, Any]:
        """The options that change the engine: all but where its timings come from."""
        return {name: value for name, value in asdict(self).items() if name != "timing_cache"}


def build(
    bundle: Bundle,
    components: Sequence[str] = (),
    *,
    profiles: Sequence[str] = (),
    options: BuildOptions | None = None,
    device: int = 0,
    force: bool = False,
    progress: Progress = lambda stage, fraction: None,
    announce: Callable[[str], None] = lambda line: None,
) -> list[EngineFile]:
    """Build an engine file of each component into the bundle's `engines/<key>/`.

    Args:
        components: their names; all of the bundle's by default.
        profiles: names of shape profiles, which become the optimization profiles of each engine; the bundle's own by
            default.
        device: index of the GPU to build on and for.
        force: rebuild engines that already exist.
        progress: called with a description and the fraction done.
        announce: called with lines for people: the memory needed, the precisions found.

    Raises:
        UserError: when TensorRT or the GPU is missing, when TensorRT rejects the graph or fails, or when the engine
            does not compute in the precision of its graph.
    """
    options = options or BuildOptions()
    module = library.load()
    options.check(module.__version__)
    cuda = Cuda(device)
    here = Here.of(module.__version__, cuda)
    chosen = shapes.profiles_of(bundle, profiles)
    records = [bundle.component(name) for name in components or bundle.manifest.components]
    described = []
    for component in records:  # all checks come before the first build, which takes minutes
        if component.int8:
            options.check_int8(component.name)
        described.append([shapes.described(bundle, component, profile) for profile in chosen])
    bundle.verify([component.folder for component in records])
    built = []
    for i, component in enumerate(records):

        def step(stage: str, fraction: float, i: int = i, name: str = component.name) -> None:
            progress(f"{name}: {stage}", (i + fraction) / len(records))

        built.append(_build_one(module, bundle, component, described[i], options, cuda, here, force, step, announce))
    progress("done", 1.0)
    return built


def _build_one(
    module: Any,
    bundle: Bundle,
    component: Component,
    profiles: Sequence[Any],
    options: BuildOptions,
    cuda: Cuda,
    here: Here,
    force: bool,
    progress: Progress,
    announce: Callable[[str], None],
) -> EngineFile:
    identity = engine_files.identity(bundle, component, here, profiles, options.identity())
    key = engine_files.key_of(identity)
    if not force and (existing := _existing(bundle, component, key, here)):
        announce(f"{component.name}: {key[:8]} is already built")
        return existing
    largest = {name: max(profile["dims"][name][2] for profile in profiles) for name in component.dims}
    needed = estimate(bundle, component, largest, options.workspace)
    announce(f"{component.name}: building needs {needed}{_free(cuda, needed)}")
    started = time.perf_counter()
    job = _Job(module, cuda, progress)
    data, information = job.run(lambda: _compile(job, bundle, component, profiles, options, here))
    counts = audit.audit(information)
    announce(f"{component.name}: {audit.check(component.name, wanted(component), counts)}")
    return engine_files.save(
        bundle,
        data,
        {
            "component": component.name,
            "key": key,
            "identity": identity,
            "plan": {"file": f"{component.name}.plan", "bytes": len(data), "sha256": engine_files.digest_bytes(data)},
            "audit": counts | {"wanted": wanted(component)},
            "estimate": asdict(needed),
            "seconds": round(time.perf_counter() - started, 2),
            "built": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        },
    )


def wanted(component: Component) -> str:
    """The precision of a component's graph: int8 where it is quantized, else that of its weights."""
    if component.int8:
        return "int8"
    return {"float16": "fp16", "bfloat16": "bf16"}.get(component.dtype, "fp32")


def _existing(bundle: Bundle, component: Component, key: str, here: Here) -> EngineFile | None:
    try:
        file = engine_files.read(bundle, key, component.name)
    except UserError:
        return None
    return file if preflight.check(bundle, file, here).ok else None


def _free(cuda: Cuda, needed: Estimate) -> str:
    cuda.release()
    free = cuda.free()
    return f"; only {free / 1e9:.1f} GB are free on the GPU" if free < needed.device else ""


class _Cancelled(Exception):
    pass


class _Job:
    """A build on its own thread, so that Ctrl-C is seen while TensorRT works and ends the build at its next step."""

    def __init__(self, module: Any, cuda: Cuda, progress: Progress):
        self.module, self.cuda, self.progress = module, cuda, progress
        self.cancelled = threading.Event()
        self.stage, self.fraction = "reading the graph", 0.0

    def run(self, work: Callable[[], Any]) -> Any:
        outcome: dict[str, Any] = {}
        done = threading.Event()  # join() will not do: after a Ctrl-C in it, Python 3.11 takes the thread for finished

        def target():
            try:
                self.cuda.activate()
                outcome["result"] = work()
            except BaseException as error:
                outcome["error"] = error
            finally:
                done.set()

        thread = threading.Thread(target=target, name="tensorrt-build", daemon=True)
        thread.start()
        interrupted: BaseException | None = None
        while not done.is_set():
            try:
                done.wait(0.1)
                if interrupted is None:
                    interrupt.check()
                    self.progress(self.stage, self.fraction)
            except BaseException as error:  # Ctrl-C, or the caller's progress bar failed: cancel and wait for the end
                interrupted = error
                self.cancelled.set()
        thread.join()
        if interrupted is not None:
            raise interrupted
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    def monitor(self) -> Any:
        """TensorRT's progress monitor: nested phases as one fraction, and the way to cancel the build."""
        job = self

        class Monitor(self.module.IProgressMonitor):
            def __init__(self):
                job.module.IProgressMonitor.__init__(self)
                self.phases: dict[str, list] = {}  # name -> [parent, steps, done]

            # No exception may leave these methods: C++ calls them.
            def phase_start(self, phase_name, parent_phase, num_steps):
                self.phases[phase_name] = [parent_phase, max(1, num_steps), 0]
                job.stage = phase_name

            def phase_finish(self, phase_name):
                self.phases.pop(phase_name, None)

            def step_complete(self, phase_name, step):
                if phase_name in self.phases:
                    self.phases[phase_name][2] = step + 1
                    job.fraction = max(job.fraction, self.reached(phase_name))
                return not job.cancelled.is_set()

            def reached(self, phase_name) -> float:
                """The fraction of the outermost phase that is done."""
                part = 0.0
                while phase_name in self.phases:
                    phase_name, steps, done = self.phases[phase_name]
                    part = min(1.0, (done + part) / steps)
                return part

        return Monitor()


def _compile(
    job: _Job, bundle: Bundle, component: Component, profiles: Sequence[Any], options: BuildOptions, here: Here
) -> tuple[bytes, str]:
    """Parse, configure, build and load back; returns the serialized engine and the engine inspector's JSON."""
    module = job.module
    logger = library.logger(module)
    with library.collect() as messages:
        builder = module.Builder(logger)
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = module.OnnxParser(network, logger)
        if not parser.parse_from_file(str(graph_file(bundle, component))):
            raise UserError(
                f"TensorRT cannot parse {component.graph}: {_parser_errors(parser) or messages.last()}",
                f"accel inspect {bundle.path} --for tensorrt lists the nodes it does not support",
            )
        config = _configure(module, builder, profiles, options)
        monitor = job.monitor()  # the variable keeps it alive during the build
        config.progress_monitor = monitor
        cache = timing_cache.path_for(here)
        if options.timing_cache:
            timing_cache.load(config, cache)
        host = builder.build_serialized_network(network, config)
        if job.cancelled.is_set():
            raise _Cancelled
        if host is None:
            raise UserError(
                f"TensorRT could not build {component.name}: {messages.last()}",
                "a smaller --profile or another --workspace; free GPU memory (see nvidia-smi)",
            )
        if options.timing_cache:
            timing_cache.save(config, cache)
        data = bytes(host)
        del host, parser, network, builder
        return data, _inspect(module, logger, data, profiles, options, component.name, messages)


def _parser_errors(parser: Any) -> str:
    lines = []
    for error in (parser.get_error(i) for i in range(min(3, parser.num_errors))):
        where = f" (node {error.node_name()}, {error.node_operator()})" if error.node_operator() else ""
        lines.append(f"{error.desc()}{where}")
    return "; ".join(lines)


def _configure(module: Any, builder: Any, profiles: Sequence[Any], options: BuildOptions) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # for the audit
    if options.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace)
    flags = {
        "REFIT": options.refittable,
        "REFIT_IDENTICAL": options.strip_plan and not options.refittable,
        "STRIP_PLAN": options.strip_plan,
        "VERSION_COMPATIBLE": options.version_compatible,
        "WEIGHT_STREAMING": options.weight_streaming,
        "TF32": options.tf32,  # on by default in TensorRT
    }
    for name, on in flags.items():
        (config.set_flag if on else config.clear_flag)(getattr(module.BuilderFlag, name))
    if options.hardware_compatible != "none":
        config.hardware_compatibility_level = getattr(
            module.HardwareCompatibilityLevel, options.hardware_compatible.upper()
        )
    for profile in profiles:
        if not profile["shapes"]:
            continue  # no input of this graph has a free dimension
        added = builder.create_optimization_profile()
        for name, shapes_of_input in profile["shapes"].items():
            added.set_shape(name, *map(tuple, shapes_of_input))
        if config.add_optimization_profile(added) < 0:
            raise UserError(f"TensorRT rejects the profile {profile['name']!r}", "use another --profile")
    return config


def _inspect(
    module: Any, logger: Any, data: bytes, profiles: Sequence[Any], options: BuildOptions, name: str, messages: Any
) -> str:
    """Deserialize the engine as a user would; returns the engine inspector's JSON at the first profile's optimum."""
    runtime = module.Runtime(logger)
    runtime.engine_host_code_allowed = options.version_compatible  # it was built here just now
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise UserError(
            f"TensorRT cannot deserialize its own engine of {name}: {messages.last()}", "report this to NVIDIA"
        )
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None and not options.strip_plan:
        for tensor, (_, best, _) in profiles[0]["shapes"].items():
            context.set_input_shape(tensor, tuple(best))
        inspector.execution_context = context  # without shapes, it reports no datatype for dynamic layers
    return inspector.get_engine_information(module.LayerInformationFormat.JSON)
