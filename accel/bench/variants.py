"""A variant is an engine, a dtype to compute in and a device, written `openvino:bf16` or `onnxruntime:cuda`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import psutil

from ..bundle import Bundle
from ..dtypes import SHORT
from ..engines import ENGINES, facts, load_engine, status
from ..engines.select import refused_by
from ..errors import UserError, unknown
from ..machine import machine
from ..pipeline import Pipeline, component_names

_LOW_PRECISION_ISA = MappingProxyType(
    {"bf16": ("avx512_bf16", "amx_bf16", "bf16"), "fp16": ("avx512_fp16", "amx_fp16", "asimdhp")}
)

_USED = 0.8  # share of the free memory that weights may take; activations and caches need the rest


@dataclass(frozen=True)
class Variant:
    """One way of running the bundle.

    Attributes:
        engine: a name out of `accel.engines.ENGINES`.
        dtype: "fp32", "bf16" or "fp16"; "" for an engine that computes in the bundle's own dtypes.
        device: suffixes that name the device, the provider, what is captured as a CUDA graph or how torch compiles,
            with colons between them; "" for the engine's own choice.
        threads: number of CPU threads; None for the engine's own choice.
        attention: kernel of the attention layers (`accel.attention.NAMES`), for engines that have a choice.
        requested: whether the user named it, so that not being able to run it is a failure.
    """

    engine: str
    dtype: str = ""
    device: str = ""
    requested: bool = True
    threads: int | None = None
    attention: str | None = None

    @property
    def name(self) -> str:
        """As it is written, with fp32 left out."""
        parts = (self.engine, self.dtype if self.dtype != "fp32" else "", self.device)
        return ":".join(part for part in parts if part)

    @property
    def options(self) -> dict[str, Any]:
        """Options for `load_engine`."""
        given = {"dtype": self.dtype} if self.dtype else {}
        if self.threads is not None and "threads" in facts(self.engine).options:
            given["threads"] = self.threads
        if self.attention is not None and "attention" in facts(self.engine).options:
            given["attention"] = self.attention
        for suffix in filter(None, self.device.split(":")):
            given |= facts(self.engine).devices[suffix]
        return given

    def compute(self, stored: str) -> str:
        """Numpy-style name of the dtype it computes in, for weights stored as `stored`."""
        return SHORT.get(self.dtype, stored)


def parse(text: str, *, requested: bool = True) -> Variant:
    """A variant from `engine[:dtype][:device]`.

    Raises:
        UserError: for an unknown engine, or a suffix that the engine does not take.
    """
    engine, *suffixes = text.strip().split(":")
    if engine not in ENGINES:
        raise unknown("engine", engine, reversed(ENGINES))
    dtypes, devices = facts(engine).dtypes, facts(engine).devices
    dtype, device, given = "fp32" if "fp32" in dtypes else "", [], set()
    for suffix in suffixes:
        if suffix in dtypes:
            dtype = suffix
        elif suffix in devices:
            if given & set(devices[suffix]):
                raise UserError(f"{text} says {', '.join(devices[suffix])} twice", f"leave {suffix} or the other out")
            device.append(suffix)
            given |= set(devices[suffix])
        else:
            choices = [f"{engine}:{value}" for value in (*dtypes, *devices)]
            raise unknown("variant", f"{engine}:{suffix}", [engine, *choices])
    return Variant(engine, dtype, ":".join(device), requested)


def chosen(text: str | None) -> list[Variant]:
    """The variants of `--engine`, or the default set.

    Raises:
        UserError: for an unknown or repeated name, or an engine that cannot run here, when it was named.
    """
    if text is None:
        return [parse(name, requested=False) for name in _default()]
    variants = [parse(part) for part in text.split(",") if part.strip()]
    if not variants:
        raise UserError("no engine was named", "for example --engine eager,openvino:bf16")
    names = [variant.name for variant in variants]
    for variant in variants:
        if names.count(variant.name) > 1:
            raise UserError(f"{variant.name} is named twice", "name every variant once")
        state = status(variant.engine)
        if not state.ok:
            raise UserError(f"the {variant.engine} engine cannot run here: {state.detail}", state.fix)
    return variants


def _default() -> list[str]:
    """The variants that the engines declare: first all for the CPU, then those for a GPU."""
    names = [(name, suffix) for name in reversed(ENGINES) for suffix in facts(name).variants]
    if _has_gpu():
        names += [(name, suffix) for name in reversed(ENGINES) for suffix in facts(name).gpu_variants]
    return [f"{name}:{suffix}".removesuffix(":") for name, suffix in names]


def unable(variant: Variant, bundle: Bundle) -> str:
    """Why a variant cannot run a bundle here, or one of the default set is not worth trying; empty if it is."""
    state = status(variant.engine)
    if not state.ok:
        return state.detail
    if facts(variant.engine).reads_graph and not bundle.component("unet").graph:
        name = bundle.manifest.source["name"]
        return f"{name} is a pipeline without graphs: accel export {name} BUNDLE makes them"
    if reason := refused_by(bundle, variant.engine):
        return reason
    # Without the instructions the CPU emulates the dtype, which nobody deploys; it still runs when it is named.
    isa = _LOW_PRECISION_ISA.get(variant.dtype)
    if isa and not variant.requested and not _has_gpu() and not set(isa) & set(machine().isa):
        return f"this CPU has no {variant.dtype} instructions ({', '.join(isa)})"
    return ""


def load(bundle: Bundle, variant: Variant, **options: Any) -> Pipeline:
    """The whole pipeline on one variant; the files are taken as verified.

    Raises:
        UserError: when the engine cannot load it.
    """
    names = component_names(bundle)
    # A graph that is kept would be written within the load, to a temporary folder, which may be main memory.
    options = ({"cache": False} if variant.engine == "onnxruntime" else {}) | options
    engines = {
        name: load_engine(bundle, name, variant.engine, verify=False, **variant.options, **options) for name in names
    }
    return Pipeline(bundle, engines, text_cache=0)  # every image pays for its prompt


def _has_gpu() -> bool:
    if not status("eager").ok:
        return False
    import torch

    return torch.cuda.is_available()


def fit_together(variants: Sequence[Variant], bundle: Bundle) -> bool:
    """Whether the weights of all fit beside each other into what is free on the GPU, or in main memory."""
    needed = sum(weight_bytes(variant, bundle) for variant in variants)
    return len(variants) < 2 or needed <= _USED * free_bytes()


def weight_bytes(variant: Variant, bundle: Bundle) -> int:
    """Bytes of a variant's weights, by the number of parameters and the dtype it computes in."""
    records = [bundle.component(name) for name in component_names(bundle)]
    return sum((r.parameters or 0) * (4 if variant.compute(r.dtype) == "float32" else 2) for r in records)


def free_bytes() -> int:
    """Free bytes of the GPU that torch would use, else of main memory."""
    if _has_gpu():
        import torch

        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
