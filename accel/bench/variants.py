"""A variant is an engine, a dtype to compute in and a device, written `openvino:bf16` or `onnxruntime:cuda`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ..bundle import Bundle
from ..engines import ENGINES, load_engine, status
from ..errors import UserError
from ..machine import machine
from ..pipeline import Pipeline, component_names

DTYPES = MappingProxyType({"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"})

# What a suffix may say, per engine, and the option of `load_engine` that a device suffix becomes. ONNX Runtime computes
# in the dtypes of the graph, so it has no dtype to choose.
_DTYPES = MappingProxyType({"eager": tuple(DTYPES), "compile": tuple(DTYPES), "openvino": tuple(DTYPES)})
_DEVICES: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "eager": ("device", {"cpu": "cpu", "cuda": "cuda"}),
        "compile": ("device", {"cpu": "cpu", "cuda": "cuda"}),
        "openvino": ("device", {"cpu": "CPU", "gpu": "GPU"}),
        "onnxruntime": ("provider", {"cpu": "cpu", "cuda": "cuda", "tensorrt": "tensorrt"}),
        "tensorrt": ("cuda_graph", {"step": "step", "loop": "loop"}),
    }
)
_DEFAULT = ("eager", "eager:bf16", "compile", "compile:bf16", "onnxruntime", "openvino", "openvino:bf16")
_DEFAULT_GPU = ("eager:fp16", "compile:fp16", "tensorrt", "tensorrt:step")
# What each engine imports before any model is loaded, to tell the model's memory from the libraries'. diffusers and
# transformers load lazily, so the modules of the networks are named.
_TORCH = (
    "torch",
    "accelerate",
    "accel.models.networks",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "transformers.models.clip.modeling_clip",
)
LIBRARIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "eager": _TORCH,
        "compile": _TORCH,
        "onnxruntime": ("onnx", "onnxruntime"),
        "openvino": ("onnx", "openvino"),
        "tensorrt": ("torch", "tensorrt"),
    }
)
_LOW_PRECISION_ISA = MappingProxyType(
    {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "asimdhp")}
)


@dataclass(frozen=True)
class Variant:
    """One way of running the bundle.

    Attributes:
        engine: a name out of `accel.engines.ENGINES`.
        dtype: "fp32", "bf16" or "fp16"; "" for an engine that computes in the bundle's own dtypes.
        device: suffix that names the device, the provider, or what is captured as a CUDA graph; "" for the engine's own
            choice.
        asked: whether the user named it, so that not being able to run it is a failure.
    """

    engine: str
    dtype: str = ""
    device: str = ""
    asked: bool = True

    @property
    def name(self) -> str:
        """As it is written, with fp32 left out."""
        parts = (self.engine, self.dtype if self.dtype != "fp32" else "", self.device)
        return ":".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, str]:
        """Options for `load_engine`."""
        options = {"dtype": self.dtype} if self.dtype else {}
        if self.device:
            option, values = _DEVICES[self.engine]
            options[option] = values[self.device]
        return options

    def compute(self, stored: str) -> str:
        """Numpy-style name of the dtype it computes in, for weights stored as `stored`."""
        return DTYPES.get(self.dtype, stored)


def parse(text: str, *, asked: bool = True) -> Variant:
    """A variant from `engine[:dtype][:device]`.

    Raises:
        UserError: for an unknown engine, or a suffix that the engine does not take.
    """
    engine, *suffixes = text.strip().split(":")
    if engine not in ENGINES:
        raise UserError(f"unknown engine {engine!r} in {text!r}", f"one of: {', '.join(sorted(ENGINES))}")
    dtypes, devices = _DTYPES.get(engine, ()), _DEVICES.get(engine, ("", {}))[1]
    dtype, device = "fp32" if dtypes else "", ""
    for suffix in suffixes:
        if suffix in dtypes:
            dtype = suffix
        elif suffix in devices:
            device = suffix
        else:
            choices = [f"{engine}:{value}" for value in (*dtypes, *devices)]
            raise UserError(f"{engine} has no variant {suffix!r}", f"one of: {', '.join([engine, *choices])}")
    return Variant(engine, dtype, device, asked)


def chosen(text: str | None) -> list[Variant]:
    """The variants of `--engines`, or the default set.

    Raises:
        UserError: for an unknown or repeated name, or an engine that cannot run here, when it was named.
    """
    if text is None:
        return [parse(name, asked=False) for name in (*_DEFAULT, *(_DEFAULT_GPU if _has_gpu() else ()))]
    variants = [parse(part) for part in text.split(",") if part.strip()]
    if not variants:
        raise UserError("no engine was named", "for example --engines eager,openvino:bf16")
    names = [variant.name for variant in variants]
    for variant in variants:
        if names.count(variant.name) > 1:
            raise UserError(f"{variant.name} is named twice", "name every variant once")
        state = status(variant.engine)
        if not state.ok:
            raise UserError(f"the {variant.engine} engine cannot run here: {state.detail}", state.fix)
    return variants


def unable(variant: Variant) -> str:
    """Why a variant of the default set is not worth trying here; empty if it is."""
    state = status(variant.engine)
    if not state.ok:
        return state.detail
    # Without the instructions the CPU emulates the dtype, which nobody deploys; it still runs when asked for.
    isa = _LOW_PRECISION_ISA.get(variant.dtype)
    if isa and not variant.asked and not _has_gpu() and not set(isa) & set(machine().isa):
        return f"this CPU has no {variant.dtype} instructions ({', '.join(isa)})"
    return ""


def load(bundle: Bundle, variant: Variant, **options: Any) -> Pipeline:
    """The whole pipeline on one variant; the files are taken as verified.

    Raises:
        UserError: when the engine cannot load it.
    """
    names = component_names(bundle)
    engines = {
        name: load_engine(bundle, name, variant.engine, verify=False, **variant.options, **options) for name in names
    }
    return Pipeline(bundle, engines)


def _has_gpu() -> bool:
    if not status("eager").ok:
        return False
    import torch

    return torch.cuda.is_available()
