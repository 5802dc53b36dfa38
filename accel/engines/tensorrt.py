"""TensorRT: engine files that `accel build` made for this GPU, on torch's memory, without copies."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..bundle import Bundle, Component
from ..bundle.graph_file import graph_file
from ..bundle.shape_profiles import Range
from ..errors import UserError
from ..trt import library, preflight
from ..trt.cuda import Cuda, index_of
from ..trt.engine_files import EngineFile, Here, rebuild
from ..trt.workspace import Workspace, workspace
from .base import Engine, Facts, Status, to_torch
from .cuda_graphs import Bound, Captures, Graph

CUDA_GRAPHS = ("off", "step", "loop")
FACTS = Facts(
    devices={mode: {"cuda_graph": mode} for mode in CUDA_GRAPHS[1:]},
    libraries=("torch", "tensorrt"),
    options=("device", "cuda_graph", "engine_file", "allow_host_code"),
    int8=True,
    auto=(),  # only where the bundle has an engine file that fits
    variants=(),
    gpu_variants=("", "step"),
)


def status() -> Status:
    version = library.installed()
    if version is None:
        return Status(False, "tensorrt is not installed", 'pip install "accel-diffusion[tensorrt]"')
    try:
        version = library.load().__version__
        gpu = Cuda().gpu
    except UserError as error:
        return Status(False, error.message, error.fix)
    return Status(True, f"tensorrt {version} on {gpu.name}")


class TensorRT(Engine):
    """A component's engine file on TensorRT.

    Any number of threads may call one engine: each has its own context, stream and scratch memory.

    Args:
        device: "auto", "cuda" or "cuda:1".
        engine file: key of the engine file to use; by default the newest that fits.
        cuda_graph: "step" replays a captured CUDA graph for each shape instead of launching kernels one by one; "loop"
            lets a pipeline capture all steps of its sampler at once; "off" (default) captures nothing.
        streaming_budget: bytes of weights to keep on the GPU, for engine files built with weight streaming; None:
            TensorRT's own choice.
        allow_host_code: let a version-compatible engine file run the TensorRT runtime that it carries inside.
    """

    name = "tensorrt"
    native = "torch"

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        *,
        device: str = "auto",
        engine_file: str | None = None,
        cuda_graph: str = "off",
        streaming_budget: int | None = None,
        allow_host_code: bool = False,
    ):
        super().__init__(bundle, component)
        self.bundle = bundle
        index = index_of(device)
        if index is None:
            raise UserError(f"TensorRT does not run on {device!r}", "--device cuda or --device cuda:1")
        self.module = library.load()
        self.cuda = Cuda(index)
        self.device = self.cuda.device
        here = Here.of(self.module.__version__, self.cuda)
        self.engine_file, data = preflight.choose(bundle, component.name, here, engine_file)
        self.cuda.activate()
        self.engine = self._deserialize(data, allow_host_code)
        self.component = replace(component, dims=_hull(component, self.engine_file))
        self._check_tensors()
        options = self.engine_file.identity["options"]
        if options["weight_streaming"]:
            own = self.engine.get_weight_streaming_automatic_budget
            self.engine.weight_streaming_budget_v2 = own() if streaming_budget is None else streaming_budget
        if cuda_graph not in CUDA_GRAPHS:
            raise UserError(f"unknown cuda_graph {cuda_graph!r}", f"one of: {', '.join(CUDA_GRAPHS)}")
        self.cuda_graph = cuda_graph
        self.epoch = 0
        self._local = threading.local()
        if options["strip_plan"]:
            self._fill()
        self.profile = ", ".join(p["name"] for p in self.engine_file.identity["profiles"])
        self.description = f"tensorrt {self.module.__version__}, {self.cuda.gpu.name}, profiles {self.profile}"

    def _deserialize(self, data: bytes, allow_host_code: bool) -> Any:
        """The engine of bytes that have passed the pre-flight."""
        name, options = self.component.name, self.engine_file.identity["options"]
        if options["version_compatible"] and not allow_host_code:
            raise UserError(
                f"the engine file of {name} is version-compatible: it carries a runtime of its own, which is code to "
                "be run",
                "--allow-host-code, or build it without --version-compatible",
            )
        with library.collect() as messages:
            self.runtime = self.module.Runtime(library.logger(self.module))
            if allow_host_code:
                self.runtime.engine_host_code_allowed = True
            engine = self.runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(f"TensorRT refuses the engine file of {name}: {messages.last()}", self._build("--force"))
        return engine

    def _build(self, more: str) -> str:
        """The command that builds an engine file for this GPU."""
        return f"{rebuild(self.bundle, self.component.name, gpu=self.cuda.index)} {more}"

    def _check_tensors(self) -> None:
        """The engine file must have the manifest's tensors: a wrong address would be read without a word."""
        found = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        wanted = {spec.name for spec in (*self.component.inputs, *self.component.outputs)}
        kinds = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
        wrong = found ^ wanted or {
            spec.name
            for spec in (*self.component.inputs, *self.component.outputs)
            if self.engine.get_tensor_dtype(spec.name) != getattr(self.module.DataType, kinds[spec.dtype])
        }
        if wrong:
            raise UserError(
                f"the engine file of {self.component.name} and the manifest differ in {', '.join(sorted(wrong))}",
                self._build("--force"),
            )

    def _fill(self) -> None:
        """Give a stripped engine file its weights, out of the graph that it was built from."""
        work = workspace(self.cuda)
        with library.collect() as messages, self.cuda.on(work.stream):
            logger = library.logger(self.module)
            refitter = self.module.Refitter(self.engine, logger)
            parser = self.module.OnnxParserRefitter(refitter, logger)
            done = parser.refit_from_file(str(graph_file(self.bundle, self.component)))
            done = done and refitter.refit_cuda_engine_async(work.handle)
            self.cuda.synchronize(work.stream)
        if not done:
            raise UserError(
                f"the weights of {self.component.name} do not go into its stripped engine file: {messages.last()}",
                self._build("--force"),
            )

    def array(self, value: Any) -> Any:
        return to_torch(value, self.device)

    def context(self) -> Any:
        """A new execution context of the calling thread, whose scratch memory we provide."""
        with library.collect() as messages:
            made = self.engine.create_execution_context(self.module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if made is None:
            raise UserError(
                f"TensorRT gives no execution context of {self.component.name}: {messages.last()}",
                "free the GPU's memory (nvidia-smi shows who has it)",
            )
        return made

    def nearest(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The profile that takes these shapes and was optimised for the closest ones.

        Raises:
            UserError: when none takes them, with what the closest one takes.
        """
        candidates = []
        for i, profile in enumerate(self.engine_file.identity["profiles"]):
            outside, misfit, distance = [], 0.0, 0.0
            for name, (low, best, high) in profile["shapes"].items():
                for axis, size in enumerate(shapes[name]):
                    distance += abs(math.log(size / best[axis]))
                    misfit += math.log(max(size / high[axis], low[axis] / size, 1.0))
                if not all(a <= size <= b for a, size, b in zip(low, shapes[name], high, strict=True)):
                    outside.append(f"{name} {list(shapes[name])} is not within {low} to {high}")
            candidates.append((misfit, distance, i, outside, profile["name"]))
        misfit, _, index, outside, name = min(candidates)
        if misfit:
            raise UserError(
                f"no profile of this engine file takes that; the closest is {name!r}, where {outside[0]}",
                self._build("--profile ... (one that does)"),
            )
        return index

    def prepare(
        self, context: Any, profile: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any], work: Workspace
    ) -> int:
        """Tell a context its profile, shapes, addresses and scratch memory; returns the scratch memory's address."""
        if context.active_optimization_profile != profile:
            self._must(context.set_optimization_profile_async(profile, work.handle), "the profile")
        shapes = self.engine_file.identity["profiles"][profile]["shapes"]
        for name, tensor in inputs.items():
            if name in shapes:
                self._must(context.set_input_shape(name, tuple(tensor.shape)), f"the shape of {name}")
        for name, tensor in (*inputs.items(), *outputs.items()):
            self._must(context.set_tensor_address(name, tensor.data_ptr()), f"the address of {name}")
        address, size = work.scratch(self.engine.get_device_memory_size_for_profile_v2(profile))
        context.set_device_memory(address, size)
        return address

    def execute(self, context: Any, work: Workspace) -> None:
        with library.collect() as messages:
            if not context.execute_async_v3(work.handle):
                raise UserError(f"TensorRT could not run {self.component.name}: {messages.last()}", "see accel doctor")

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.cuda.activate()
        sizes, local, work = self.sizes(feeds), self._local, workspace(self.cuda)
        local.workspace = work  # holds it
        profile = self.nearest({name: tuple(value.shape) for name, value in feeds.items()})
        outputs = {s.name: self.cuda.empty(s.concrete(sizes), s.dtype) for s in self.component.outputs}
        with self.cuda.on(work.stream):
            if self.cuda_graph != "off":
                self._replay(sizes, feeds, outputs)
                return outputs
            if not hasattr(local, "context"):
                local.context = self.context()
            held = {name: value.contiguous() for name, value in feeds.items()}
            self.prepare(local.context, profile, held, outputs, work)
            self.execute(local.context, work)
        return outputs

    @property
    def graphs(self) -> Captures:
        """The calling thread's captured graphs."""
        if not hasattr(self._local, "graphs"):
            self._local.graphs = Captures()
        return self._local.graphs

    def _replay(self, sizes: Mapping[str, int], feeds: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Copy in, replay this shape's graph, copy out."""

        def make() -> Graph:
            bound = Bound(self, sizes)
            return Graph(bound, bound.enqueue)

        graph = self.graphs.get(tuple(sorted(sizes.items())), make)
        for name, value in feeds.items():
            graph.bound.inputs[name].copy_(value)
        graph.run()
        for name, value in outputs.items():
            value.copy_(graph.bound.outputs[name])

    @staticmethod
    def _must(ok: bool, what: str) -> None:
        assert ok, f"TensorRT refuses {what}, although the pre-flight and the profile allow it"

    def close(self) -> None:
        self._local = threading.local()
        del self.engine, self.runtime


def _hull(component: Component, engine_file: EngineFile) -> dict[str, Range]:
    """The dimensions an engine file takes: from the smallest to the largest of all its profiles."""
    dims = {}
    for name, limits in component.dims.items():
        low, best, high = zip(*(profile["dims"][name] for profile in engine_file.identity["profiles"]), strict=True)
        dims[name] = Range(min(low), best[0], max(high), limits.multiple)
    return dims


def load(bundle: Bundle, component: Component, **options: Any) -> TensorRT:
    return TensorRT(bundle, component, **options)
