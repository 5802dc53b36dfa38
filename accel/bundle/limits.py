"""What a manifest may say: names that can be part of a path, and numbers that a network can have.

Everybody else takes them as they are, so this is the only place where they are checked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ..dtypes import TENSORS
from .kinds import DENOISER, KINDS
from .shape_profiles import Range
from .tensor_spec import TensorSpec

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
LARGEST = 1 << 20  # of a dimension: images, pixels, channels, tokens
_CONSTANTS = {"vae_scale": 256, "latent_channels": 4096, "latent_multiple": 256}
_LARGEST_SIDE, _LAYERS = 1 << 16, 512


def check(manifest: Any) -> None:
    """Check names and numbers of a `Manifest` whose types are right.

    Raises:
        ValueError: for the first one that is not allowed, with its place and value.
    """
    for problem in _problems(manifest):
        raise ValueError(problem)


def _problems(manifest: Any) -> Iterator[str]:
    for word in texts(manifest.as_dict()):
        if not word.isprintable() or len(word) > 10_000:
            yield f"{word!r:.80} is not a line of text"
    yield from constants(manifest.pipeline)
    if manifest.by_class:
        yield from _of_classes(manifest)
    profile = manifest.profile
    for side in ("batch", "height", "width"):
        yield from _range(f"profile.{side}", getattr(profile, side))
    if not 1 <= profile.tokens <= LARGEST:
        yield f"profile.tokens: {profile.tokens!r:.40} is not between 1 and {LARGEST}"
    for name in ("step", "vae_tile"):
        if not 0 <= getattr(profile, name) <= LARGEST:
            yield f"profile.{name}: {getattr(profile, name)!r:.40} is not between 0 and {LARGEST}"
    for entry, record in manifest.files.items():
        if not _SHA256.fullmatch(record["sha256"]) or record["bytes"] < 0:
            yield f"files.{entry!r:.80}: {dict(record)!r:.120} is not a sha256 and a size"
    for component in manifest.components.values():
        yield from _component(component)


def constants(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a pipeline's constants, see `accel.bundle.Manifest.pipeline`: sizes and factors."""
    for key, largest in _CONSTANTS.items():
        if isinstance(values[key], bool) or not 1 <= values[key] <= largest:
            yield f"pipeline.{key}: {values[key]!r:.40} is not between 1 and {largest}"
    skip = values.get("clip_skip", 0)
    if isinstance(skip, bool) or not isinstance(skip, int) or not 0 <= skip <= _LAYERS:
        yield f"pipeline.clip_skip: {skip!r:.40} is not between 0 and {_LAYERS}"
    pooling = values.get("control_conditional_only", [])
    if not isinstance(pooling, list) or not set(map(str, pooling)) <= set(KINDS["controlnet"].names):
        yield f"pipeline.control_conditional_only: {pooling!r:.80} is no list of ControlNets"
    sides = values["native_size"] if isinstance(values["native_size"], list) else [values["native_size"]] * 2
    if len(sides) != 2 or any(isinstance(side, bool) or not 1 <= side <= _LARGEST_SIDE for side in sides):
        yield f"pipeline.native_size: {values['native_size']!r:.40} is not between 1 and {_LARGEST_SIDE}"
    for key, what in (("scaling_factor", "no scale"), ("shift_factor", "not finite")):
        each = values[key] if isinstance(values[key], list) else [values[key]] * values["latent_channels"]
        if len(each) != values["latent_channels"]:
            yield f"pipeline.{key}: {values[key]!r:.80} is not one number for each of the latent channels"
        if not all(math.isfinite(value) and (value or key == "shift_factor") for value in each):
            yield f"pipeline.{key}: {values[key]!r:.80} is {what}"
    if "preview" in values and not _is_map(values["preview"], values["latent_channels"]):
        yield f"pipeline.preview: {values['preview']!r:.80} is no map of latents to red, green and blue"


def _of_classes(manifest: Any) -> Iterator[str]:
    """What is wrong with the constants of a model that draws images of classes, and with what its network takes."""
    values = manifest.pipeline
    classes = values.get("classes")
    if isinstance(classes, bool) or not isinstance(classes, int) or not 0 <= classes <= LARGEST:
        yield f"pipeline.classes: {classes!r:.40} is not between 0 and {LARGEST}"
    found = [values.get(key) for key in ("sigma_min", "sigma_max", "rho", "sigma_data")]
    if not all(isinstance(number, float) and 0 < number < math.inf for number in found) or found[0] >= found[1]:
        yield f"pipeline: {found!r:.120} are not 0 < sigma_min < sigma_max, rho and sigma_data above 0"
    sigmas = manifest.sampler.get("sigmas", [1.0])
    if (
        not isinstance(sigmas, list)
        or not sigmas
        or not all(isinstance(number, float) and 0 < number < math.inf for number in sigmas)
    ):
        yield f"sampler.sigmas: {sigmas!r:.80} are no noise levels above 0"
    wanted = ["sample", "c_noise"] + ["class_labels"] * bool(classes)
    named = [spec.name for spec in manifest.components[DENOISER].inputs]
    if named != wanted:
        yield f"components.{DENOISER}.inputs: {named!r:.120} are not {', '.join(wanted)}"


def _is_map(value: Any, channels: int) -> bool:
    """Whether it is what `accel.pipeline.previews.linear_map.LinearMap.from_dict` reads."""
    if not isinstance(value, dict) or not isinstance(value.get("factors"), list):
        return False
    rows = [*value["factors"], value.get("bias")]
    sizes = [channels] * 3 + [3]
    return len(rows) == 4 and all(
        isinstance(row, list)
        and len(row) == size
        and all(isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n) for n in row)
        for row, size in zip(rows, sizes, strict=True)
    )


def texts(value: Any) -> Iterator[str]:
    """Every key and text in it: all of them may be shown on a terminal or go into another format."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield str(key)
            yield from texts(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from texts(entry)


def _component(component: Any) -> Iterator[str]:
    name, kind = component.name, KINDS[component.kind]
    if name not in kind.names:
        yield f"components: a {component.kind} is called {' or '.join(kind.names)}, not {name!r:.80}"
    for entry in (component.graph, component.weights, *component.int8.get("graphs", {}).values()):
        folder, _, file = entry.rpartition("/") if isinstance(entry, str) else ("", "", "")
        if folder != name or not _NAME.fullmatch(file):
            yield f"components.{name}: {entry!r:.80} is not a file in the folder {name}"
    for dim, limits in component.dims.items():
        if not _NAME.fullmatch(dim):
            yield f"components.{name}.dims: {dim!r:.80} is not a name"
        yield from _range(f"components.{name}.dims.{dim}", limits)
    given = {dim for spec in component.inputs for dim in spec.shape if isinstance(dim, str)}
    for dim in {dim for spec in component.outputs for dim in spec.shape if isinstance(dim, str)} - given:
        if not any(side in dim and any(side in own for own in given) for side in ("height", "width")):
            yield f"components.{name}.outputs: {dim!r} follows from no input"
    specs = (*component.inputs, *component.outputs)
    for spec in specs:
        yield from _tensor(f"components.{name}", spec)
    for side, listed in (("inputs", component.inputs), ("outputs", component.outputs)):
        if not listed or len({spec.name for spec in listed}) < len(listed):
            yield f"components.{name}.{side}: {[spec.name for spec in listed]!r:.120} are not different names"


def _tensor(place: str, spec: TensorSpec) -> Iterator[str]:
    if not _NAME.fullmatch(spec.name):
        yield f"{place}: {spec.name!r:.80} is not the name of a tensor"
    if spec.dtype not in TENSORS:
        yield f"{place}.{spec.name}: unknown dtype {spec.dtype!r:.40} (one of: {', '.join(TENSORS)})"
    if len(spec.shape) > 8 or any(isinstance(size, int) and not 1 <= size <= LARGEST for size in spec.shape):
        yield f"{place}.{spec.name}: {spec.shape!r:.80} is no shape"


def _range(place: str, limits: Range) -> Iterator[str]:
    ends: list[Any] = [1, limits.min, limits.opt, limits.max, LARGEST]
    if ends != sorted(ends) or not 1 <= limits.multiple <= LARGEST:
        yield f"{place}: {vars(limits)!r:.120} is no range: 1 <= min <= opt <= max <= {LARGEST}, multiple >= 1"
