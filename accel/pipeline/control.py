"""What a T2I-Adapter (arXiv 2302.08453) or a ControlNet (arXiv 2302.05543) adds to the UNet, by the UNet's input names.

An adapter looks at its image once; a ControlNet looks at image, latents and text in every step. A UNet that was
exported with the inputs of either takes zeros where nothing is to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import images
from ..arrays import cast, concat
from ..bundle import Manifest
from ..bundle.kinds import control_components
from ..engines import Engine
from ..errors import UserError
from .request import Chunk, Request

ADAPTER, CONTROLNET = "t2i_adapter", "controlnet"
# What the UNet's inputs for them are called.
PREFIXES = ("adapter_features_", "down_residual_", "mid_residual")

Control = Callable[[int, Mapping[str, Any]], dict[str, Any]]


def prepare(request: Request, chunk: Chunk, manifest: Manifest, engines: Mapping[str, Engine]) -> Control:
    """A function (step, the UNet's other inputs) -> the control inputs of the UNet, which may be none.

    Raises:
        UserError: for a control image that this bundle has no network for.
    """
    given, plan = request.images, request.plan
    unet = engines["unet"]
    specs = [spec for spec in unet.component.inputs if spec.name.startswith(PREFIXES)]
    name = next((name for name in control_components() if name in manifest.components), None)
    if given.control is not None and (name is None or not specs):
        raise UserError(
            f"{manifest.source['name']} was exported without adapter and ControlNet: a control image has no effect",
            "export again with --adapter FOLDER or --controlnet FOLDER",
        )
    if not specs:
        return lambda i, feeds: {}
    rows = len(chunk.prompts) * (2 if plan.guided else 1)
    sizes = {"batch": rows} | inner_sizes(request.size)
    zeros = {spec.name: unet.array(np.zeros(spec.concrete(sizes), spec.dtype)) for spec in specs}
    if given.control is None:
        return lambda i, feeds: zeros
    engine = engines[name]
    spec = next(s for s in engine.component.inputs if s.name == "control_image")
    image = images.batch(given.control, request.total, request.pixels, "L" if spec.shape[1] == 1 else "RGB")[chunk.rows]
    count = int(len(plan.timesteps) * given.control_end)

    # A ControlNet that pools its residuals (`global_pool_conditions`) is for the rows with a prompt alone.
    where = np.ones((rows, 1, 1, 1), np.float32)
    if plan.guided and manifest.pipeline.get("control_conditional_only"):
        where[: rows // 2] = 0
    factors = unet.array(where * np.float32(given.control_scale)) if where.min() == 0 else given.control_scale

    def scaled(outputs: Mapping[str, Any]) -> dict[str, Any]:
        return {s.name: cast(unet.array(outputs[s.name]) * factors, s.dtype) for s in specs if s.name in outputs}

    if name == ADAPTER:
        seen = scaled(engine(control_image=cast(engine.array(image), spec.dtype)))
        seen = {key: concat([value, value]) if plan.guided else value for key, value in seen.items()}
        return lambda i, feeds: seen if i < count else zeros
    shown = cast(engine.array(np.concatenate([image, image]) if plan.guided else image), spec.dtype)
    dtypes = {s.name: s.dtype for s in engine.component.inputs}

    def residuals(i: int, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if i >= count:
            return zeros
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
