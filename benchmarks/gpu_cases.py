"""The cases of gpu_survey.py in the order in which decisions need them, and the sizes that they are measured at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpu_measures import WAYS, Sizes
from gpu_programs import Programs


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Attributes:
        step: the group it belongs to.
        key: what tells it from others of the step.
        seconds: its budget.
        run: makes its figures.
    """

    step: str
    key: str
    seconds: float
    run: Callable[[], dict[str, Any]]


# What `auto` may take, on one bundle that is exported for it: engine, options of `accel.load_engine`.
ENGINES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("eager", {}),
    ("eager", {"cuda_graph": "step"}),
    ("compile", {}),
    ("compile", {"mode": "reduce-overhead"}),
    ("onnxruntime", {"provider": "cuda"}),
    ("onnxruntime", {"provider": "cuda", "provider_options": {"prefer_nhwc": "1"}}),
)
_VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4)


def full() -> Sizes:
    """The sizes of published models."""
    from accel.models.topology import topology

    named = [("SD-Tiny", "sd15-tiny", 64, (1, 2, 8)), ("SD1.5", "sd15", 64, (2,)), ("SDXL", "sdxl", 128, (1, 2))]
    return Sizes(
        matrix=8192,
        copied=2 << 30,
        seconds=0.5,
        vae=(512, 1024),
        vae_config=_VAE | dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2),
        unets=tuple((name, topology(key).config, side, batches) for name, key, side, batches in named),
        attention=(
            ("SD1.5 64 x 64", (2, 4096, 8, 40)),
            ("SD1.5 32 x 32", (2, 1024, 8, 80)),
            ("SDXL 64 x 64", (1, 4096, 10, 64)),
            ("SDXL 32 x 32", (1, 1024, 20, 64)),
        ),
        norms=((1, 320, 64), (1, 320, 128), (1, 128, 1024)),
        rows=((4096, 320), (4096, 640), (1024, 1280)),
    )


def tiny() -> Sizes:
    """Sizes of a second or two on a CPU."""
    unet = dict(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return Sizes(
        matrix=64,
        copied=1 << 16,
        seconds=0.005,
        vae=(16,),
        vae_config=_VAE | dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4),
        unets=(("small", unet, 8, (1,)),),
        attention=(("small", (1, 16, 2, 8)),),
        norms=((1, 32, 8),),
        rows=((8, 32),),
    )


@dataclass
class Survey(Programs):
    """The cases for a device.

    Attributes:
        whole: whole programs of the project too, which take minutes.
    """

    whole: bool = False

    def cases(self) -> Iterator[Case]:
        """All of them, first what decides most."""
        yield Case("machine", "here", 20, self.machine)
        for dtype in ("float32", "tf32", self.half, "int8", "fp8"):
            yield Case("ceiling", dtype, 10, partial(self.product, dtype))
        yield Case("ceiling", "copy", 10, self.copy)
        yield Case("exactness", "convolution float32", 10, self.tf32)
        yield Case("host", "synchronize and copy of pixels", 20, self.host)
        for side in self.sizes.vae:
            for layout in ("nchw", "nhwc"):
                for kernels in ("torch", "patched"):
                    for how in ("eager", "graph", "compile"):
                        budget = 60 if how == "compile" else 20
                        run = partial(self.vae, side, layout, kernels, how)
                        yield Case("vae decode", f"{side} px, {layout}, {kernels}, {how}", budget, run)
        for name, shape in self.sizes.attention:
            from accel.attention import KERNELS

            for kernel in KERNELS:
                yield Case("attention", f"{name}, {kernel}", 15, partial(self.attention, shape, kernel))
        for shape in self.sizes.norms:
            yield Case("kernel", f"group_norm_silu {shape}", 15, partial(self.norm, shape))
        for shape in self.sizes.rows:
            yield Case("kernel", f"geglu {shape}", 15, partial(self.gate, shape))
            yield Case("kernel", f"quant_rowwise {shape}", 15, partial(self.rounding, shape))
        for name, config, side, batches in self.sizes.unets:
            for batch in batches:
                for way in WAYS:
                    budget = 120 if "compile" in way or "max-autotune" in way else 30
                    run = partial(self.unet, config, side, batch, way)
                    yield Case("unet", f"{name}, batch {batch}, {way}", budget, run)
        name, config, side, _ = self.sizes.unets[0]
        for way in ("plain", "patched nhwc", "fused adamw", "compile"):
            yield Case("training step", f"{name}, {way}", 90, partial(self.training, config, side, way))
        if self.whole:
            for engine, options in ENGINES:
                said = ", ".join(f"{name}={value}" for name, value in options.items())
                yield Case("engine", f"digits UNet fp16, {engine} {said}", 240, partial(self.engine, engine, options))
            variants = "eager,eager:fp16,eager:fp16:loop,compile:fp16,compile:fp16:loop"
            yield Case("program", f"accel bench digits/4step --engine {variants}", 240, partial(self.bench, variants))
            yield Case("program", "make test-gpu", 300, self.tests)
