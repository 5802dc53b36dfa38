"""Compile one ONNX graph with TensorRT: parse, configure, build, and say what was built.

`compile_graph` takes everything from its job and gives everything in its result, so `child.py` can run it in a process
of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnx

from accel.errors import UserError
from accel.trt import library
from accel.trt.cuda import Cuda
from accel.trt.library import Library, Messages

from . import layers, timing_cache
from .forms import FORMS
from .options import BuildOptions

Progress = Callable[[str, float], None]
_WARNINGS = 50  # kept of one build; the rest are more of the same


@dataclass(frozen=True)
class Job:
    """What to compile, in values that JSON can hold.

    Attributes:
        engine: the engine it is for, which names the library: "tensorrt" or "tensorrt-rtx".
        name: the component's, for messages.
        graph: the ONNX file.
        profiles: optimization profiles as `shapes.described` gives them.
        options: `BuildOptions` as a dictionary.
        targets: compute capabilities, for a flavour that can choose.
        device: index of the GPU, for a flavour that builds on one.
        timing_cache: file of the timing cache, "" for none.
        forms: forms that the graph is put into before it is parsed (`forms.FORMS`).
        what: "build", or "parse" to stop before the build and list what the parser refuses.
    """

    engine: str
    name: str
    graph: str
    profiles: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    device: int = 0
    timing_cache: str = ""
    forms: list[str] = field(default_factory=list)
    what: str = "build"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Compiled:
    """What a job gave.

    Attributes:
        data: the serialized engine.
        layers: its layers.
        warnings: what TensorRT warned of, each once, with how often.
        activations: bytes of its activations and scratch memory; None where TensorRT does not say.
        attentions: how many attention nodes were allowed to be decomposed.
        cpu_seconds: CPU time of the build.
        peak_memory: the most bytes of memory that the process had; None where the system does not say.
        problems: what the parser refuses: {node, operator, reason}.
    """

    data: Any = b""
    layers: list[layers.Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    activations: int | None = None
    attentions: int = 0
    cpu_seconds: float = 0.0
    peak_memory: int | None = None
    problems: list[dict[str, str]] = field(default_factory=list)


def compile_graph(job: Job, progress: Progress) -> Compiled:
    """Do a job.

    Args:
        progress: called by TensorRT's threads with a description and the fraction done.

    Raises:
        UserError: when the library is missing, rejects the graph or fails.
    """
    found = library.load(job.engine)
    progress("reading the graph", 0.0)
    there = Cuda(job.device).active() if found.flavour.gpu_to_build else nullcontext()
    with there, library.collect(everything=found.flavour.layers == "log") as messages:
        return (_parse if job.what == "parse" else _build)(found, job, progress, messages)


def _parse(found: Library, job: Job, progress: Progress, messages: Messages) -> Compiled:
    _, _, parser, parsed = _network(found, job)
    return Compiled(problems=[] if parsed else parser_problems(parser, messages))


def _build(found: Library, job: Job, progress: Progress, messages: Messages) -> Compiled:
    module, started = found.module, time.process_time()
    builder, network, parser, parsed = _network(found, job)
    if not parsed:
        raise UserError(
            f"{found} cannot parse {Path(job.graph).name} of {job.name}: "
            + "; ".join(_line(problem) for problem in parser_problems(parser, messages)[:3]),
            f"accel inspect BUNDLE --engine {job.engine} lists the nodes it does not take; "
            "export again with another --opset, or run this component on --engine onnxruntime",
        )
    attentions = _decomposable(module, network)
    told = len(messages.errors)
    config = _configure(found, builder, job)
    if refused := messages.causes(told):  # setters log what they do not take, and raise nothing
        raise UserError(
            f"{found} does not take the options of this build of {job.name}: {refused[-1][:300]}",
            "leave out what it names; accel build --help has the options",
        )
    monitor = _monitor(module, progress)  # the variable keeps it alive during the build
    config.progress_monitor = monitor
    if job.timing_cache:
        timing_cache.load(config, Path(job.timing_cache))
    host = builder.build_serialized_network(network, config)
    if host is None:
        raise failure(found, job, messages)
    if job.timing_cache:
        timing_cache.save(config, Path(job.timing_cache))
    spent = time.process_time() - started
    log = messages.rest or []
    if found.flavour.layers == "log":
        listed = layers.from_log(log)
    else:
        listed = layers.from_inspector(_inspect(found, bytes(host), job, messages))
    return Compiled(
        data=host,
        layers=listed,
        warnings=_counted(messages.warnings),
        activations=layers.activation_memory(log),
        attentions=attentions,
        cpu_seconds=round(spent, 2),
    )


def _network(found: Library, job: Job) -> tuple[Any, Any, Any, bool]:
    module, logger = found.module, library.logger(found.module)
    builder = module.Builder(logger)
    network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = module.OnnxParser(network, logger)
    return builder, network, parser, _parsed(parser, job)


def _parsed(parser: Any, job: Job) -> bool:
    """Parse the graph, in its other forms where the job names some; weights stay in their file."""
    path = Path(job.graph)
    if not job.forms or not path.is_file():
        return parser.parse_from_file(job.graph)
    model = onnx.load(job.graph, load_external_data=False)
    changed = sum(FORMS[name](model, path.parent) for name in job.forms)
    return parser.parse(model.SerializeToString(), job.graph) if changed else parser.parse_from_file(job.graph)


def parser_problems(parser: Any, messages: Messages) -> list[dict[str, str]]:
    """What the parser refuses: node, operator, and a reason with the error's code where the text says nothing."""
    found = []
    for error in (parser.get_error(i) for i in range(parser.num_errors)):
        code = getattr(error.code(), "name", str(error.code())).replace("_", " ").lower()
        text = " ".join(str(error.desc()).split())[:300]
        where = f" (in {error.func()})" if error.func() else ""
        found.append(
            {
                "node": error.node_name() or "(graph)",
                "operator": error.node_operator() or "",
                "reason": f"{code}: {text}{where}",
            }
        )
    return found or [{"node": "(graph)", "operator": "", "reason": messages.last()}]


def _line(problem: Mapping[str, str]) -> str:
    where = f" (node {problem['node']}, {problem['operator']})" if problem["operator"] else ""
    return f"{problem['reason']}{where}"


def _decomposable(module: Any, network: Any) -> int:
    """Let every attention layer be computed in parts where no kernel of its own exists; returns how many there are.

    A graph of opset 23 has them as one node, and without this the build fails for head sizes without a kernel.
    """
    count = 0
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == module.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = module.IAttentionOutputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def _configure(found: Library, builder: Any, job: Job) -> Any:
    module, options = found.module, BuildOptions(**job.options)
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
    if job.targets:
        config.num_compute_capabilities = len(job.targets)
        for i, target in enumerate(job.targets):
            if not config.set_compute_capability(getattr(module.ComputeCapability, target.upper()), i):
                raise UserError(f"{found} does not take the target {target}", "leave it out of --targets")
    for profile in job.profiles:
        if not profile["shapes"]:
            continue  # no input of this graph has a free dimension
        added = builder.create_optimization_profile()
        for name, shapes_of_input in profile["shapes"].items():
            added.set_shape(name, *map(tuple, shapes_of_input))
        if config.add_optimization_profile(added) < 0:
            raise UserError(f"{found.flavour.title} rejects the profile {profile['name']!r}", "use another --profile")
    return config


def failure(found: Library, job: Job, messages: Messages) -> UserError:
    """The error of a build that failed, with the fix that goes with its cause."""
    cause = messages.last()
    text = " ".join(messages.errors + messages.warnings).lower()
    fix = "a smaller --profile, or --components to leave this one out; it runs on --engine onnxruntime"
    if _wants_lean(text):
        fix = _LEAN
    elif "sm75" in job.targets and "not supported" in text:
        fix = (
            "leave sm75 out of --targets: Turing has no kernel for it in this precision; --precision fp16 may have one"
        )
    elif "memory" in text or "workspace" in text:
        fix = "a smaller --profile or another --workspace" + (
            "; free GPU memory (see nvidia-smi)" if found.flavour.gpu_to_build else "; free memory of this machine"
        )
    return UserError(f"{found} could not build {job.name}: {cause}", fix)


_LEAN = "leave out --version-compatible, or install TensorRT's lean runtime: pip install tensorrt-lean"


def _wants_lean(text: str) -> bool:
    """Whether a log says that the runtime is missing which a version-compatible engine carries."""
    return "libnvinfer_lean" in text or "lean" in text and "cannot open" in text


def _counted(warnings: list[str]) -> list[str]:
    """Each warning once, on one line, with how often it came."""
    lines = [" ".join(line.split())[:300] for line in warnings]
    return [f"{line} ({n} times)" if (n := lines.count(line)) > 1 else line for line in dict.fromkeys(lines)][
        :_WARNINGS
    ]


def _inspect(found: Library, data: bytes, job: Job, messages: Messages) -> str:
    """Deserialize the engine as a user would; returns the engine inspector's JSON at the first profile's optimum."""
    module, options = found.module, BuildOptions(**job.options)
    runtime = module.Runtime(library.logger(module))
    runtime.engine_host_code_allowed = options.version_compatible  # it was built here just now
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise not_deserialized(found, job.name, messages)
    if options.strip_plan:
        refitter = module.Refitter(engine, library.logger(module))
        parser = module.OnnxParserRefitter(refitter, library.logger(module))
        if not (parser.refit_from_file(job.graph) and refitter.refit_cuda_engine()):
            raise UserError(
                f"{found} cannot refit the stripped engine of {job.name}: {messages.last()}", "leave out --strip-plan"
            )
    inspector = engine.create_engine_inspector()
    context = engine.create_execution_context(module.ExecutionContextAllocationStrategy.USER_MANAGED)
    if context is not None:
        for tensor, (_, best, _) in job.profiles[0]["shapes"].items():
            context.set_input_shape(tensor, tuple(best))
        inspector.execution_context = context  # without shapes, it reports no datatype for dynamic layers
    return inspector.get_engine_information(module.LayerInformationFormat.JSON)


def not_deserialized(found: Library, name: str, messages: Messages) -> UserError:
    """The error of an engine that its own builder's library does not load."""
    text = " ".join(messages.errors).lower()
    if _wants_lean(text):
        fix = _LEAN
    elif "cudaerror" in text.replace(" ", "") or "driver" in text or not library.has_driver() and "cuda" in text:
        fix = "check the driver (nvidia-smi): loading an engine needs one"
    else:
        fix = "free GPU memory (see nvidia-smi) and build again"
    return UserError(f"{found} cannot deserialize its own engine of {name}: {messages.last()}", fix)


def _monitor(module: Any, progress: Progress) -> Any:
    """TensorRT's progress monitor: nested phases as one fraction."""

    class Monitor(module.IProgressMonitor):
        def __init__(self):
            module.IProgressMonitor.__init__(self)
            self.phases: dict[str, list] = {}  # name -> [parent, steps, done]
            self.stage, self.fraction = "", 0.0

        # No exception may leave these methods: C++ calls them.
        def phase_start(self, phase_name, parent_phase, num_steps):
            self.phases[phase_name] = [parent_phase, max(1, num_steps), 0]
            self.stage = phase_name

        def phase_finish(self, phase_name):
            self.phases.pop(phase_name, None)

        def step_complete(self, phase_name, step):
            if phase_name in self.phases:
                self.phases[phase_name][2] = step + 1
                self.fraction = max(self.fraction, self.reached(phase_name))
                progress(self.stage, self.fraction)
            return True

        def reached(self, phase_name) -> float:
            """The fraction of the outermost phase that is done."""
            part = 0.0
            while phase_name in self.phases:
                phase_name, steps, done = self.phases[phase_name]
                part = min(1.0, (done + part) / steps)
            return part

    return Monitor()
