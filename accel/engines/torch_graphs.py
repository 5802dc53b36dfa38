"""CUDA graphs of a torch module: one launch for each call of a shape, or one for all steps of a sampler."""

from __future__ import annotations

from ..errors import UserError
from ..trt.cuda_graphs import Buffers

CUDA_GRAPHS = ("off", "step", "loop")
# Kinds of components whose work depends on shapes alone; text encoders look at values on the host.
CAPTURED = ("unet", "controlnet", "vae_decoder")


def check(mode: str) -> None:
    """Refuse an unknown way to capture."""
    if mode not in CUDA_GRAPHS:
        raise UserError(f"there is no cuda_graph {mode!r}", f"one of: {', '.join(CUDA_GRAPHS)}")


class BoundModule(Buffers):
    """An eager or compiled module on buffers of one shape."""

    def enqueue(self) -> None:
        import torch

        with torch.no_grad():
            for name, value in self.engine.compute(self.inputs).items():
                self.outputs[name].copy_(value)
