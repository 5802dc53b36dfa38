"""Runs a `.pt2` package of AOTInductor: torch alone, without diffusers, transformers or any code of the model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...bundle import Bundle, Component
from ...dtypes import SHORT, check_dtype, torch_dtype
from ...errors import UserError
from ...trt import preflight
from ...trt.engine_files import EngineFile, rebuild
from ..base import Engine, to_torch
from ..select import computing_in
from .place import Here, here

_WEIGHTS = "model."  # what the names of weights begin with in the package; without it they are the safetensors file's


class AOTInductor(Engine):
    """A component's engine file on AOTInductor (torch._inductor.aoti_load_package).

    Any number of threads may call one engine; torch lets them take turns.

    Args:
        device: "auto" (a GPU where an engine file for it fits, else the CPU), "cpu", "cuda", "cuda:1", ...
        engine_file: key of the engine file to use; by default the newest that fits.
        dtype: dtype to compute in: "auto" (the bundle's own), or "bf16" where a file was built for it. Inputs and
            outputs keep the dtypes of the manifest.
        weights: as `set_weights` takes them.
    """

    name = "aoti"
    native = "torch"

    def __init__(
        self,
        bundle: Bundle,
        component: Component,
        *,
        device: str = "auto",
        engine_file: str | None = None,
        dtype: str = "auto",
        weights: Mapping[str, Any] | None = None,
    ):
        super().__init__(bundle, component)
        refuse_quantized(component)
        self.bundle, self.dtype = bundle, instead(component, dtype)
        self.engine_file, data, place = _choose(bundle, component.name, device, engine_file, self.dtype)
        self.device = place.place
        self.component = replace(component, dims=self.engine_file.ranges(component))
        self.profile = ", ".join(p["name"] for p in self.engine_file.identity["profiles"])
        self._package = self._open(data, place)
        self._constants = set(self._package.get_constant_fqns())
        self._changed: set[str] = set()
        self.set_weights(weights or {})
        computes = SHORT.get(self.dtype, component.dtype)
        self.description = f"AOTInductor of torch {place.torch}, {place.gpu or 'cpu'}, {computes}"

    def _open(self, data: bytes, place: Here) -> Any:
        """The package of bytes that have passed the pre-flight: these, and not what its file may hold by now."""
        import torch

        try:
            return torch._inductor.aoti_load_package(
                io.BytesIO(data), device_index=-1 if place.index is None else place.index
            )
        except Exception as error:
            said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise UserError(
                f"torch {place.torch} cannot load the engine file of {self.component.name}: {said[:300]}",
                f"{rebuild(self.bundle, self.component.name, gpu=place.index, engine=self.name)} --overwrite",
            ) from None

    def array(self, value: Any) -> Any:
        return to_torch(value, self.device)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        import torch

        with torch.inference_mode():
            outputs = self._package(**{name: value.contiguous() for name, value in feeds.items()})
        return {
            spec.name: value.to(torch_dtype(spec.dtype))
            for spec, value in zip(self.component.outputs, outputs, strict=True)
        }

    def set_weights(self, tensors: Mapping[str, Any]) -> None:
        if tensors and self.dtype:
            raise UserError(
                f"the engine file of {self.component.name} in {self.dtype} takes no other weights",
                "put it in at export: accel export MODEL BUNDLE --lora FILE; or run a file in the bundle's precision",
            )
        unknown = [name for name in tensors if _WEIGHTS + name not in self._constants]
        if unknown:
            raise UserError(
                f"the engine file of {self.component.name} has no weight {unknown[0]}: torch folded it into others",
                "put it in at export: accel export MODEL BUNDLE --lora FILE",
            )
        if not tensors and not self._changed:
            return
        own = self._stored(self._changed - tensors.keys())
        update = {_WEIGHTS + name: to_torch(value, self.device) for name, value in {**own, **tensors}.items()}
        self._package.load_constants(update, check_full_update=False)
        self._changed = set(tensors)
        self.epoch += 1

    def _stored(self, names: set[str]) -> dict[str, Any]:
        """The bundle's own tensors of these names."""
        from safetensors import safe_open

        with safe_open(self.bundle.file(self.component.weights), "pt") as file:
            return {name: file.get_tensor(name) for name in names}

    def release(self) -> None:
        del self._package


def refuse_quantized(component: Component) -> None:
    """Refuse packed weights: AOTInductor has no kernels for them, and torch would compute in float."""
    if component.int8:
        raise UserError(
            f"AOTInductor runs float networks alone, and {component.name} is {component.format}",
            f"what runs it: {', '.join(computing_in(component.format))}; or accel export MODEL BUNDLE --precision fp32",
        )


def instead(component: Component, dtype: str) -> str:
    """The dtype that a file computes in instead of the component's own; "" for its own.

    Raises:
        UserError: for another one than bf16.
    """
    check_dtype(dtype, ("auto", *SHORT))
    if dtype == "auto" or SHORT[dtype] == component.dtype:
        return ""
    if dtype != "bf16":
        fix = f"leave it out, or bf16; or accel export MODEL BUNDLE --precision {dtype}"
        raise UserError(f"AOTInductor's files of {component.name} compute in {component.dtype}, not in {dtype}", fix)
    return dtype


def _choose(bundle: Bundle, component: str, device: str, key: str | None, dtype: str) -> tuple[EngineFile, bytes, Here]:
    """The engine file to use, its bytes, and where it runs."""
    wanted = here(device)
    if wanted is None:
        raise UserError(f"aoti does not run on {device!r}", "--device cpu, --device cuda or --device cuda:1")
    places = [wanted, *([here("cpu")] if device == "auto" and wanted.index is not None else [])]
    problems = []
    for place in filter(None, places):
        fix = rebuild(bundle, component, gpu=place.index, engine="aoti") + f" --precision {dtype}" * bool(dtype)

        def other(file: EngineFile, fix: str = fix) -> preflight.Fit | None:
            own = "the bundle's precision"
            reason = f"it computes in {file.dtype or own}, and {dtype or own} is asked for"
            return None if file.dtype == dtype else preflight.Fit(False, reason, fix)

        try:
            return *preflight.choose(bundle, component, place, key, "aoti", other), place
        except preflight.NoEngineFile as error:
            problems.append(error)
    raise problems[0]
