"""Latents to small pictures, by the cheapest way that a bundle has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...arrays import cast
from ...bundle import Bundle
from ...engines import Engine
from ...engines.base import to_numpy
from ...errors import UserError
from ...files import read_json
from ...images import to_pil, unit_range
from ..initial_latents import unscaled
from ..sampling_plan import SamplingPlan
from . import linear_map
from .linear_map import LinearMap

_PROBES = 4  # pictures that a map is fitted to when a preview is first wanted


@dataclass(frozen=True)
class Previewer:
    """Shows latents.

    Attributes:
        pixels: latents as the UNet sees them, float32 [N, C, h, w] -> pixels [N, 3, H, W] in about [-1, 1].
        how: for people: "tiny VAE", or "linear map" and where that comes from.
    """

    pixels: Callable[[np.ndarray], np.ndarray]
    how: str

    def __call__(self, x: Any, size: tuple[int, int]) -> list[Any]:
        """PIL images of `size` (height, width)."""
        from PIL import Image

        images = to_pil(unit_range(self.pixels(np.asarray(to_numpy(x), np.float32))))
        return [image.resize(size[::-1], Image.Resampling.BICUBIC) for image in images]

    @classmethod
    def of(cls, bundle: Bundle, engines: Mapping[str, Engine]) -> Previewer:
        """The previewer of a bundle: its decoder, where that is a tiny VAE's; the map in its manifest; or a new one."""
        kept = bundle.manifest.pipeline.get("preview")
        if is_tiny(bundle):
            return cls(decoder(bundle, engines), "tiny VAE")
        if kept:
            return cls(LinearMap.from_dict(kept), "linear map of the bundle")
        dims = engines["vae_decoder"].component.dims
        size = dims["latent_height"].min, dims["latent_width"].min
        channels = bundle.manifest.pipeline["latent_channels"]
        made = linear_map.fitted(decoder(bundle, engines), channels, size, _PROBES)
        return cls(made, "linear map, fitted now")


def is_tiny(bundle: Bundle) -> bool:
    """Whether the VAE is a tiny one (TAESD), whose decoder costs less than a step of the UNet."""
    try:
        config = read_json(bundle.file("vae_decoder/config.json"), "the VAE's config")
    except UserError:
        return False
    return config.get("_class_name") == "AutoencoderTiny"


def decoder(bundle: Bundle, engines: Mapping[str, Engine]) -> Callable[[np.ndarray], np.ndarray]:
    """The decoder as a function of latents as the UNet sees them, one image at a time."""

    def decode(x: np.ndarray) -> np.ndarray:
        vae = engines["vae_decoder"]
        (spec,) = vae.component.inputs
        z = unscaled(x, bundle.manifest.pipeline)
        one_by_one = (vae(latent_sample=cast(vae.array(z[i : i + 1]), spec.dtype))["sample"] for i in range(len(z)))
        return np.concatenate([np.asarray(to_numpy(pixels), np.float32) for pixels in one_by_one])

    return decode


def shown(plan: SamplingPlan, i: int, x: Any, prediction: Any) -> Any:
    """The x0 that a step predicts, which is what a preview shows: the state itself still has its noise.

    Args:
        i: the row of the plan's table.
        x, prediction: what the UNet was shown, and what it made of it.
    """
    if plan.table is None:
        return x
    a, b = plan.table.rows[i - plan.table.first].clean
    return a * x + b * prediction


def preview_hook(
    plan: SamplingPlan,
    size: tuple[int, int],
    previewer: Callable[[], Previewer],
    every: int | None,
    show: Callable[[int, list[Any]], Any] | None,
) -> Callable[[int, Any, Any], None] | None:
    """(i, x, prediction) -> nothing, which shows the steps that are asked for; None where nobody asks.

    Args:
        size: height and width of the images.
        previewer: makes it, when the first preview is wanted.
        every, show: `preview_every` and `preview_callback` of a call.

    Raises:
        UserError: for one without the other, or a number that is none of steps.
    """
    if every is not None and every < 1:
        raise UserError(f"invalid preview_every: {every} (expected an integer >= 1)", "such as 2")
    if every is not None and show is None:
        raise UserError("preview_every without preview_callback: nobody would see them", "give a function (i, images)")
    if show is None:
        return None

    def preview(i: int, x: Any, prediction: Any) -> None:
        if (i + 1 - plan.start) % (every or 1) == 0:
            show(i, previewer()(shown(plan, i, x, prediction), size))

    return preview
