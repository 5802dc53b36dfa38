"""How far images move when a network is quantised: the same prompts from the same noise, in float and in int8."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from accel.int8 import fake_quant
from accel.parity import compare
from accel.pipeline import Pipeline

from .calibration import Calibration

BUDGET = 20.0  # dB, of images against float32's
IMAGES = 8


class Judge:
    """Draws with some layers quantised and compares with nothing quantised; the truth is drawn once.

    Args:
        pipeline: on torch, its networks fake-quantised and calibrated.
        models: the networks by component.
        images: what is drawn; not what calibrated.
        budget: least PSNR in dB.
    """

    def __init__(
        self, pipeline: Pipeline, models: Mapping[str, nn.Module], images: Calibration, budget: float = BUDGET
    ):
        self.pipeline, self.models, self.images, self.budget = pipeline, models, images, budget
        self.truth = self._draw({})

    def component(self, name: str, layers: Sequence[str] | None = None) -> dict[str, Any]:
        """Parity of images when the named layers (all, without names) of one network alone are in int8."""
        return self.figures(self._draw({name: layers}))

    def figures(self, images: np.ndarray) -> dict[str, Any]:
        found = compare(images, self.truth, 1.0)
        # Equal images have no finite PSNR, and JSON no infinity.
        psnr = 100.0 if found.psnr is None or np.isinf(found.psnr) else float(found.psnr)
        psnr = psnr if found.finite else 0.0
        return {
            "psnr": psnr,
            "ssim": found.ssim,
            "budget": self.budget,
            "pictures": len(images),
            "ok": bool(psnr >= self.budget),
        }

    def _draw(self, wanted: Mapping[str, Sequence[str] | None]) -> np.ndarray:
        for model in self.models.values():
            fake_quant.set_mode(model, "pass")
        for name, layers in wanted.items():
            fake_quant.set_mode(self.models[name], "quantize", layers)
        try:
            return self.images.run(self.pipeline)
        finally:
            for model in self.models.values():
                fake_quant.set_mode(model, "quantize")
