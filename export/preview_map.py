"""The linear map of latents to colours that shows images in the making, fitted at export."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from accel.models.source import Source
from accel.models.source_networks import UNetInputs, network_of
from accel.pipeline.initial_latents import unscaled
from accel.pipeline.previews import linear_map

_SIDE, _COUNT = 16, 4  # latents that it is fitted to


def preview_map(source: Source, inputs: UNetInputs, constants: Mapping[str, Any]) -> dict[str, Any]:
    """`Manifest.pipeline`'s `preview` of a pipeline; empty for a tiny VAE, which decodes previews itself.

    Args:
        inputs: what the UNet takes.
        constants: as in `Manifest.pipeline`.
    """
    if source.config("vae").get("_class_name") == "AutoencoderTiny":
        return {}
    module = network_of(source, "vae_decoder", inputs).module.eval()

    def decode(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(np.asarray(unscaled(x, constants), np.float32)))[0].numpy()

    side = max(_SIDE, constants["latent_multiple"])
    return {"preview": linear_map.fitted(decode, constants["latent_channels"], (side, side), _COUNT).as_dict()}
