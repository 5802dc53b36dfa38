"""Runs a `.pt2` package of AOTInductor: torch alone, without diffusers, transformers or any code of the model."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...bundle import Bundle, Component
from ...dtypes import torch_dtype
from ...errors import UserError
from ...trt import preflight
from ...trt.engine_files import EngineFile, rebuild
from ..base import Engine, to_torch
from .place import Here, here

_WEIGHTS = "model."  # what the names of weights begin with in the package; without it they are the safetensors file's


class AOTInductor(Engine):
    """A component's engine file on AOTInductor (torch._inductor.aoti_load_package).

    Any number of threads may call one engine; torch lets them take turns.

    Args:
        device: "auto" (a GPU where an engine file for it fits, else the CPU), "cpu", "cuda", "cuda:1", ...
        engine_file: key of the engine file to use; by default the newest that fits.
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
        weights: Mapping[str, Any] | None = None,
    ):
        super().__init__(bundle, component)
        refuse_int8(component)
        self.bundle = bundle
        self.engine_file, data, place = _choose(bundle, component.name, device, engine_file)
        self.device = place.place
        self.component = replace(component, dims=self.engine_file.ranges(component))
        self.profile = ", ".join(p["name"] for p in self.engine_file.identity["profiles"])
        self._package = self._open(data, place)
        self._constants = set(self._package.get_constant_fqns())
        self._changed: set[str] = set()
        self.set_weights(weights or {})
        self.description = f"AOTInductor of torch {place.torch}, {place.gpu or 'cpu'}, {component.dtype}"

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


def refuse_int8(component: Component) -> None:
    """Refuse what torch would compute in float: int8 is stored packed, and AOTInductor has no kernels for that."""
    if component.int8:
        raise UserError(
            f"AOTInductor computes no int8, and {component.name} is int8",
            "run it on openvino or onnxruntime, or export it in float: accel export MODEL BUNDLE --precision fp32",
        )


def _choose(bundle: Bundle, component: str, device: str, key: str | None) -> tuple[EngineFile, bytes, Here]:
    """The engine file to use, its bytes, and where it runs."""
    wanted = here(device)
    if wanted is None:
        raise UserError(f"aoti does not run on {device!r}", "--device cpu, --device cuda or --device cuda:1")
    places = [wanted, *([here("cpu")] if device == "auto" and wanted.index is not None else [])]
    problems = []
    for place in filter(None, places):
        try:
            return *preflight.choose(bundle, component, place, key, "aoti"), place
        except preflight.NoEngineFile as error:
            problems.append(error)
    raise problems[0]
