"""LoRA files at run time: the tensors of a bundle that they change, in the bundle's own dtypes, ready for its engines.

Graphs name their weights as the state dict does, so an engine needs only the changed tensors by name. Each set of files
starts from the bundle's own weights, so A, B, A gives the same bits. What was made is kept in the cache by its digest,
and the next run reads it from there without fusing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle import Bundle, Component, kept
from ...errors import Notice, UserError
from ...files import cache_dir, digest_of, inside, read_json
from ...int8.formats import of_layer
from .. import few_step, weight_files
from .files import COMPONENTS, LoraFile, Spec, lora_files
from .fuse import fused_weights
from .reading import check_components

KEPT_BYTES = 8 << 30  # of fused tensors in the cache; the longest unused go first
_VERSION = 1  # of the arithmetic: a change of it makes other tensors

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Fused:
    """What some LoRA files make of a bundle.

    Attributes:
        files: the files and their scales.
        digest: of the bundle, the files and the scales; "" without files.
        tensors: component -> name -> tensor of its safetensors file, for those that change.
    """

    files: tuple[LoraFile, ...] = ()
    digest: str = ""
    tensors: Mapping[str, Tensors] = field(default_factory=dict)


def fused(bundle: Bundle, specs: Spec | Sequence[Spec] | None) -> Fused:
    """Fuse LoRA files into the weights of a bundle, or find it done.

    Raises:
        UserError: for a file that is missing, damaged or does not fit the bundle's networks.
    """
    files = lora_files(specs)
    if not files:
        return Fused()
    _note_few_steps(bundle, files)
    digest = digest_of([_VERSION, bundle.digest, [file.record() for file in files]])
    place = inside(cache_dir(), f"loras/{digest[:32]}", "the cache folder")
    if (earlier := _kept(place)) is not None:
        return Fused(files, digest, earlier)
    present = [name for name in COMPONENTS if name in bundle.manifest.components]
    config = read_json(bundle.file("unet/config.json"), "the config of the UNet")
    check_components(files, present, config)
    made = {name: _component(bundle, bundle.component(name), files, config) for name in present}
    made = {name: tensors for name, tensors in made.items() if tensors}
    _keep(place, made)
    return Fused(files, digest, made)


def _note_few_steps(bundle: Bundle, files: Sequence[LoraFile]) -> None:
    """Say how a few-step LoRA is sampled, where the bundle is sampled otherwise: the image would be noise or a blur."""
    own = bundle.manifest.sampler
    for file in files:
        found = few_step.recognise(None, [file.path], "", {})
        wanted = found and found.family.constants(found.steps, float(own.get("guidance", 0)))
        if wanted and any(own.get(key) != value for key, value in wanted.items() if value is not None):
            named = {"name": "sampler", "guidance": "guidance_scale"}
            call = {
                named.get(key, key): value for key, value in wanted.items() if key != "options" and value is not None
            }
            call |= wanted.get("options", {})
            warnings.warn(
                f"{file.path.name} is a few-step LoRA ({found.family.name}), and this bundle is sampled otherwise: "
                f"call it with {', '.join(f'{key}={value!r}' for key, value in call.items())}",
                Notice,
                stacklevel=4,
            )


def _component(
    bundle: Bundle, component: Component, files: Sequence[LoraFile], unet_config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    weights = Weights(own(bundle, component), component)
    made = fused_weights(component.name, weights.shapes, weights.value, files, unet_config)
    return weights.as_stored(made)


def own(bundle: Bundle, component: Component) -> Tensors:
    """The tensors of a component as the bundle has them."""
    if component.weights:
        return weight_files.stored(bundle.file(component.weights))
    module = bundle.module(component.name).model  # type: ignore[attr-defined]  # a pipeline folder's
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


class Weights:
    """A component's tensors as weights in float32: those that are stored in int8 are multiplied out.

    Attributes:
        shapes: of the weights, LAYER.weight being [out, in, ...] however it is stored.

    Raises:
        UserError: in `as_stored` and `value`, for a layer in fp8 or int4.
    """

    def __init__(self, tensors: Tensors, component: Component):
        self.tensors, self.component = tensors, component
        self.layers = {name: traits for name, traits in component.int8.get("layers", {}).items()}
        self.shapes = {name: self._shape(name) for name in tensors}

    def _packed(self, name: str) -> str:
        """The layer that a weight is stored in int8 for; "" for one that is not."""
        layer, _, part = name.rpartition(".")
        return layer if part == "weight" and layer in self.layers else ""

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.tensors[name].shape
        return shape[::-1] if self._packed(name) and len(shape) == 2 else shape

    def value(self, name: str) -> np.ndarray:
        """A weight in float32."""
        tensor = self.tensors[name]
        layer = self._packed(name)
        if not layer:
            return tensor.astype(np.float32)
        form, _ = of_layer(self.layers[layer])
        if form.stored != "int8":
            raise UserError(
                f"{layer} of the {self.component.name} is stored in {form.name}, which takes no LoRA at run time",
                "put it in at export: accel export MODEL OUT --lora FILE --precision " + form.name,
            )
        weight = tensor.T if tensor.ndim == 2 else tensor
        scale = self.tensors[f"{layer}.weight_scale"].astype(np.float32)
        made = weight.astype(np.float32) * _along(scale, weight)
        smooth = self.tensors.get(f"{layer}.smooth")
        return made if smooth is None else made / smooth.astype(np.float32)

    def as_stored(self, made: Tensors) -> dict[str, np.ndarray]:
        """New weights in the dtypes of the component; of int8 layers the weight and its scales.

        Raises:
            UserError: for a weight that does not fit its dtype.
        """
        found: dict[str, np.ndarray] = {}
        for name, weight in made.items():
            if layer := self._packed(name):
                found |= self._quantized(layer, weight)
            else:
                with np.errstate(over="ignore"):
                    found[name] = weight.astype(self.tensors[name].dtype)
            if not np.isfinite(found[name]).all():
                raise UserError(
                    f"with this LoRA {name} of the {self.component.name} does not fit {found[name].dtype}",
                    "a smaller scale, or a bundle of --precision fp32",
                )
        return found

    def _quantized(self, layer: str, weight: np.ndarray) -> dict[str, np.ndarray]:
        """As `accel.int8.packed.pack` does it: a scale per output channel, activations keep their ranges."""
        smooth, old = self.tensors.get(f"{layer}.smooth"), self.tensors[f"{layer}.weight_scale"]
        weight = weight if smooth is None else weight * smooth.astype(np.float32)
        peak = np.abs(weight).reshape(len(weight), -1).max(1)
        low = np.where(peak > 0, peak / np.float32(127), np.float32(1)).astype(old.dtype)
        scale = np.where(low > 0, low, np.finfo(old.dtype).tiny).astype(old.dtype)
        q = np.clip(np.rint(weight / _along(scale.astype(np.float32), weight)), -128, 127).astype(np.int8)
        q = np.ascontiguousarray(q.T) if q.ndim == 2 else q
        return {f"{layer}.weight": q, f"{layer}.weight_scale": scale}


def _along(scale: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return scale.reshape(-1, *[1] * (weight.ndim - 1))


def _kept(place: Path) -> dict[str, Tensors] | None:
    """What an earlier run kept; None where it did not, or where it is damaged."""
    if not kept.found(place):
        return None
    return {file.stem: weight_files.stored(file) for file in place.glob("*.safetensors")}


def _keep(place: Path, made: Mapping[str, Tensors]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    def write(folder: Path) -> None:
        try:
            for name, tensors in made.items():
                save_file(dict(tensors), folder / f"{name}.safetensors")
        except SafetensorError as error:  # such as a disk that is full
            raise OSError(str(error)) from error

    size = sum(tensor.nbytes for tensors in made.values() for tensor in tensors.values())
    kept.keep(place, size, KEPT_BYTES, write)
