"""Histogram observers of activations, and the int8 scale derived from them.

The scale must not depend on how the data arrive: in how many batches, in which order, over how many steps. (The usual
observer for diffusion models adds up batch maxima per step and divides by the number of steps, so its range is right by
accident near 16 steps, 4 times too wide at 4 and 16 times at 1.) So all magnitudes go into one histogram whose range is
a power of two and doubles when it must: bins then merge in pairs without any rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import nn

from ..errors import UserError
from . import fake_quant
from .config import Int8Config
from .rounding import nearest_

BINS = 4096
_AT_ONCE = 1 << 15  # elements at once on a CPU: they stay in the cache, and torch computes so few on one thread
_CANDIDATES = 120  # clipping points that the mse observer tries, down to a fifth of the largest magnitude


class HistogramObserver:
    """Counts of |x| in `BINS` equal bins below 2^exponent, and the largest |x|.

    Args:
        where: name of the tensor, for messages.
    """

    def __init__(self, where: str = ""):
        self.where = where
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.exponent: int | None = None
        self.peak = 0.0

    def __call__(self, x: torch.Tensor) -> None:
        x = x.detach().flatten()
        peak = max(abs(end.item()) for end in torch.aminmax(x)) if x.numel() else 0.0
        if not math.isfinite(peak):
            raise UserError(
                f"{self.where} is not finite (NaN or infinity) at calibration", "the model is broken: train it again"
            )
        self.peak = max(self.peak, peak)
        if peak > 0:
            self._widen(math.frexp(peak)[1])
        if self.exponent is None:
            self.counts[0] += x.numel()  # zeros, which are in the first bin whatever the range will be
            return
        self.counts += histogram(x, self.exponent)

    def _widen(self, exponent: int) -> None:
        if self.exponent is None:
            self.exponent = exponent
        while self.exponent < exponent:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.cat([merged, torch.zeros(BINS - len(merged), dtype=torch.float64)])
            self.exponent += 1

    def scale(self, config: Int8Config) -> float:
        """The scale by the config's observer; 0 when every value was zero."""
        if not self.peak:
            return 0.0
        return {"max": self._max, "percentile": self._percentile, "mse": self._mse}[config.observer](config)

    def _max(self, config: Int8Config) -> float:
        return self.peak / config.number_format.high

    def _percentile(self, config: Int8Config) -> float:
        share = self.counts.cumsum(0) / self.counts.sum()
        edge = int(torch.searchsorted(share, torch.tensor(config.percentile / 100, dtype=torch.float64))) + 1
        return min(edge * 2.0**self.exponent / BINS, self.peak) / config.number_format.high

    def _mse(self, config: Int8Config) -> float:
        """The scale with the least squared rounding error over the histogram."""
        centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2.0**self.exponent / BINS)
        form = config.number_format
        steps = self.peak / form.high * torch.linspace(0.2, 1, _CANDIDATES, dtype=torch.float64)
        rounded = nearest_(centres / steps[:, None], form) * steps[:, None]
        errors = ((rounded - centres).square() * self.counts).sum(1)
        return steps[errors.argmin()].item()


def histogram(x: torch.Tensor, exponent: int) -> torch.Tensor:
    """How many |x| are in each of `BINS` equal bins below 2^exponent, float64 [BINS] on the CPU.

    Args:
        x: one axis, floating, finite, of magnitudes below 2^exponent.
    """
    # A power of two multiplies without rounding, so that no element falls on the wrong side of an edge.
    unit = BINS / 2.0**exponent

    def count(part: torch.Tensor) -> torch.Tensor:
        pieces = part.split(_AT_ONCE) if part.device.type == "cpu" else [part]
        return sum(torch.bincount((piece.abs().float() * unit).to(torch.int16), minlength=BINS) for piece in pieces)

    threads = torch.get_num_threads() if x.device.type == "cpu" else 1
    if threads == 1 or x.numel() < 2 * threads * _AT_ONCE:
        return count(x).double().cpu()
    return sum(_pool(threads).map(count, x.chunk(threads))).double()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """torch counts on one thread, and lets others run meanwhile."""
    return ThreadPoolExecutor(threads, thread_name_prefix="histogram")


class ChannelMaxObserver:
    """The largest |x| of every input channel (the last axis) of a linear layer, which SmoothQuant needs."""

    def __init__(self) -> None:
        self.peak: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> None:
        peak = x.detach().abs().float().flatten(0, -2).amax(0)
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)


def observe(models: Sequence[nn.Module], config: Int8Config, run: Callable[[], object]) -> list[list[str]]:
    """Calibrate: set the scales of fake-quantized layers from the activations that pass while `run` runs.

    Args:
        models: networks with fake-quantized layers; afterwards those are in mode "quantize".
        run: calls the networks as they will be called when deployed.

    Returns:
        Per network, the layers that were never called or saw nothing but zeros. They have no range, so their fake
        quantization is removed.
    """
    if config.smooth:
        _smooth(models, config, run)
    seen = _watch(models, run, HistogramObserver)
    dead = []
    for model, by_name in zip(models, seen, strict=True):
        scales = {name: observed.scale(config) for name, observed in by_name.items()}
        without = sorted({name.rpartition(".")[0] for name, scale in scales.items() if not scale})
        fake_quant.detach(model, without)
        dead.append(without)
        for name, quantizer in fake_quant.ranges(model):
            quantizer.set_scale(scales[name])
        fake_quant.set_mode(model, "quantize")
    return dead


def _watch(models: Sequence[nn.Module], run: Callable[[], object], observer: Callable[[str], Callable]) -> list[dict]:
    """Attach one observer to each range, run, and return the observers: per network {range: observer}."""
    found: list[dict] = []
    for model in models:
        found.append({})
        for name, quantizer in fake_quant.ranges(model):
            found[-1][name] = quantizer.observer = observer(name)
        fake_quant.set_mode(model, "observe")
    try:
        with torch.no_grad():
            run()
    finally:
        for model in models:
            fake_quant.set_mode(model, "disabled")
            for _, quantizer in fake_quant.ranges(model):
                quantizer.observer = None
    return found


def _smooth(models: Sequence[nn.Module], config: Int8Config, run: Callable[[], object]) -> None:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha): outliers move into the weights (arXiv 2211.10438, equation 4)."""

    def observer(name: str) -> Callable:
        return ChannelMaxObserver() if name.endswith(".input") else lambda x: None

    seen = _watch(models, run, observer)
    for model, by_name in zip(models, seen, strict=True):
        for name, layer in fake_quant.fake_layers(model):
            if not isinstance(layer, nn.Linear) or (peak := by_name[f"{name}.input"].peak) is None:
                continue
            weights = layer.weight.detach().abs().amax(0).float()
            smooth = peak.pow(config.smooth) / weights.clamp(min=1e-8).pow(1 - config.smooth)
            layer.smooth = torch.where((peak > 0) & (weights > 0), smooth, torch.ones_like(smooth)).clamp(1e-4, 1e4)
