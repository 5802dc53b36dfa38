"""torch, operator by operator: the reference that everything else is measured against."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

from .. import attention as attention_table
from ..bundle import Bundle, Component
from ..dtypes import SHORT, check_dtype, torch_dtype
from ..errors import UserError
from ..machine import version_of
from ..trt.cuda import Cuda, index_of
from ..trt.cuda_graphs import Captures, Graph, replay
from ..trt.tf32 import float32_in_tf32
from . import offloading, torch_graphs
from .base import Engine, Facts, Status, check_device, to_torch
from .torch_graphs import CUDA_GRAPHS

LAYOUTS = ("nchw", "nhwc")
# Kinds of components whose attention layers a kernel of the table can compute: their heads are narrow.
_ATTENDING = ("unet", "controlnet")

FACTS = Facts(
    dtypes=tuple(SHORT),
    devices={
        "cpu": {"device": "cpu"},
        "cuda": {"device": "cuda"},
        **{mode: {"cuda_graph": mode} for mode in CUDA_GRAPHS[1:]},
        "nhwc": {"layout": "nhwc"},
    },
    # diffusers and transformers load lazily, so the modules of the networks are named.
    libraries=(
        "torch",
        "accelerate",
        "accel.models.networks",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.models.autoencoders.autoencoder_kl",
        "transformers.models.clip.modeling_clip",
    ),
    options=("device", "dtype", "attention", "tf32", "cuda_graph", "offload", "layout"),
    reads_graph=False,
    auto=("cpu", "cuda"),
    variants=("", "bf16"),
    gpu_variants=("fp16", "fp16:loop"),
)


def status() -> Status:
    missing = [name for name in ("torch", "diffusers", "transformers") if find_spec(name) is None]
    if missing:
        return Status(False, f"{', '.join(missing)} not installed", f"pip install {' '.join(missing)}")
    return Status(True, f"torch {version_of('torch')}")


def attempt() -> str:
    """A small product on the CPU, and on the GPU where torch sees one."""
    import torch

    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for device in devices:
        x = torch.ones(2, 2, device=device)
        (x @ x).cpu()
    return ", ".join(devices)


class Eager(Engine):
    """The component as a torch module, on the weights of the bundle.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: dtype to compute in: "auto" (as stored), "fp32", "bf16" or "fp16". Inputs and outputs keep the dtypes of
            the manifest.
        attention: the kernel of the UNet's and the ControlNets' attention layers (`accel.attention.NAMES`); "auto" is
            torch's own choice.
        tf32: let float32 products and convolutions compute in TF32 (10-bit mantissa) on a GPU. Off: this engine is the
            reference, and cuDNN's default is on.
        cuda_graph: "step" replays a captured CUDA graph for each shape instead of launching kernels one by one; "loop"
            lets a pipeline capture all steps of its sampler at once; "off" (default) captures nothing.
        offload: keep weights in host memory. "model" copies them to the GPU at the first call, until `rest`;
            "sequential" layer by layer, for the time of the layer's call. On the CPU "model" changes nothing.
        layout: memory format of the convolutions' weights, and so of what they compute: "nchw" is torch's own, "nhwc"
            is `torch.channels_last`, which tensor cores read without turning images around first. Results agree
            within rounding; shapes stay as they are.
        weights: as `set_weights` takes them.
    """

    name = "eager"
    native = "torch"

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attention: str = "auto",
        tf32: bool = False,
        cuda_graph: str = "off",
        offload: str | None = None,
        layout: str = "nchw",
        weights: Mapping[str, Any] | None = None,
    ):
        super().__init__(bundle, component)
        import torch

        from ..models import networks
        from ..models.pipeline_bundle import PipelineBundle

        torch_graphs.check(cuda_graph)
        self.cuda_graph = cuda_graph if component.kind in torch_graphs.CAPTURED else "off"
        self._local = threading.local()
        offloading.check(offload)
        if layout not in LAYOUTS:
            raise UserError(f"unknown layout {layout!r}", f"one of: {', '.join(LAYOUTS)}")
        if offload and cuda_graph != "off":
            raise UserError("captured CUDA graphs hold their weights on the GPU", "leave --cuda-graph or --offload out")
        if cuda_graph != "off":
            device = self._device(device)
        elif device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        moves = self._moves(offload, device)
        if moves:
            self.cuda = Cuda(index_of(device) or 0)
            device = self.cuda.device
        check_device(device)
        check_dtype(dtype, ("auto", *FACTS.dtypes))
        if isinstance(bundle, PipelineBundle):
            module = bundle.module(component.name)
        else:
            module = networks.stored(bundle, component)
        compute = component.dtype if dtype == "auto" else SHORT[dtype]
        if dtype != "auto":
            module = module.to(torch_dtype(compute))
        if dtype == "auto" or compute != "float32":
            networks.keep_float32(module.model, component.float32, component.fp32_output)
        self._format = torch.channels_last if layout == "nhwc" else torch.contiguous_format
        if layout == "nhwc":
            module.to(memory_format=self._format)
        self.visiting = None
        if moves and offload:
            from .offloading.visiting import Visiting

            self.visiting = Visiting(module, self.cuda, offload)
        self.module = module if self.visiting else module.to(device)
        self.device = device
        self.dtype = torch_dtype(compute)
        self._math = partial(float32_in_tf32, tf32) if device.startswith("cuda") else nullcontext
        took = self._attend(attention, device, compute != "float32")
        self._own: dict[str, torch.Tensor] = {}
        self.set_weights(weights or {})
        note = f", {component.format} rounded in float (a reference, not fast)" if component.int8 else ""
        self.description = f"torch {torch.__version__}, {device}, {compute}{', tf32' if tf32 else ''}{took}{note}"
        self.description += f", {layout}" if layout != LAYOUTS[0] else ""
        self.description += f", CUDA graph of the {self.cuda_graph}" if self.cuda_graph != "off" else ""
        self.description += f", {offload} offload" if self.visiting else ""

    def _moves(self, offload: str | None, device: str) -> bool:
        """Whether there is a GPU that weights are kept away from."""
        if offload is None or index_of(device) is not None:
            return offload is not None
        if offload == "sequential":
            raise UserError(
                "sequential offload keeps weights away from a GPU, and this engine runs on the CPU",
                "--low-memory drops each network after its phase, on any device; or --device cuda",
            )
        return False

    def _device(self, device: str) -> str:
        """Where graphs can be captured."""
        index = index_of(device)
        if index is None:
            raise UserError(f"CUDA graphs are not captured on {device!r}", "--device cuda, or leave --cuda-graph out")
        self.cuda = Cuda(index)
        return self.cuda.device

    def _attend(self, name: str, device: str, half: bool) -> str:
        """Choose the attention kernel where the component has a choice; what it took, for people."""
        if self.component.kind not in _ATTENDING and name in attention_table.NAMES:
            return ""
        kernel = attention_table.check(name, device=device, half=half)
        if name != "auto":
            from ..attention.processor import set_attention

            set_attention(self.module.model, kernel)
        return f", attention {kernel}" if name != "auto" or device.startswith("cuda") else ""

    def set_weights(self, tensors: Mapping[str, Any]) -> None:
        self.epoch += 1
        self.rest()
        state = self.module.model.state_dict(keep_vars=True)
        for name, own in self._own.items():
            state[name].data = own
        self._own = {name: state[name].data for name in tensors}
        for name, value in tensors.items():
            place = "cpu" if self.visiting else self.device
            made = to_torch(value, place).to(state[name].dtype)
            state[name].data = made.contiguous(memory_format=self._format) if made.dim() == 4 else made

    def rest(self) -> bool:
        if self.visiting:
            self.visiting.leave()
        return self.visiting is not None

    def array(self, value: Any) -> Any:
        return to_torch(value, self.device)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        if self.cuda_graph != "off":
            return self._replayed(feeds)
        with torch.inference_mode(), self.visiting.computing() if self.visiting else nullcontext():
            return self.compute(feeds)

    def compute(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Queue the module's work; it waits for nothing."""
        cast = {s.name: self.dtype if s.is_activation else None for s in self.component.inputs}
        with self._math():
            outputs = self.module(**{k: v if cast[k] is None else v.to(cast[k]) for k, v in feeds.items()})
        return {
            spec.name: value.to(torch_dtype(spec.dtype))
            for spec, value in zip(self.component.outputs, outputs, strict=True)
        }

    @property
    def graphs(self) -> Captures:
        """The calling thread's captured graphs."""
        if not hasattr(self._local, "graphs"):
            self._local.graphs = Captures()
        return self._local.graphs

    def bound(self, sizes: Mapping[str, int]) -> torch_graphs.BoundModule:
        """The module on buffers of its own, of one shape."""
        return torch_graphs.BoundModule(self, sizes)

    def _replayed(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        sizes = self.sizes(feeds)
        with self.cuda.active():
            outputs = {s.name: self.cuda.empty(s.concrete(sizes), s.dtype) for s in self.component.outputs}

            def make() -> Graph:
                bound = self.bound(sizes)
                return Graph(bound, bound.enqueue)

            graph = self.graphs.get(tuple(sorted(sizes.items())), make)
            with self.cuda.on(graph.bound.workspace.stream):
                replay(graph, feeds, outputs)
        return outputs

    def release(self) -> None:
        self._local = threading.local()
        del self.module, self._own, self.visiting


def load(bundle: Bundle, component: Component, **options: Any) -> Engine:
    return Eager(bundle, component, **options)
