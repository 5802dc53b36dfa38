"""All fixed steps of a sampler as one CUDA graph: one launch per image instead of thousands.

For a few-step student, launching the kernels of sampler and UNet takes a visible part of the time. The graph covers
everything from the initial noise to the final latents; a call copies noise and conditioning in, replays it, and copies
the latents out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

from ..sampling import samplers
from ..sampling.linear import Table, run
from ..sampling.noise_schedule import NoiseSchedule
from ..trt.cuda_graphs import Graph


class FixedLoop:
    """All steps of one timestep grid on one UNet. The engine keeps the graphs, one for each thread, shape and grid.

    Args:
        unet: a loaded UNet whose `cuda_graph` is "loop": on TensorRT, eager or compile.
        name, schedule, timesteps: as in `accel.sampling.samplers.sample`.
        guidance: classifier-free guidance scale; above 1 the UNet runs on [without prompt, with prompt].
        table: the sampler's own where that has options; None for what name and timesteps say.
    """

    def __init__(
        self,
        unet: Any,
        name: str,
        schedule: NoiseSchedule,
        timesteps: Sequence[float],
        guidance: float = 0.0,
        table: Table | None = None,
    ):
        self.unet, self.name, self.schedule = unet, name, schedule
        self.timesteps, self.guidance, self.table = tuple(timesteps), guidance, table

    def __call__(self, x: Any, conditioning: Mapping[str, Any], noise: Sequence[Any] = ()) -> Any:
        """Sample latents from noise.

        Args:
            x: float32 torch [N, C, h, w], N(0, 1), on the UNet's device.
            conditioning: every other input of the UNet but sample and timestep, in its own dtypes and batch.
            noise: like x, one for each row up to the last that draws any.

        Returns:
            float32 latents like x, in memory of their own.
        """
        cuda = self.unet.cuda
        # The graph keeps the schedule alive, so no other schedule has its id as long as the graph exists.
        shapes = tuple(tuple(value.shape) for value in (x, *conditioning.values()))
        key = ("loop", self.name, self.timesteps, self.guidance, id(self.schedule), self.table, shapes)
        with cuda.active():
            graph = self.unet.graphs.get(key, lambda: _Loop(self, x, self._sizes(x, conditioning), len(noise)))
            result = cuda.empty(tuple(x.shape), "float32")
            with cuda.on(graph.bound.workspace.stream):
                for name, value in conditioning.items():
                    graph.bound.inputs[name].copy_(value)
                for buffer, value in zip((graph.x, *graph.noise), (x, *noise), strict=True):
                    buffer.copy_(value)
                graph.run()
                result.copy_(graph.result)
        return result

    @property
    def guided(self) -> bool:
        return self.guidance > 1

    def _sizes(self, x: Any, conditioning: Mapping[str, Any]) -> dict[str, int]:
        shapes = {name: tuple(value.shape) for name, value in conditioning.items()}
        shapes |= {"sample": (len(x) * (1 + self.guided), *x.shape[1:]), "timestep": ()}
        return self.unet.sizes({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()})


class _Loop(Graph):
    """The buffers of one shape and the sampler's loop on them."""

    def __init__(self, loop: FixedLoop, x: Any, sizes: Mapping[str, int], draws: int):
        import torch

        super().__init__(loop.unet.bound(sizes), self.sample)
        self.loop, self.result = loop, None
        self.x, *self.noise = (loop.unet.cuda.empty(tuple(x.shape), "float32") for _ in range(1 + draws))
        # Made in the ordinary run before the capture: a sampler may call the UNet between the timesteps of its grid.
        like = dict(dtype=self.bound.inputs["timestep"].dtype, device=loop.unet.device)
        self.time = cache(lambda t: torch.tensor(t, **like))

    def sample(self) -> None:
        loop = self.loop
        draw = self.noise.__getitem__
        if loop.table is not None:
            self.result = run(loop.table, self.model, self.x, noise=draw)
        else:
            self.result = samplers.sample(
                loop.name, self.model, self.x, loop.schedule, timesteps=loop.timesteps, noise=draw
            )

    def model(self, x: Any, t: float) -> Any:
        bound, loop = self.bound, self.loop
        bound.inputs["sample"].copy_(x.repeat(2, 1, 1, 1) if loop.guided else x)
        bound.inputs["timestep"].copy_(self.time(t))
        bound.enqueue()
        out = bound.outputs["out_sample"].to(x.dtype, copy=True)  # the next step writes over it
        if not loop.guided:
            return out
        without, with_prompt = out.chunk(2)
        return without + loop.guidance * (with_prompt - without)
