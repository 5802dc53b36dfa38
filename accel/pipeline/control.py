"""What T2I-Adapters (arXiv 2302.08453) and ControlNets (arXiv 2302.05543) add to the UNet, by its input names.

An adapter looks at its image once; a ControlNet looks at image, latents and text in every step; what several give is
added up. A UNet that was exported with the inputs of either takes zeros where nothing is to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import images
from ..arrays import cast, concat
from ..bundle import Manifest
from ..engines import Engine
from .input_images import CONTROL_INPUTS, Shown
from .request import Chunk, Request

# (step, the UNet's other inputs) -> tensors by the UNet's input names; {} where there are none.
Control = Callable[[int, Mapping[str, Any]], dict[str, Any]]


def prepare(request: Request, chunk: Chunk, manifest: Manifest, engines: Mapping[str, Engine]) -> Control:
    """A function (step, the UNet's other inputs) -> the control inputs of the UNet, which may be none."""
    unet = engines["unet"]
    specs = [spec for spec in unet.component.inputs if spec.name.startswith(CONTROL_INPUTS)]
    if not specs:
        return lambda i, feeds: {}
    sizes = {"batch": len(chunk.prompts) * request.plan.rows} | inner_sizes(request.size)
    zeros = {spec.name: unet.array(np.zeros(spec.concrete(sizes), spec.dtype)) for spec in specs}
    parts = [
        _network(engines[name], given, request, chunk, manifest, unet.array)
        for name, given in request.images.shown.items()
    ]

    def add(i: int, feeds: Mapping[str, Any]) -> dict[str, Any]:
        total: dict[str, Any] = {}
        for part in parts:
            for name, value in part(i, feeds).items():
                total[name] = total[name] + value if name in total else value
        return zeros | {spec.name: cast(total[spec.name], spec.dtype) for spec in specs if spec.name in total}

    return add


def _network(
    engine: Engine, given: Shown, request: Request, chunk: Chunk, manifest: Manifest, array: Callable[[Any], Any]
) -> Control:
    """What one network gives, times its scale, as arrays of the UNet's kind, which `array` makes."""
    plan, rows = request.plan, len(chunk.prompts)
    spec = next(s for s in engine.component.inputs if s.name == "control_image")
    mode = "L" if spec.shape[1] == 1 else "RGB"
    image = images.batch(given.image, request.total, request.pixels, mode)[chunk.rows]
    count = int(len(plan.timesteps) * given.end)

    # A ControlNet that pools its residuals (`global_pool_conditions`) is for the rows with a prompt alone.
    factors: Any = given.scale
    if plan.guided and engine.component.name in manifest.pipeline.get("control_conditional_only", ()):
        factors = np.full((2 * rows, 1, 1, 1), given.scale, np.float32)
        factors[:rows] = 0

    def scaled(outputs: Mapping[str, Any]) -> dict[str, Any]:
        own = array(factors) if isinstance(factors, np.ndarray) else factors
        return {name: array(value) * own for name, value in outputs.items()}

    if engine.component.kind == "t2i_adapter":
        seen = scaled(engine(control_image=cast(engine.array(image), spec.dtype)))
        seen = {key: concat([value, value]) if plan.guided else value for key, value in seen.items()}
        return lambda i, feeds: seen if i < count else {}
    shown = cast(engine.array(np.concatenate([image, image]) if plan.guided else image), spec.dtype)
    dtypes = {s.name: s.dtype for s in engine.component.inputs}

    def residuals(i: int, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if i >= count:
            return {}
        own = {key: cast(engine.array(value), dtypes[key]) for key, value in feeds.items() if key in dtypes}
        return scaled(engine(**own, control_image=shown))

    return residuals


def inner_sizes(latent: Sequence[int]) -> dict[str, int]:
    """The value of every latent dimension, inner resolutions included, for latents of (height, width).

    A convolution of stride 2 rounds half a side up, and so do the poolings of adapters.
    """
    sizes = {}
    for side, cells in zip(("height", "width"), latent, strict=True):
        sizes[f"latent_{side}"] = cells
        sizes |= {f"latent_{side}_{stride}": -(-cells // stride) for stride in (2, 4, 8)}
    return sizes
