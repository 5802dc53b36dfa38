"""A sampler's fixed steps as one CUDA graph: one launch per picture instead of thousands of kernels.

For a few-step student the launches of sampler and UNet are a visible part of the time. The graph holds everything from
the initial noise to the final latents; a call copies noise and conditioning in, replays, and copies the latents out.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from .. import sampler
from ..noise_schedule import NoiseSchedule
from .tensorrt import Bound, TensorRT


class FixedLoop:
    """All steps of one grid on one UNet, captured anew for each shape and after weights or scratch memory changed.

    Belongs to the thread that made it.

    Args:
        unet: a loaded TensorRT UNet.
        name, schedule, timesteps: as in `accel.sampler.sample`.
        guidance: classifier-free guidance scale; above 1 the UNet runs on [without prompt, with prompt].
    """

    def __init__(
        self, unet: TensorRT, name: str, schedule: NoiseSchedule, timesteps: Sequence[float], guidance: float = 0.0
    ):
        self.unet, self.name, self.schedule = unet, name, schedule
        self.timesteps, self.guidance = list(timesteps), guidance
        self.captures = 0
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    def __call__(self, x: Any, conditioning: Mapping[str, Any], noise: Sequence[Any] = ()) -> Any:
        """Noise to latents.

        Args:
            x: float32 torch [N, C, h, w], N(0, 1), on the UNet's device.
            conditioning: every other input of the UNet but sample and timestep, in its own dtypes and batch.
            noise: what a stochastic sampler adds after each step but the last, like x.

        Returns:
            float32 latents like x, in memory of their own.
        """
        self.unet.cuda.activate()
        shapes = {name: tuple(value.shape) for name, value in conditioning.items()}
        shapes |= {"sample": (len(x) * (1 + self.guided), *x.shape[1:]), "timestep": ()}
        sizes = self.unet.sizes({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})
        key = tuple(x.shape)
        graph = self._graphs.get(key)
        if graph is None or graph.bound.stale:
            graph = _Graph(self, x, sizes, len(noise))
            self._graphs[key] = graph
        cuda, stream = self.unet.cuda, graph.bound.workspace.stream
        result = cuda.empty(tuple(x.shape), "float32")
        with cuda.on(stream):
            for name, value in conditioning.items():
                graph.bound.inputs[name].copy_(value)
            for buffer, value in zip((graph.x, *graph.noise), (x, *noise), strict=True):
                buffer.copy_(value)
            if graph.replay is None:
                graph.run()  # TensorRT and torch want one ordinary run before a capture
                graph.replay = cuda.capture(stream, graph.run)
                self.captures += 1
            graph.replay()
            result.copy_(graph.result)
        return result

    @property
    def guided(self) -> bool:
        return self.guidance > 1


def loop_of(
    unet: TensorRT, name: str, schedule: NoiseSchedule, timesteps: Sequence[float], guidance: float
) -> FixedLoop:
    """The calling thread's loop of an engine for these steps; it lives as long as the engine."""
    key = (threading.get_ident(), name, tuple(timesteps), guidance)
    if key not in unet.loops:
        unet.loops[key] = FixedLoop(unet, name, schedule, timesteps, guidance)
    return unet.loops[key]


class _Graph:
    """Buffers of one shape, and the loop over them."""

    def __init__(self, loop: FixedLoop, x: Any, sizes: Mapping[str, int], draws: int):
        import torch

        cuda = loop.unet.cuda
        self.loop, self.bound, self.replay, self.result = loop, Bound(loop.unet, sizes), None, None
        self.x, *self.noise = (cuda.empty(tuple(x.shape), "float32") for _ in range(1 + draws))
        kind = self.bound.inputs["timestep"].dtype
        self.times = {t: torch.tensor(t, dtype=kind, device=loop.unet.device) for t in loop.timesteps}

    def run(self) -> None:
        loop = self.loop
        self.result = sampler.sample(
            loop.name, self.model, self.x, loop.schedule, timesteps=loop.timesteps, noise=self.noise.__getitem__
        )

    def model(self, x: Any, t: float) -> Any:
        bound, loop = self.bound, self.loop
        bound.inputs["sample"].copy_(x.repeat(2, 1, 1, 1) if loop.guided else x)
        bound.inputs["timestep"].copy_(self.times[t])
        bound.enqueue()
        out = bound.outputs["out_sample"].to(x.dtype, copy=True)  # the next step writes over it
        if not loop.guided:
            return out
        without, with_prompt = out.chunk(2)
        return without + loop.guidance * (with_prompt - without)
