"""TensorRT-RTX: runs the engine files that `accel build --engine tensorrt-rtx` made on any machine, on an RTX card.

An engine file of TensorRT-RTX holds kernels as an intermediate language, which is compiled for the card when a context
is made. What was compiled is kept in a runtime cache, so it takes seconds once for each engine file, card and driver.
Nothing here has run on a card yet: `docs/tensorrt.md` says what was tested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from ..int8.formats import FORMATS
from ..trt import library, runtime_cache
from ..trt.cuda import Cuda, index_of
from ..trt.cuda_graphs import Bound
from ..trt.engine_files import Here
from ..trt.flavours import RTX, target_number, target_of
from .base import Facts, Status
from .tensorrt import TensorRT

CUDA_GRAPHS = ("off", "step")
SPECIALIZATIONS = ("lazy", "eager", "none")
FACTS = Facts(
    devices={"step": {"cuda_graph": "step"}},
    libraries=("torch",),
    options=("device", "cuda_graph", "engine_file", "specialization"),
    formats=tuple(FORMATS),
    engine_files=True,
    auto=("engine file",),  # only where the bundle has an engine file that fits
    variants=(),
    gpu_variants=("", "step"),
)


def status() -> Status:
    if library.installed(RTX.engine) is None:
        return Status(False, f"{RTX.title} is not installed: it builds engine files here, without a GPU", RTX.install)
    try:
        found = library.load(RTX.engine)
    except UserError as error:
        return Status(False, error.message, error.fix)
    builds = f"{found} builds engine files here"
    if not library.has_driver():
        fix = "an RTX card and its driver; until then: accel build BUNDLE --engine tensorrt-rtx, and run them elsewhere"
        return Status(False, f"{builds}, but cannot run them: there is no NVIDIA driver", fix)
    try:
        gpu = Cuda().gpu
    except UserError as error:
        return Status(False, f"{builds}, but cannot run them: {error.message}", error.fix)
    if not supported(gpu.compute_capability or "0.0"):
        card = f"{gpu.name} ({target_of(gpu.compute_capability or '0.0')})"
        fix = 'on this card: pip install "accel-diffusion[tensorrt]", and --engine tensorrt'
        return Status(False, f"{builds}, but has no kernels for {card}", fix)
    return Status(True, f"{found} on {gpu.name}; builds without a GPU")


def supported(compute_capability: str) -> bool:
    """Whether TensorRT-RTX has kernels for a card: those it knows, and later than all of them."""
    target = target_of(compute_capability)
    return target in RTX.targets or target_number(target) > max(map(target_number, RTX.targets))


class TensorRTRTX(TensorRT):
    """A component's engine file on TensorRT-RTX.

    Args:
        cuda_graph: "step" lets the runtime capture each shape's kernels as a CUDA graph; "off" (default) captures
            nothing.
        specialization: kernels for the very shapes that are asked for: "lazy" (default) compiles them beside the work
            and changes over when they are done, "eager" waits for them, "none" does without.
        options: those of `accel.engines.tensorrt.TensorRT`.
    """

    name = RTX.engine
    cuda_graphs = CUDA_GRAPHS

    def __init__(self, *args: Any, specialization: str = "lazy", **options: Any):
        if specialization not in SPECIALIZATIONS:
            raise UserError(f"unknown specialization {specialization!r}", f"one of: {', '.join(SPECIALIZATIONS)}")
        self.specialization = specialization
        self._caches: list[Any] = []
        super().__init__(*args, **options)

    def _deserialize(self, data: bytes, allow_host_code: bool) -> Any:
        with library.collect():
            runtime = self.module.Runtime(library.logger(self.module))
            validity, reasons = runtime.get_engine_validity(data)
        if validity == self.module.EngineValidity.INVALID:
            raise UserError(
                f"{self.library} does not run the engine file of {self.component.name} on {self.cuda.gpu.name}: "
                f"{_reasons(self.module, reasons)}",
                f"{self.rebuild()} --overwrite; and see accel doctor",
            )
        return super()._deserialize(data, allow_host_code)

    def _create_context(self, memory: Any) -> Any:
        trt, config = self.module, self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(memory)
        strategies = trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.DISABLED if self.cuda_graph == "off" else strategies.WHOLE_GRAPH_CAPTURE
        specialize = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = getattr(specialize, self.specialization.upper())
        cache = config.create_runtime_cache()
        runtime_cache.load(cache, self._cache_file)
        config.set_runtime_cache(cache)
        context = self.engine.create_execution_context(config)
        if context is not None:
            runtime_cache.save(cache, self._cache_file)
            self._caches.append(cache)
        return context

    @property
    def _cache_file(self) -> Any:
        return runtime_cache.path_for(self.engine_file.key, self.library.version, self.cuda.gpu)

    def _graph(self, bound: Bound) -> Any:
        return _CapturedByTheRuntime(bound)

    def release(self) -> None:
        for cache in self._caches:  # shapes that came meanwhile have their kernels in it
            runtime_cache.save(cache, self._cache_file)
        self._caches.clear()
        super().release()


@dataclass(frozen=True)
class _CapturedByTheRuntime:
    """Buffers that stay where they are: the runtime captures their kernels in the first run, and replays them."""

    bound: Bound

    def run(self) -> None:
        self.bound.enqueue()


def _reasons(trt: Any, diagnostics: int) -> str:
    """The diagnostics of an engine's validity, a bit mask, in words."""
    found = [name for name, member in trt.EngineInvalidityDiagnostics.__members__.items() if diagnostics & int(member)]
    return ", ".join(name.replace("_", " ").lower() for name in found) or f"diagnostics {diagnostics}"


def here(device: str = "auto") -> Here | None:
    """Where its engine files would run; None where the device is no GPU."""
    index = index_of(device)
    return None if index is None else Here.of(library.load(RTX.engine), Cuda(index))


def load(bundle: Any, component: Any, **options: Any) -> TensorRTRTX:
    return TensorRTRTX(bundle, component, **options)
