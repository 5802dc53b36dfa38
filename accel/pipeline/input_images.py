"""Images that a call brings along: to start from, where to paint, and what control networks are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..bundle import Manifest
from ..bundle.kinds import control_components
from ..errors import UserError

# The UNet's inputs for what T2I-Adapters and ControlNets add begin so.
CONTROL_INPUTS = ("adapter_features_", "down_residual_", "mid_residual")


@dataclass(frozen=True)
class Shown:
    """What one T2I-Adapter or ControlNet is shown.

    Attributes:
        image: as `accel.images.batch` takes it.
        scale: how strongly it counts.
        end: fraction of the steps that it counts for.
    """

    image: Any
    scale: float = 1.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.scale):
            raise UserError(f"invalid control_scale = {self.scale} (expected a number)", "such as 0.8")
        if not 0 <= self.end <= 1:
            raise UserError(f"invalid control_end = {self.end} (expected 0 to 1)", "such as 0.5")


def shown(manifest: Manifest, image: Any, scale: Any, end: Any) -> dict[str, Shown]:
    """What each control network of a bundle is shown, by its name: one value for each network, or one for all.

    Raises:
        UserError: for a control image that this bundle has no network for, and another number of values.
    """
    names = [name for name in control_components() if name in manifest.components]
    if image is None:
        Shown(None, *(np.max(value) for value in (scale, end)))
        return {}
    takes = any(spec.name.startswith(CONTROL_INPUTS) for spec in manifest.components["unet"].inputs)
    if not names or not takes:
        raise UserError(
            f"{manifest.source['name']} was exported without adapter and ControlNet: a control image has no effect",
            "export again with --adapter FOLDER or --controlnet FOLDER",
        )
    if len(names) == 1:
        scale, end = (value[0] if _listed(value) and len(value) == 1 else value for value in (scale, end))
        image = [image]
    given = {"control_image": image, "control_scale": scale, "control_end": end}
    for name, value in given.items():
        if _listed(value) and len(value) != len(names) or name == "control_image" and not _listed(value):
            count = len(value) if _listed(value) else 1
            raise UserError(
                f"{count} {name} for {len(names)} control network{'s' * (len(names) > 1)}: {', '.join(names)}",
                "give one for each, in this order" + ("" if name == "control_image" else ", or one number"),
            )
    columns = (value if _listed(value) else [value] * len(names) for value in given.values())
    return {name: Shown(*row) for name, row in zip(names, zip(*columns, strict=True), strict=True)}


def _listed(value: Any) -> bool:
    return isinstance(value, (list, tuple))


@dataclass(frozen=True)
class InputImages:
    """Images to start from, as `accel.images.batch` takes them.

    Attributes:
        image: what to start from.
        mask: white where to paint.
        strength: share of the steps that are run, above 0 to 1; None for the usual one, and for 1 with a mask.
        shown: what each control network is shown, by its name; empty for nothing.
        edited: whether the image is shown to the UNet (InstructPix2Pix) instead of being noised.
        usual_strength: where neither strength nor mask is given.
        prompt: what an IP-Adapter is shown (`accel.pipeline.conditioning.image_prompts`).
        prompt_scale: how strongly it counts.
    """

    image: Any = None
    mask: Any = None
    strength: float | None = None
    shown: Mapping[str, Shown] = field(default_factory=dict)

    edited: bool = False
    usual_strength: float = 0.8
    prompt: Any = None
    prompt_scale: float = 1.0

    def __post_init__(self) -> None:
        if not np.isfinite(self.prompt_scale):
            raise UserError(f"invalid ip_adapter_scale = {self.prompt_scale} (expected a number)", "such as 0.6")
        if self.edited:
            if self.strength is not None:
                text = f"strength {self.strength:g}: this model edits images, and takes all steps"
                raise UserError(text, "image_guidance_scale (1.5) says how closely it keeps to the image")
            return
        if self.image is not None and self.strength is None:
            object.__setattr__(self, "strength", self.usual_strength if self.mask is None else 1.0)
        if self.image is None and self.strength is not None:
            raise UserError(f"strength {self.strength:g} without an image", "give the image to start from as well")
        if self.mask is not None and self.image is None:
            raise UserError("a mask without an image", "give the image that is to be painted in as well")
