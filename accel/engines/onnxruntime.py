"""ONNX Runtime: CPU everywhere, CUDA and TensorRT where onnxruntime-gpu is installed, and plugin providers.

Needs neither torch nor diffusers. With CUDA or TensorRT and torch present, tensors stay on the GPU between calls, and
runs are queued on a stream of torch's: nobody waits for them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..bundle import Bundle, Component
from ..bundle.graph_file import float32_values, graph
from ..bundle.tensor_spec import TensorSpec
from ..dtypes import torch_dtype
from ..errors import MissingPackage, UserError
from ..providers import gpu, optimized, plugins
from ..providers.bindings import Bindings
from ..providers.built_in import PROVIDERS
from ..providers.route import NAMES, NO_EP_CONTEXT, Route, find
from ..trt.cuda import Cuda, index_of
from .base import Engine, Facts, Status, check_threads, note_saturation, to_torch
from .folds import in_onnx

FACTS = Facts(
    devices={name: {"provider": name} for name in NAMES},
    libraries=("onnx", "onnxruntime"),
    options=("device", "provider", "threads"),
    formats=("int8", "int8-weight-only", "int4-weight-only"),
    tunes=("folds",),
)
# Off for int8: it would turn a product and its bias into a float one before int8 is looked at (static shapes).
OFF_FOR_INT8 = ["MatMulAddFusion"]
# ONNX Runtime 1.31 makes an integer product of an fp8 one, which it then refuses itself.
OFF = {"int8": OFF_FOR_INT8, "fp8": ["QDQSelectorActionTransformer"]}
# By itself ONNX Runtime rounds the inputs of quantized weights to int8 (accuracy level 4); 1 is float32.
_EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
_WEIGHTS_IN = "session.model_external_initializers_file_folder_path"
ENTRIES: Mapping[str, Mapping[str, str]] = {"int8-weight-only": _EXACT, "int4-weight-only": _EXACT}


def status() -> Status:
    if find_spec("onnxruntime") is None:
        return Status(False, "onnxruntime is not installed", 'pip install "accel-diffusion[cpu]" (or [cuda])')
    import onnxruntime

    names = list(filter(gpu.listed, PROVIDERS))
    states = "".join(f"; provider {state}" for name in plugins.PACKAGED if (state := plugins.state(name)))
    return Status(True, f"onnxruntime {onnxruntime.__version__} ({', '.join(names)}){states}")


def attempt() -> str:
    """A small product on every provider that this build lists, which may still lack its libraries."""
    import onnxruntime as ort

    found = []
    for name in filter(gpu.listed, PROVIDERS):
        trouble = gpu.trouble(name)
        found.append(name if trouble is None else f"{name} does not run: {trouble[0]} ({trouble[1]})")
    for name in plugins.PACKAGED:
        if plugins.state(name):
            try:
                plugin, options = plugins.named(name), ort.SessionOptions()
                device = plugins.devices(plugin)[0]
                options.log_severity_level = 4
                options.add_provider_for_devices([device], {})
                session = ort.InferenceSession(gpu.PRODUCT, options)
                session.run(None, {"x": np.ones((2, 2), np.float32)})
                found.append(name if device.ep_name in session.get_providers() else f"{name} does not load")
            except UserError as error:
                found.append(f"{name} does not run: {error.message.partition(': ')[2] or error.message}")
    return ", ".join(found)


class OnnxRuntime(Engine):
    """The component's ONNX graph on ONNX Runtime.

    Args:
        provider: "auto" (cuda where present, else cpu), "cpu", "cuda", "tensorrt"; or a plugin provider:
            "tensorrt-rtx" (NVIDIA's package), or "NAME=PATH" of any library of providers. `auto` takes no plugin.
        device: "auto", "cpu", "cuda", "cuda:1", ...; for a plugin also "gpu" and "npu".
        threads: CPU threads; 0 lets ONNX Runtime choose.
        io_binding: bind torch tensors by address instead of passing numpy arrays; None turns it on for CUDA and
            TensorRT when torch is installed. Plugin providers take numpy arrays. Outputs are always
            fresh tensors: an output bound over an input would overwrite the latents that the sampler still needs.
        folds: make one operator of upsampling and the convolution after it, where that is faster (`folds`).
        cache: on a CPU, keep the optimized graph of a large network in accel's cache, for the next load.
        session: further session config entries.
        provider_options: options of the provider by ONNX Runtime's names, over ours (see `accel.providers`).
        weights: as `set_weights` takes them.
    """

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        *,
        provider: str = "auto",
        device: str = "auto",
        threads: int = 0,
        io_binding: bool | None = None,
        folds: bool = True,
        cache: bool = True,
        session: Mapping[str, str] | None = None,
        provider_options: Mapping[str, Any] | None = None,
        weights: Mapping[str, np.ndarray] | None = None,
    ):
        super().__init__(bundle, component)
        check_threads(threads)
        try:
            import onnxruntime as ort
        except ImportError:
            raise MissingPackage("onnxruntime", "the onnxruntime engine", "cpu") from None
        if any(key.startswith("ep.context") for key in session or ()):
            raise UserError(*NO_EP_CONTEXT)
        route = find(provider, device, bundle, component, provider_options)
        if route.plugin and io_binding:
            raise UserError(f"provider {route.name} takes no io_binding: its tensors are numpy arrays", "leave it out")
        if component.format == "int8" and route.name == "cpu":
            note_saturation()
        self.place = route.place
        on_gpu = route.place.startswith("cuda")
        self.binding = (on_gpu and find_spec("torch") is not None) if io_binding is None else io_binding
        self.native = "torch" if self.binding else "numpy"
        self.cuda = Cuda(index_of(route.place) or 0) if on_gpu and self.binding else None
        self.device = self.cuda.device if self.cuda else route.place if on_gpu else "cpu"  # where its tensors are
        if self.cuda:
            self.stream, self._turn = self.cuda.stream(), threading.Lock()
            route = route.on_stream(self.cuda.handle(self.stream))
        self._open = partial(self._session, bundle, route, threads, folds, cache, session or {})
        self.set_weights(weights or {})
        where = f" on {route.place}" if route.plugin else ""
        self.description = f"onnxruntime {ort.__version__}, {route.name}{where}" + (
            f", {component.format}" if component.int8 else ""
        )

    def _session(
        self,
        bundle: Bundle,
        route: Route,
        threads: int,
        folds: bool,
        cache: bool,
        entries: Mapping[str, str],
        weights: Mapping[str, np.ndarray],
    ) -> tuple[Any, list[Any]]:
        """A session with these weights instead of the graph's own, and what it needs to be held for them."""
        import onnxruntime as ort

        settings = {**ENTRIES.get(self.component.format, {}), **entries}
        on_cpu = route.name == "cpu"
        own = "onnxruntime" if on_cpu else ""
        model = graph(bundle, self.component, own)
        stored = bundle.file(self.component.weights)
        held: dict[str, Any] = {}
        if weights:
            route = route.without_caches()

        def options() -> Any:
            made = ort.SessionOptions()
            made.log_severity_level = 3
            made.intra_op_num_threads = threads
            for key, value in settings.items():
                made.add_session_config_entry(key, value)
            return made

        def fresh() -> tuple[Any, Any]:
            made, source, used = options(), str(bundle.file(self.component.graph_for(own))), deepcopy(model)
            if folds and on_cpu and in_onnx.fold(used, partial(float32_values, model, stored, instead=weights)):
                made.add_session_config_entry(_WEIGHTS_IN, str(stored.parent))
                source = used.SerializeToString()
            for name in weights.keys() & {tensor.name for tensor in used.graph.initializer}:
                held[name] = ort.OrtValue.ortvalue_from_numpy(np.require(weights[name], requirements="CA"))
            if held:  # `add_initializer` is ignored where a tensor's data lies in a file beside the graph
                made.add_external_initializers(list(held), list(held.values()))
            return source, made

        place = None
        if cache and on_cpu and not weights:
            place = optimized.place(bundle, self.component, model, settings | {"folds": folds and in_onnx.VERSION})
        start = partial(route.open, disabled_optimizers=OFF.get(self.component.format))
        try:
            session = optimized.opened(place, stored.stat().st_size, start, fresh, options)
        except Exception as error:
            raise UserError(
                f"ONNX Runtime cannot load {self.component.graph} on {route.name}: {plugins.cause(error)}",
                "--provider cpu, or another engine"
                if route.plugin
                else "export the model again, or try another engine",
            ) from None
        route.check(session, self.component)
        return session, list(held.values())

    def set_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.session, self._held = self._open(tensors)
        self._bindings = Bindings(self.session, self.device, queued=self.cuda is not None)
        self.epoch += 1

    def array(self, value: Any) -> Any:
        return to_torch(value, self.device) if self.binding else super().array(value)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if self.binding:
            return self._run_bound(feeds)
        names = [spec.name for spec in self.component.outputs]
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))

    def _run_bound(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        sizes = self.sizes(feeds)
        if self.cuda is None:
            return self._run_on(feeds, lambda spec: _empty(spec, sizes, self.device))
        cuda = self.cuda
        # Queued behind what the caller has queued, and before what the caller queues next: nobody waits. One thread at
        # a time, because all runs of the session share its stream.
        with self._turn, cuda.active():
            outputs = {s.name: cuda.empty(s.concrete(sizes), s.dtype) for s in self.component.outputs}
            with cuda.on(self.stream):
                return self._run_on(feeds, lambda spec: outputs[spec.name])

    def _run_on(self, feeds: Mapping[str, Any], output: Callable[[TensorSpec], Any]) -> dict[str, Any]:
        held = {name: value.contiguous() for name, value in feeds.items()}
        outputs = {spec.name: output(spec) for spec in self.component.outputs}
        self._bindings.run(held, outputs)
        return outputs

    @property
    def runs_on(self) -> str:
        return self.place.partition(":")[0]

    def release(self) -> None:
        del self.session, self._held, self._open, self._bindings


def _empty(spec: TensorSpec, sizes: Mapping[str, int], device: str) -> Any:
    import torch

    return torch.empty(spec.concrete(sizes), dtype=torch_dtype(spec.dtype), device=device)


def load(bundle: Bundle, component: Component, **options: Any) -> OnnxRuntime:
    return OnnxRuntime(bundle, component, **options)
