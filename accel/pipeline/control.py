"""What a T2I-Adapter (arXiv 2302.08453) or a ControlNet (arXiv 2302.05543) adds to the UNet, by the UNet's input names.

An adapter looks at its image once; a ControlNet looks at image, latents and text in every step. A UNet that was
exported with the inputs of either takes zeros where nothing is to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .. import images as images
from ..arrays import cast, concat
from ..bundle import Manifest
from ..engines import Engine
from ..errors import UserError
from .request import Chunk, InputImages, SamplingPlan

ADAPTER, CONTROLNET = "t2i_adapter", "controlnet"
COMPONENTS = (ADAPTER, CONTROLNET)
PREFIXES = ("adapter_features_", "down_residual_", "mid_residual")

Control = Callable[[int, Mapping[str, Any]], dict[str, Any]]


def prepare(
    asked: InputImages,
    chunk: Chunk,
    plan: SamplingPlan,
    manifest: Manifest,
    engines: Mapping[str, Engine],
    *,
    size: tuple[int, int],
    total: int,
) -> Control:
    """A function (step, the UNet's other inputs) -> the control inputs of the UNet, which may be none.

    Args:
        size: height and width of the image in pixels.
        total: how many images are made in all; one image may be given for each.

    Raises:
        UserError: for a control image that this bundle has no network for.
    """
    unet = engines["unet"]
    specs = [spec for spec in unet.component.inputs if spec.name.startswith(PREFIXES)]
    name = next((name for name in COMPONENTS if name in manifest.components), None)
    if asked.control is not None and (name is None or not specs):
        raise UserError(
            f"{manifest.source['name']} was exported without adapter and ControlNet: a control image has no effect",
            "export again with --adapter FOLDER or --controlnet FOLDER",
        )
    if not specs:
        return lambda i, feeds: {}
    rows = len(chunk.prompts) * (2 if plan.guided else 1)
    scale = manifest.pipeline["vae_scale"]
    sizes = {"batch": rows} | inner_sizes([side // scale for side in size])
    nothing = {spec.name: unet.array(np.zeros(spec.concrete(sizes), spec.dtype)) for spec in specs}
    if asked.control is None:
        return lambda i, feeds: nothing
    engine = engines[name]
    spec = next(s for s in engine.component.inputs if s.name == "control_image")
    image = images.batch(asked.control, total, size, "L" if spec.shape[1] == 1 else "RGB")[chunk.rows]
    count = int(len(plan.timesteps) * asked.control_end)

    def scaled(outputs: Mapping[str, Any]) -> dict[str, Any]:
        return {
            s.name: cast(unet.array(outputs[s.name]) * asked.control_scale, s.dtype) for s in specs if s.name in outputs
        }

    if name == ADAPTER:
        seen = scaled(engine(control_image=cast(engine.array(image), spec.dtype)))
        seen = {key: concat([value, value]) if plan.guided else value for key, value in seen.items()}
        return lambda i, feeds: seen if i < count else nothing
    shown = cast(engine.array(np.concatenate([image, image]) if plan.guided else image), spec.dtype)
    dtypes = {s.name: s.dtype for s in engine.component.inputs}

    def residuals(i: int, feeds: Mapping[str, Any]) -> dict[str, Any]:
        if i >= count:
            return nothing
        own = {key: cast(engine.array(value), dtypes[key]) for key, value in feeds.items() if key in dtypes}
        return scaled(engine(**own, control_image=shown))

    return residuals


def inner_sizes(latent: Sequence[int]) -> dict[str, int]:
    """The value of every latent dimension, inner resolutions included, for latents of (height, width)."""
    sizes = {}
    for side, cells in zip(("height", "width"), latent, strict=True):
        sizes[f"latent_{side}"] = cells
        sizes |= {f"latent_{side}_{stride}": cells // stride for stride in (2, 4, 8)}
    return sizes
