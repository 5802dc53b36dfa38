"""torch, operator by operator: the reference that everything else is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from ..bundle import Bundle, Component
from ..dtypes import SHORT, check_dtype, torch_dtype
from ..machine import version_of
from .base import Engine, Facts, Status, check_device, to_torch

FACTS = Facts(
    dtypes=tuple(SHORT),
    devices={"cpu": {"device": "cpu"}, "cuda": {"device": "cuda"}},
    # diffusers and transformers load lazily, so the modules of the networks are named.
    libraries=(
        "torch",
        "accelerate",
        "accel.models.networks",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.models.autoencoders.autoencoder_kl",
        "transformers.models.clip.modeling_clip",
    ),
    options=("device", "dtype"),
    reads_graph=False,
    auto=("cpu", "cuda"),
    variants=("", "bf16"),
    gpu_variants=("fp16",),
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
        weights: Mapping[str, Any] | None = None,
    ):
        super().__init__(bundle, component)
        import torch

        from ..models import networks
        from ..models.pipeline_bundle import PipelineBundle

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(device)
        check_dtype(dtype, ("auto", *FACTS.dtypes))
        if isinstance(bundle, PipelineBundle):
            module = bundle.module(component.name)
        else:
            module = networks.rebuild(
                component.kind,
                bundle.file(f"{component.folder}/config.json"),
                bundle.file(component.weights),
                component.inputs,
                component.outputs,
                component.int8.get("layers"),
            )
        compute = component.dtype if dtype == "auto" else SHORT[dtype]
        if dtype != "auto":
            module = module.to(torch_dtype(compute))
        if dtype == "auto" or compute != "float32":
            networks.keep_float32(module.model, component.float32, component.fp32_output)
        self.module = module.to(device)
        self.device = device
        self.compute = torch_dtype(compute)
        self._own: dict[str, torch.Tensor] = {}
        self.set_weights(weights or {})
        note = ", int8 rounded in float (a reference, not fast)" if component.int8 else ""
        self.description = f"torch {torch.__version__}, {device}, {compute}{note}"

    def set_weights(self, tensors: Mapping[str, Any]) -> None:
        state = self.module.model.state_dict(keep_vars=True)
        for name, own in self._own.items():
            state[name].data = own
        self._own = {name: state[name].data for name in tensors}
        for name, value in tensors.items():
            state[name].data = to_torch(value, self.device).to(state[name].dtype)

    def array(self, value: Any) -> Any:
        return to_torch(value, self.device)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        compute = {s.name: self.compute if s.is_activation else None for s in self.component.inputs}
        with torch.inference_mode():
            outputs = self.module(**{k: v if compute[k] is None else v.to(compute[k]) for k, v in feeds.items()})
        return {
            spec.name: value.to(torch_dtype(spec.dtype))
            for spec, value in zip(self.component.outputs, outputs, strict=True)
        }

    def release(self) -> None:
        del self.module, self._own


def load(bundle: Bundle, component: Component, **options: Any) -> Engine:
    return Eager(bundle, component, **options)
