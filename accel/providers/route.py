"""What a session of ONNX Runtime runs on: a provider that is built in, with those behind it, or a plugin's device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..bundle import Bundle, Component
from ..errors import Notice, UserError, unknown
from ..trt.cuda import index_of
from . import gpu, plugins, tensorrt_rtx
from .built_in import PROVIDERS, chain

NAMES = (*PROVIDERS, *plugins.PACKAGED)
# What only saves compiling again, and knows an engine by its graph alone: off for other weights than the bundle's.
_OFF: Mapping[str, Any] = MappingProxyType({"trt_engine_cache_enable": False, "nv_runtime_cache_path": ""})
NO_EP_CONTEXT = (
    "accel neither makes nor loads EPContext models: they are compiled code that nobody has signed",
    "engine files are signed, and are made without a GPU: accel build BUNDLE --engine tensorrt-rtx",
)
_STREAM = "user_compute_stream"
_RECORD = "session.record_ep_graph_assignment_info"


@dataclass(frozen=True)
class Route:
    """What a session is given to run on.

    Attributes:
        name: what `--provider` calls it.
        provider: ONNX Runtime's name of the provider that has to run.
        place: where it runs, as accel names devices: "cpu", "cuda:0", or the kind of a plugin's device.
        chain: built-in providers with their options, the chosen one first; empty for a plugin.
        device: the plugin's device (`OrtEpDevice`).
        options: the plugin's options.
    """

    name: str
    provider: str
    place: str
    chain: tuple[Any, ...] = ()
    device: Any = None
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def plugin(self) -> bool:
        return self.device is not None

    def open(self, file: str, session_options: Any, **more: Any) -> Any:
        """A session on this route.

        ONNX Runtime's Python part would go on with another provider where one fails, with a few lines on stdout; it is
        told not to. Operators that the provider does not take still run on the CPU: see `check`.
        """
        import onnxruntime as ort

        if not self.plugin:
            return ort.InferenceSession(file, session_options, providers=list(self.chain), enable_fallback=0, **more)
        session_options.add_session_config_entry(_RECORD, "1")
        session_options.add_provider_for_devices([self.device], dict(self.options))
        return ort.InferenceSession(file, session_options, enable_fallback=0, **more)

    def without_caches(self) -> Route:
        """The same route for other weights than the bundle's: what was compiled is found again by its graph alone."""
        links = tuple(
            link if isinstance(link, str) else (link[0], {k: _OFF.get(k, v) for k, v in link[1].items()})
            for link in self.chain
        )
        return replace(self, chain=links, options={k: v for k, v in self.options.items() if k not in _OFF})

    def on_stream(self, handle: int) -> Route:
        """The same route with its work on a stream that the caller has made, unless its options name one.

        Args:
            handle: the stream's address (`cudaStream_t`).
        """
        names = {PROVIDERS["cuda"], PROVIDERS["tensorrt"]}
        links = tuple(
            (link[0], {_STREAM: str(handle)} | link[1]) if not isinstance(link, str) and link[0] in names else link
            for link in self.chain
        )
        return replace(self, chain=links)

    def check(self, session: Any, component: Component) -> None:
        """Make sure that the provider runs the graph, and say what it left to the CPU.

        Raises:
            UserError: when another provider runs all of it.
        """
        if self.provider not in session.get_providers():
            raise UserError(
                f"ONNX Runtime fell back from {self.name} to {', '.join(session.get_providers())}",
                "check that the CUDA / TensorRT libraries match this onnxruntime-gpu, or use --provider cpu",
            )
        if not self.plugin or not hasattr(session, "get_provider_graph_assignment_info"):
            return
        nodes = [
            (part.ep_name, node) for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()
        ]
        others = Counter(node.op_type for name, node in nodes if name != self.provider)
        if not nodes or others.total() == len(nodes):
            raise UserError(
                f"provider {self.name} takes no operator of {component.name}: the CPU would run all of it",
                "--provider cpu, or see what the provider supports",
            )
        if others:
            kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
            warnings.warn(
                f"provider {self.name} takes {len(nodes) - others.total()} of {len(nodes)} operators of "
                f"{component.name}; the CPU runs the others: {kinds}",
                Notice,
                stacklevel=5,
            )


def find(
    provider: str, device: str, bundle: Bundle, component: Component, own: Mapping[str, Any] | None = None
) -> Route:
    """The route that `--provider` and `--device` mean.

    Args:
        provider: "auto" (cuda where present, else cpu), a name of `NAMES`, or a plugin's `NAME=PATH`.
        device: "auto", "cpu", "cuda", "cuda:1", ...; for a plugin also "gpu" and "npu".
        own: options of the provider by ONNX Runtime's names, over ours.

    Raises:
        UserError: for a provider or device that is not here, or that does not run such a component.
    """
    if any("ep_context" in key for key in own or ()):
        raise UserError(*NO_EP_CONTEXT)
    if plugin := plugins.named(provider):
        chosen = plugins.pick(plugin, plugins.devices(plugin), device)
        ours = tensorrt_rtx.options(bundle, component) if plugin.name == tensorrt_rtx.RTX.engine else {}
        options = {key: str(value) for key, value in (ours | dict(own or {})).items()}
        kind = chosen.device.type.name.lower()
        return Route(plugin.name, chosen.ep_name, kind, device=chosen, options=options)
    return _built_in(provider, device, bundle, component, own)


def _built_in(provider: str, device: str, bundle: Bundle, component: Component, own: Mapping[str, Any] | None) -> Route:
    import onnxruntime as ort

    available, index = ort.get_available_providers(), index_of(device)
    if index is None and device != "cpu":
        raise UserError(f"unknown device {device!r}", "--device cpu, cuda or cuda:1")
    if provider != "auto" and device != "auto" and (provider == "cpu") != (device == "cpu"):
        raise UserError(f"the {provider} provider does not run on {device}", "leave out --device or --provider")
    form = component.format if component.format in ("int8", "fp8") else ""  # of weights alone it runs
    slow = f"ONNX Runtime's CUDA provider does not run {form} graphs in {form}: {component.name} would be slower than "
    if provider == "auto":
        on_gpu = device.startswith("cuda") or index is not None and usable_cuda()
        provider = "cuda" if on_gpu and (device != "auto" or not form) else "cpu"
        if on_gpu and provider == "cpu":
            warnings.warn(
                f"{slow}float16, so it runs on the CPU: `accel build` makes TensorRT engine files for the GPU",
                Notice,
                stacklevel=5,
            )
    if provider == "cuda" and form:
        raise UserError(f"{slow}float16", "--provider cpu, --provider tensorrt, or export with --precision fp16")
    if provider not in PROVIDERS:
        raise unknown("provider", provider, ["auto", *NAMES, "NAME=PATH"])
    if PROVIDERS[provider] not in available:
        raise UserError(
            f"this onnxruntime has no {provider} provider (it has {', '.join(available)})",
            'pip uninstall onnxruntime; pip install "accel-diffusion[cuda]"',
        )
    if provider != "cpu" and (trouble := gpu.trouble(provider, index or 0)):
        raise UserError(f"ONNX Runtime's {provider} provider does not run here: {trouble[0]}", trouble[1])
    place = "cpu" if provider == "cpu" else f"cuda:{index or 0}"
    return Route(provider, PROVIDERS[provider], place, tuple(chain(provider, index or 0, bundle, component, own)))


def usable_cuda() -> bool:
    """Whether `auto` may take ONNX Runtime's CUDA provider; says why not where this build has one that does not run."""
    if not gpu.listed("cuda"):
        return False
    if trouble := gpu.trouble("cuda"):
        text = f"ONNX Runtime's CUDA provider does not run here, so it is left out: {trouble[0]}. {trouble[1]}"
        warnings.warn(text, Notice, stacklevel=6)
    return trouble is None
