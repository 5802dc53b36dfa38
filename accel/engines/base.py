"""The one interface of every engine: named tensors in, named tensors out, checked against the manifest."""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from ..bundle import Bundle, Component
from ..bundle.graph_file import graph_file
from ..bundle.tensor_spec import check
from ..errors import Notice, UserError
from ..machine import int8_saturates
from .resource import Resource

__all__ = ["Engine", "Facts", "Status", "check_device", "check_threads", "graph_file", "to_numpy", "to_torch"]


@dataclass(frozen=True)
class Status:
    """Whether an engine can run here, and if not, why and what to do about it."""

    ok: bool
    detail: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What an engine's module declares about itself, as `FACTS`, and can say without importing any library.

    Attributes:
        dtypes: short names of the dtypes that its option `dtype` takes; empty where the graph alone decides.
        devices: suffix of a benchmark variant (`onnxruntime:cuda`) -> options of `load` that it stands for.
        libraries: modules to import before a model is loaded, to tell the model's memory from theirs.
        options: options of the command line that it takes.
        formats: number formats (`accel.int8.formats`) that it runs as what they are: it multiplies in them or, of the
            weight-only ones, keeps weights so. What is not here is rounded and multiplied in float.
        engine_files: whether it runs engine files, which `accel build` makes.
        reads_graph: whether it needs the ONNX graph, which a diffusers pipeline folder does not have.
        auto: where `auto` may choose it by itself: "cpu", "cuda", or "engine file": where the bundle has one that fits.
        variants: suffixes of the variants that a benchmark measures by default; "" is the engine without a suffix.
        gpu_variants: further ones on a machine with a CUDA device.
        tunes: options that are on by default, and that `accel tune` also tries switched off.
    """

    dtypes: tuple[str, ...] = ()
    devices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    options: tuple[str, ...] = ("device",)
    formats: tuple[str, ...] = ()
    engine_files: bool = False
    reads_graph: bool = True
    auto: tuple[str, ...] = ("cpu",)
    variants: tuple[str, ...] = ("",)
    gpu_variants: tuple[str, ...] = ()
    tunes: tuple[str, ...] = ()


def noise_for(component: Component, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Inputs to try an engine on: normal noise, and zeros for integers, of the given size of each free dimension."""
    rng = np.random.default_rng(0)
    return {
        spec.name: np.asarray(rng.standard_normal(spec.concrete(sizes)) * ("float" in spec.dtype), spec.dtype)
        for spec in component.inputs
    }


@cache
def note_saturation() -> None:
    """Say once that int8 is less exact on this processor than it was at the export, where that is so."""
    if int8_saturates():
        warnings.warn(
            "this processor has no VNNI: its int8 products saturate, and images differ more from float32's than the "
            "export measured (--engine eager shows what it measured)",
            Notice,
            stacklevel=4,
        )


class Engine(Resource, ABC):
    """A loaded component. `close()`, or the end of a `with`, gives its memory back.

    Call it with the component's inputs by name; it returns a dict of outputs. Inputs may be numpy arrays, torch
    tensors or anything with `__dlpack__`; outputs are of the engine's own kind (`native`), on its own device, and never
    share memory with an input. Any number of threads may call one engine: each gets the outputs of its own inputs.

    Attributes:
        name: engine name.
        component: the manifest's record: inputs, outputs, dims.
        native: "numpy" or "torch".
        description: what really runs, for people: provider, device, dtype.
        epoch: how often its weights have changed.
    """

    name: str
    native: str = "numpy"
    description: str = ""
    epoch = 0
    what, again = "engine", "accel.load_engine(BUNDLE, COMPONENT, ENGINE) loads one"

    def __init__(self, bundle: Bundle, component: Component):
        self.component = component
        self.profile = bundle.manifest.profile.name

    def __call__(self, **feeds: Any) -> dict[str, Any]:
        self.check_open()
        component = self.component
        check(component.name, component.inputs, component.dims, self.profile, feeds)
        native = {name: self.array(value) for name, value in feeds.items()}
        try:
            outputs = self.run(native)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            raise _failed(self, error) from error
        sizes = self.sizes(native)
        for spec in component.outputs:
            if (shape := tuple(outputs[spec.name].shape)) != spec.concrete(sizes):
                raise UserError(
                    f"{component.name} made {spec.name} of shape {shape}, not {spec.concrete(sizes)}",
                    "its graph is not the one that the manifest describes: export the model again",
                )
        return outputs

    def rest(self) -> bool:
        """Give the device's memory back until the next call; False where only `close` does that."""
        return False

    @abstractmethod
    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run on native arrays that have been checked already."""

    def set_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Run with these tensors in place of the bundle's own of the same names; {} brings the bundle's own back.

        Takes seconds, and no export. No call may run meanwhile.

        Args:
            tensors: name in the component's safetensors file -> tensor of the same shape and dtype.

        Raises:
            UserError: where the engine cannot; it then runs with what it had.
        """
        raise UserError(
            f"the {self.name} engine cannot take other weights",
            "put them in at export: accel export MODEL BUNDLE --lora FILE, and --embedding FILE for textual inversion",
        )

    def array(self, value: Any) -> Any:
        """Any array as one of the engine's own kind; no copy where it already is one."""
        return to_numpy(value)

    def sizes(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        """The value of every symbolic dimension of this call, those of the outputs included."""
        dims = self.component.dims
        sizes = {
            dim: size
            for spec in self.component.inputs
            for dim, size in zip(spec.shape, feeds[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }
        for side in ("height", "width"):
            same = [dim for dim in dims if side in dim]
            known = next((dim for dim in same if dim in sizes), None)
            if known is not None:
                for dim in same:
                    root, _, stride = dim.rpartition("_")
                    inner = root == known and stride.isdigit()  # what convolutions of stride 2 leave, rounded up
                    scaled = sizes[known] * dims[dim].max // dims[known].max
                    sizes.setdefault(dim, -(-sizes[known] // int(stride)) if inner else scaled)
        return sizes

    @property
    def runs_on(self) -> str:
        """The kind of device that computes: "cpu", "cuda", or a plugin's kind such as "gpu"."""
        return str(getattr(self, "device", "cpu")).partition(":")[0]

    def __repr__(self) -> str:
        shapes = ", ".join(
            f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in self.component.inputs
        )
        state = "closed" if self.closed else self.description
        return f"<{self.component.name} on {self.name} ({state}): {shapes}>"


def _failed(engine: Engine, error: Exception) -> UserError:
    """What a library says when it fails in the middle of a call."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    memory = next((line for line in lines if re.search(r"(?i)out of memory|bad_alloc|failed to allocate", line)), "")
    if memory:
        return UserError(
            f"{engine.component.name} does not fit in memory on {engine.name}: {memory[:300]}",
            "use a smaller size or batch, or --low-memory",
        )
    return UserError(
        f"{engine.component.name} failed on {engine.name}: {lines[-1 if engine.name == 'openvino' else 0][:300]}",
        "try another engine (--engine eager is the reference); if that fails as well, export the model again",
    )


def check_threads(threads: int) -> None:
    if threads < 0:
        raise UserError(f"invalid threads: {threads} (expected an integer >= 0)", "0 lets the engine choose")


def check_device(device: str) -> None:
    """Refuse a device that torch cannot use here.

    Raises:
        UserError: with the reason that torch gives.
    """
    import torch

    try:
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeError("torch sees no CUDA device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"device {device!r} is not usable: {reason}", "--device cpu") from None


def to_numpy(value: Any) -> np.ndarray:
    """A numpy array of a numpy array, a torch tensor (on any device) or a DLPack object."""
    if isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)
    if hasattr(value, "detach"):
        return value.detach().cpu().numpy()
    return np.from_dlpack(value)


def to_torch(value: Any, device: str) -> Any:
    """A torch tensor on a device of a numpy array, a torch tensor, a DLPack or a `__cuda_array_interface__` object."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        # torch shares numpy's memory; it takes none that runs backwards, and warns where it must not write.
        shared = array.flags.writeable and all(step >= 0 for step in array.strides)
        return torch.from_numpy(array if shared else array.copy()).to(device)
    if not hasattr(value, "__dlpack__") and hasattr(value, "__cuda_array_interface__"):
        return torch.as_tensor(value, device=device)
    return torch.from_dlpack(value).to(device)
