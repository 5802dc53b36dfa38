"""Image parity: how much images change when a network is quantized, from the same prompts and the same noise."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
from torch import nn

from accel.int8 import fake_quant
from accel.parity import compare
from accel.pipeline import Pipeline

from .calibration import Calibration

BUDGET = 20.0  # dB, of images against float32's
IMAGES = 4
_ORDER = ("text_encoder", "text_encoder_2", "unet", "vae_decoder")  # in which they compute


def _record(model: nn.Module, answers: list[Any]) -> Callable[..., Any]:
    """The network's own answers, which are kept."""
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        made = own(*args, **kwargs)
        answers.append(deepcopy(made))
        return made

    return forward


def _replay(model: nn.Module, answers: list[Any]) -> Callable[..., Any]:
    """The kept answers in the same order: a network that is as it was, on inputs that are what they were."""
    again = iter(answers)
    return lambda *args, **kwargs: deepcopy(next(again))


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
        self._answers: dict[str, list[Any]] = {name: [] for name in models if name != _ORDER[-1]}
        with self._answering(self._answers, _record):
            self.reference = self._draw({})

    def component(self, name: str, layers: Sequence[str] | None = None) -> dict[str, Any]:
        """Parity of the images if the named layers of one network (all of them, without names) are int8, and no other.

        Returns:
            {"psnr": dB, "ssim", "budget": dB, "images": how many, "ok": whether the budget holds}.
        """
        before = [other for other in self.models if _ORDER.index(other) < _ORDER.index(name)]
        with self._answering(before, _replay):
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

    @contextmanager
    def _answering(self, names: Iterable[str], how: Callable[[nn.Module, list[Any]], Callable[..., Any]]) -> Any:
        """Let networks answer otherwise for a while."""
        changed = [self.models[name] for name in names]
        for name, model in zip(names, changed, strict=True):
            model.forward = how(model, self._answers[name])
        try:
            yield
        finally:
            for model in changed:
                del model.forward

    def _draw(self, quantized: Mapping[str, Sequence[str] | None]) -> np.ndarray:
        self.pipeline.text_cache.clear()  # of another text encoder than that of this drawing
        for model in self.models.values():
            fake_quant.set_mode(model, "disabled")
        for name, layers in quantized.items():
            fake_quant.set_mode(self.models[name], "quantize", layers)
        try:
            return self.images.run(self.pipeline)
        finally:
            for model in self.models.values():
                fake_quant.set_mode(model, "quantize")
