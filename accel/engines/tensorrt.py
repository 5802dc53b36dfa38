"""TensorRT: runs the engine files that `accel build` made for this GPU, on torch's memory, without copies."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from ..bundle import Bundle, Component
from ..bundle.graph_file import graph_file
from ..errors import UserError
from ..int8.formats import FORMATS
from ..trt import library, preflight
from ..trt.cuda import Cuda, index_of
from ..trt.cuda_graphs import Bound, Captures, Graph, replay
from ..trt.engine_files import Here, rebuild
from ..trt.workspace import Workspace, workspace
from .base import Engine, Facts, Status, to_torch
from .refit import Refit

CUDA_GRAPHS = ("off", "step", "loop")
FACTS = Facts(
    devices={mode: {"cuda_graph": mode} for mode in CUDA_GRAPHS[1:]},
    libraries=("torch", "tensorrt"),
    options=("device", "cuda_graph", "engine_file", "allow_host_code"),
    formats=tuple(FORMATS),
    engine_files=True,
    auto=("engine file",),  # only where the bundle has an engine file that fits
    variants=(),
    gpu_variants=("", "step"),
)


def status() -> Status:
    version = library.installed()
    if version is None:
        return Status(False, "tensorrt is not installed", 'pip install "accel-diffusion[tensorrt]"')
    try:
        found = library.load()
        gpu = Cuda().gpu
    except UserError as error:
        return Status(False, error.message, error.fix)
    return Status(True, f"tensorrt {found.version} on {gpu.name}")


class TensorRT(Engine):
    """A component's engine file on TensorRT.

    Any number of threads may call one engine: each has its own context, stream and scratch memory.

    Args:
        device: "auto", "cuda" or "cuda:1".
        engine_file: key of the engine file to use; by default the newest that fits.
        cuda_graph: "step" replays a captured CUDA graph for each shape instead of launching kernels one by one; "loop"
            lets a pipeline capture all steps of its sampler at once; "off" (default) captures nothing.
        streaming_budget: weight streaming budget, the bytes of weights to keep on the GPU, for engines built with
            weight streaming; None: TensorRT's automatic budget.
        allow_host_code: let a version-compatible engine run the lean runtime inside its file.
        weights: as `set_weights` takes them; needs an engine file that was built with `--refittable`.
    """

    name = "tensorrt"
    native = "torch"
    cuda_graphs: tuple[str, ...] = CUDA_GRAPHS

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
        weights: Mapping[str, Any] | None = None,
    ):
        super().__init__(bundle, component)
        self.bundle = bundle
        index = index_of(device)
        if index is None:
            raise UserError(f"{self.name} does not run on {device!r}", "--device cuda or --device cuda:1")
        if cuda_graph not in self.cuda_graphs:
            raise UserError(f"{self.name} has no cuda_graph {cuda_graph!r}", f"one of: {', '.join(self.cuda_graphs)}")
        self.cuda_graph = cuda_graph
        self.library = library.load(self.name)
        self.module = self.library.module
        self.cuda = Cuda(index)
        self.device = self.cuda.device
        here = Here.of(self.library, self.cuda)
        self.engine_file, data = preflight.choose(bundle, component.name, here, engine_file, self.name)
        with self.cuda.active():
            self._open(data, allow_host_code, streaming_budget, weights or {})
        self.profile = ", ".join(p["name"] for p in self.engine_file.identity["profiles"])
        self.description = f"{self.name} {self.library.version}, {self.cuda.gpu.name}, profiles {self.profile}"

    def _open(
        self, data: bytes, allow_host_code: bool, streaming_budget: int | None, weights: Mapping[str, Any]
    ) -> None:
        """Load an engine file's bytes on the current device."""
        self.engine = self._deserialize(data, allow_host_code)
        self.component = replace(self.component, dims=self.engine_file.ranges(self.component))
        self._check_tensors()
        options = self.engine_file.identity["options"]
        if options["weight_streaming"]:
            own = self.engine.get_weight_streaming_automatic_budget
            self.engine.weight_streaming_budget_v2 = own() if streaming_budget is None else streaming_budget
        self.refitted: dict[str, str] = {}  # name -> sha256 of the weights that are not the bundle's own
        self._local = threading.local()
        if options["strip_plan"]:
            self._refit_stripped()
        if weights:
            self.set_weights(weights)

    def _deserialize(self, data: bytes, allow_host_code: bool) -> Any:
        """The engine of an engine file whose bytes have passed the pre-flight."""
        name, options = self.component.name, self.engine_file.identity["options"]
        if options["version_compatible"] and not allow_host_code:
            raise UserError(
                f"the engine file of {name} is version-compatible: it carries a runtime of its own, which is host code",
                "--allow-host-code lets it run; or build without --version-compatible",
            )
        with library.collect() as messages:
            self.runtime = self.module.Runtime(library.logger(self.module))
            if allow_host_code:
                self.runtime.engine_host_code_allowed = True
            engine = self.runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise UserError(
                f"{self.library} cannot deserialize the engine file of {name}: {messages.last()}",
                f"{self.rebuild()} --overwrite",
            )
        return engine

    def rebuild(self) -> str:
        """The command that builds an engine file of this component for this GPU."""
        return rebuild(self.bundle, self.component.name, gpu=self.cuda.index, engine=self.name)

    def _check_tensors(self) -> None:
        """Refuse an engine whose I/O tensors are not the manifest's: TensorRT would read wrong addresses silently."""
        specs = (*self.component.inputs, *self.component.outputs)
        names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        types = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32"}
        wrong = names ^ {spec.name for spec in specs} or {
            spec.name
            for spec in specs
            if self.engine.get_tensor_dtype(spec.name) != getattr(self.module.DataType, types[spec.dtype])
        }
        if wrong:
            raise UserError(
                f"the engine file of {self.component.name} and the manifest differ in {', '.join(sorted(wrong))}",
                f"{self.rebuild()} --overwrite",
            )

    def _refit_stripped(self) -> None:
        """Refit a stripped engine (strip plan) with the weights of the graph that it was built from."""
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
                f"TensorRT cannot refit the stripped engine of {self.component.name}: {messages.last()}",
                f"{self.rebuild()} --overwrite",
            )

    @cached_property
    def _refit(self) -> Refit:
        return Refit(self)

    def set_weights(self, tensors: Mapping[str, Any]) -> None:
        if tensors or "_refit" in self.__dict__:
            self._refit.weights(tensors)

    def array(self, value: Any) -> Any:
        return to_torch(value, self.device)

    def context(self) -> Any:
        """A new execution context for the calling thread, with user-managed device memory."""
        with library.collect() as messages:
            context = self._create_context(self.module.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise UserError(
                f"{self.library} creates no execution context of {self.component.name}: {messages.last()}",
                "free GPU memory (see nvidia-smi)",
            )
        return context

    def _create_context(self, memory: Any) -> Any:
        """A context whose device memory is allocated by a strategy; None where TensorRT fails."""
        return self.engine.create_execution_context(memory)

    def nearest(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The index of the optimization profile that takes these shapes and whose optimum (kOPT) is closest to them.

        Args:
            shapes: input -> shape.

        Raises:
            UserError: when none takes them, with the limits of the closest one.
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
                f"no optimization profile of the engine takes these shapes; the closest is {name!r}: {outside[0]}",
                f"{self.rebuild()} --profile ... (one that does)",
            )
        return index

    def prepare(
        self, context: Any, profile: int, inputs: Mapping[str, Any], outputs: Mapping[str, Any], work: Workspace
    ) -> int:
        """Set a context's profile, input shapes, tensor addresses and device memory; returns that memory's address."""
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
        with self.cuda.active():
            return self._run(feeds)

    def _run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        sizes, local, work = self.sizes(feeds), self._local, workspace(self.cuda)
        local.workspace = work  # keeps it alive
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

        graph = self.graphs.get(tuple(sorted(sizes.items())), lambda: self._graph(self.bound(sizes)))
        replay(graph, feeds, outputs)

    def bound(self, sizes: Mapping[str, int]) -> Bound:
        """A context on buffers of its own, of one shape."""
        return Bound(self, sizes)

    def _graph(self, bound: Bound) -> Any:
        """What replays the work of buffers that stay where they are."""
        return Graph(bound, bound.enqueue)

    @staticmethod
    def _must(ok: bool, what: str) -> None:
        assert ok, f"TensorRT refuses {what}, although the profile allows it"

    def release(self) -> None:
        self._local = threading.local()
        del self.engine, self.runtime


def here(device: str = "auto") -> Here | None:
    """Where its engine files would run; None where the device is no GPU."""
    index = index_of(device)
    return None if index is None else Here.of(library.load(), Cuda(index))


def load(bundle: Bundle, component: Component, **options: Any) -> TensorRT:
    return TensorRT(bundle, component, **options)
