"""ONNX Runtime: CPU everywhere; CUDA and TensorRT providers where onnxruntime-gpu is installed.

Needs neither torch nor diffusers. With a GPU provider and torch present, tensors stay on the GPU between calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..bundle import Bundle, Component
from ..bundle.graph_file import graph
from ..dtypes import torch_dtype
from ..errors import MissingPackage, Notice, UserError, unknown
from ..trt.cuda import index_of
from .base import Engine, Facts, Status, check_threads, graph_file, note_saturation, to_torch
from .onnxruntime_providers import PROVIDERS, chain, without_engine_cache

FACTS = Facts(
    devices={name: {"provider": name} for name in PROVIDERS},
    libraries=("onnx", "onnxruntime"),
    options=("device", "provider", "threads"),
    int8=True,
)
# Off for int8: it would turn a product and its bias into a float one before int8 is looked at (static shapes).
OFF_FOR_INT8 = ["MatMulAddFusion"]


def status() -> Status:
    if find_spec("onnxruntime") is None:
        return Status(False, "onnxruntime is not installed", 'pip install "accel-diffusion[cpu]" (or [cuda])')
    import onnxruntime

    names = [name for name, provider in PROVIDERS.items() if provider in onnxruntime.get_available_providers()]
    return Status(True, f"onnxruntime {onnxruntime.__version__} ({', '.join(names)})")


def attempt() -> str:
    """A small product on every provider that this build lists, which may still lack its libraries."""
    import onnxruntime as ort

    from .attempt import product_graph

    found = []
    for name, provider in PROVIDERS.items():
        if provider not in ort.get_available_providers():
            continue
        options = ort.SessionOptions()
        options.log_severity_level = 4
        session = ort.InferenceSession(product_graph(), options, providers=[provider])
        session.run(None, {"x": np.ones((2, 2), np.float32)})
        ran = provider in session.get_providers()
        found.append(
            name if ran else f"{name} does not load (its CUDA or TensorRT libraries are missing or do not fit)"
        )
    return ", ".join(found)


class OnnxRuntime(Engine):
    """The component's ONNX graph on ONNX Runtime.

    Args:
        provider: "auto" (cuda where present, else cpu), "cpu", "cuda" or "tensorrt".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        threads: CPU threads; 0 lets ONNX Runtime choose.
        io_binding: bind torch tensors by address instead of passing numpy arrays; None turns it on for GPU providers
            when torch is installed. Outputs are always fresh tensors: an output bound over an input would overwrite
            the latents that the sampler still needs.
        session: further session config entries.
        provider_options: options of the GPU provider by ONNX Runtime's names, over ours (see
            `onnxruntime_providers`).
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
        available = ort.get_available_providers()
        index = index_of(device)
        if index is None and device != "cpu":
            raise UserError(f"unknown device {device!r}", "--device cpu, cuda or cuda:1")
        if provider != "auto" and device != "auto" and (provider == "cpu") != (device == "cpu"):
            raise UserError(f"the {provider} provider does not run on {device}", "leave out --device or --provider")
        slow = f"ONNX Runtime's CUDA provider does not run int8 graphs in int8: {component.name} would be slower than "
        if provider == "auto":
            gpu = device.startswith("cuda") or index is not None and PROVIDERS["cuda"] in available
            provider = "cuda" if gpu and (device != "auto" or not component.int8) else "cpu"
            if gpu and provider == "cpu":
                warnings.warn(
                    f"{slow}float16, so it runs on the CPU: `accel build` makes TensorRT engine files for the GPU",
                    Notice,
                    stacklevel=3,
                )
        if provider == "cuda" and component.int8:
            raise UserError(f"{slow}float16", "--provider cpu, --provider tensorrt, or export with --precision fp16")
        if provider not in PROVIDERS:
            raise unknown("provider", provider, ["auto", *PROVIDERS])
        if PROVIDERS[provider] not in available:
            raise UserError(
                f"this onnxruntime has no {provider} provider (it has {', '.join(available)})",
                "pip uninstall onnxruntime; pip install onnxruntime-gpu",
            )
        if component.int8 and provider == "cpu":
            note_saturation()
        self._open = partial(
            self._session,
            bundle,
            provider,
            threads,
            session or {},
            chain(provider, index or 0, bundle, component, provider_options),
        )
        self.set_weights(weights or {})
        self.on_gpu = provider != "cpu"
        self.binding = (self.on_gpu and find_spec("torch") is not None) if io_binding is None else io_binding
        self.native = "torch" if self.binding else "numpy"
        self.device_id = index or 0
        self.device = f"cuda:{self.device_id}" if self.on_gpu else "cpu"
        self.description = f"onnxruntime {ort.__version__}, {provider}" + (", int8" if component.int8 else "")

    def _session(
        self,
        bundle: Bundle,
        provider: str,
        threads: int,
        entries: Mapping[str, str],
        providers: Sequence[Any],
        weights: Mapping[str, np.ndarray],
    ) -> tuple[Any, list[Any]]:
        """A session with these weights instead of the graph's own, and what it needs to be held for them."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        own = "onnxruntime" if provider == "cpu" else ""
        file = graph_file(bundle, self.component, own)
        held = {}
        if weights:
            known = {tensor.name for tensor in graph(bundle, self.component, own).graph.initializer}
            held = {
                name: ort.OrtValue.ortvalue_from_numpy(np.require(value, requirements="CA"))
                for name, value in weights.items()
                if name in known
            }
            # `add_initializer` is ignored where a tensor's data lies in a file beside the graph.
            options.add_external_initializers(list(held), list(held.values()))
            providers = without_engine_cache(providers)
        try:
            session = ort.InferenceSession(
                str(file),
                options,
                providers=providers,
                disabled_optimizers=OFF_FOR_INT8 if self.component.int8 else None,
            )
        except Exception as error:
            raise UserError(
                f"ONNX Runtime cannot load {self.component.graph}: {str(error).splitlines()[0][:300]}",
                "export the model again, or try another engine",
            ) from None
        if PROVIDERS[provider] not in session.get_providers():
            raise UserError(
                f"ONNX Runtime fell back from {provider} to {', '.join(session.get_providers())}",
                "check that the CUDA / TensorRT libraries match this onnxruntime-gpu, or use --provider cpu",
            )
        return session, list(held.values())

    def set_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        self.session, self._held = self._open(tensors)

    def array(self, value: Any) -> Any:
        return to_torch(value, self.device) if self.binding else super().array(value)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if self.binding:
            return self._run_bound(feeds)
        names = [spec.name for spec in self.component.outputs]
        return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))

    def _run_bound(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        device = "cuda" if self.on_gpu else "cpu"
        sizes = self.sizes(feeds)
        binding = self.session.io_binding()
        held = {name: value.contiguous() for name, value in feeds.items()}
        for spec in self.component.inputs:
            tensor = held[spec.name]
            binding.bind_input(
                spec.name, device, self.device_id, np.dtype(spec.dtype), tuple(tensor.shape), tensor.data_ptr()
            )
        outputs = {}
        for spec in self.component.outputs:
            tensor = torch.empty(spec.concrete(sizes), dtype=torch_dtype(spec.dtype), device=self.device)
            binding.bind_output(
                spec.name, device, self.device_id, np.dtype(spec.dtype), tuple(tensor.shape), tensor.data_ptr()
            )
            outputs[spec.name] = tensor
        if self.on_gpu:
            torch.cuda.current_stream(self.device).synchronize()
        self.session.run_with_iobinding(binding)
        return outputs

    def release(self) -> None:
        del self.session, self._held, self._open


def load(bundle: Bundle, component: Component, **options: Any) -> OnnxRuntime:
    return OnnxRuntime(bundle, component, **options)
