"""Ways to calibrate an int8 UNet: correct ones, and three that are common and wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from accel.assets import DIGITS
from accel.export.int8.calibration import Calibration, calibration, read_prompts
from accel.int8 import fake_quant
from accel.int8.config import Int8Config
from accel.int8.observers import observe
from accel.pipeline import Pipeline

# By name: a student that lies elsewhere is not known to be one of digits, and would be shown everyday prompts.
PROMPTS = DIGITS / "prompts.txt"

ALTERNATIVES = {
    "convolutions only": Int8Config(level="conv"),
    "+ feed-forward": Int8Config(level="ff"),
    "+ queries, keys, values": Int8Config(level="qkv"),
    "all, range: max": Int8Config(observer="max"),
    "all, range: percentile 99.99": Int8Config(observer="percentile"),
    "all, begin-of-text not excluded": Int8Config(exclude_bos=False),
    "all, SmoothQuant 0.5": Int8Config(smooth=0.5),
    "all, outputs of convolutions float": Int8Config(outputs=False),
}


def ways(
    pipeline: Pipeline, few: bool
) -> Iterator[tuple[str, Int8Config, Callable[[torch.nn.Module, Int8Config], Any]]]:
    """(name, int8 config, function that sets the ranges of the fake-quantized layers of a network)."""
    right = calibration(read_prompts(PROMPTS), 32)

    def seeing(run: Callable[[], Any]) -> Callable[[torch.nn.Module, Int8Config], Any]:
        return lambda unet, config: observe([unet], config, run)

    calibrated = seeing(lambda: right.run(pipeline))
    yield "all layers", Int8Config(), calibrated
    yield "all, and attention's scores", Int8Config(level="scores"), calibrated
    yield "all, and both products of attention", Int8Config(level="attention"), calibrated
    if few:  # 25 steps with guidance take twelve times as long
        yield from ((way, config, calibrated) for way, config in ALTERNATIVES.items())
    other = dict(sampler="dpmpp_2m", steps=25, guidance_scale=3.0) if few else dict(sampler="dmd2", steps=1)
    yield "*wrong:* other timesteps", Int8Config(), seeing(lambda: replace(right, sampling=other).run(pipeline))
    yield "*wrong:* random latents, the pipeline never run", Int8Config(), seeing(random_latents(pipeline))
    yield "*wrong:* the usual observer, 16 batches", Int8Config(), usual_observer(right, pipeline)


def random_latents(pipeline: Pipeline) -> Callable[[], None]:
    """The calibration of tools that never run the pipeline, which is wrong: noise at random timesteps and contexts."""
    generator = torch.Generator().manual_seed(0)
    unet = pipeline.engines["unet"]
    dims = {name: limits.min for name, limits in unet.component.dims.items()} | {"batch": 1}

    def run() -> None:
        for _ in range(64):
            feeds = {}
            for spec in unet.component.inputs:
                shape = spec.concrete(dims)
                normal = torch.randn(shape, generator=generator)
                feeds[spec.name] = torch.randint(0, 1000, shape, generator=generator).float() if not shape else normal
            unet(**feeds)

    return run


def usual_observer(right: Calibration, pipeline: Pipeline) -> Callable[[torch.nn.Module, Int8Config], None]:
    """The usual observer: batch maxima summed per step and divided by the number of steps; the least of all steps.

    (ModelOpt's PercentileCalibrator; as in its examples it sees 16 batches, here of one image.)
    """
    own = pipeline.bundle.manifest.sampler
    steps = len(own["timesteps"]) if "timesteps" in own else own["steps"]
    sums: dict[str, dict[int, float]] = {}
    calls: dict[str, int] = {}

    def observer(name: str) -> Callable[[torch.Tensor], None]:
        def see(x: torch.Tensor) -> None:
            step = calls.get(name, 0) % steps
            calls[name] = calls.get(name, 0) + 1
            found = sums.setdefault(name, {})
            found[step] = found.get(step, 0.0) + x.abs().max().item()

        return see

    def give(unet: torch.nn.Module, config: Int8Config) -> None:
        for name, quantizer in fake_quant.ranges(unet):
            quantizer.observer = observer(name)
        fake_quant.set_mode(unet, "observe")
        for index in range(16):
            Calibration(right.prompts[index : index + 1], index).run(pipeline)
        for name, quantizer in fake_quant.ranges(unet):
            quantizer.set_scale(min(total / steps for total in sums[name].values()) / 127)
        fake_quant.set_mode(unet, "quantize")

    return give
