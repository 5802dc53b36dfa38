"""Image parity: how much images change when a network is quantized, from the same prompts and the same noise."""

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
IMAGES = 4


class Evaluator:
    """Draws images with some layers quantized and compares them with float32's, which are drawn once.

    Args:
        pipeline: on torch, its networks fake-quantized and calibrated.
        models: the networks by component.
        images: what to draw, from held-out seeds.
        budget: least PSNR in dB.
    """

    def __init__(
        self, pipeline: Pipeline, models: Mapping[str, nn.Module], images: Calibration, budget: float = BUDGET
    ):
        self.pipeline, self.models, self.images, self.budget = pipeline, models, images, budget
        self.reference = self._draw({})

    def component(self, name: str, layers: Sequence[str] | None = None) -> dict[str, Any]:
        """Parity of the images if the named layers of one network (all of them, without names) are int8, and no other.

        Returns:
            {"psnr": dB, "ssim", "budget": dB, "images": how many, "ok": whether the budget holds}.
        """
        images = self._draw({name: layers})
        parity = compare(images, self.reference, 1.0)
        # Equal images have an infinite PSNR, which JSON cannot hold.
        psnr = 100.0 if parity.psnr is None or np.isinf(parity.psnr) else float(parity.psnr)
        psnr = psnr if parity.finite else 0.0
        return {
            "psnr": psnr,
            "ssim": parity.ssim,
            "budget": self.budget,
            "images": len(images),
            "ok": bool(psnr >= self.budget),
        }

    def _draw(self, quantized: Mapping[str, Sequence[str] | None]) -> np.ndarray:
        for model in self.models.values():
            fake_quant.set_mode(model, "disabled")
        for name, layers in quantized.items():
            fake_quant.set_mode(self.models[name], "quantize", layers)
        try:
            return self.images.run(self.pipeline)
        finally:
            for model in self.models.values():
                fake_quant.set_mode(model, "quantize")
