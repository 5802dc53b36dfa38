"""CUDA graphs of a torch module: one launch for each call of a shape, or one for all steps of a sampler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UserError
from ..trt.workspace import workspace

CUDA_GRAPHS = ("off", "step", "loop")
# Kinds of components whose work depends on shapes alone; text encoders look at values on the host.
CAPTURED = ("unet", "controlnet", "vae_decoder")


def check(mode: str) -> None:
    """Refuse an unknown way to capture."""
    if mode not in CUDA_GRAPHS:
        raise UserError(f"there is no cuda_graph {mode!r}", f"one of: {', '.join(CUDA_GRAPHS)}")


class BoundModule:
    """An eager or compiled module on buffers of one shape, which stay where they are.

    Args:
        engine: eager or compile.

    Attributes:
        inputs, outputs: name -> buffer. Fill the inputs, `enqueue`, read the outputs.
    """

    def __init__(self, engine: Any, sizes: Mapping[str, int]):
        component, cuda = engine.component, engine.cuda
        self.workspace, self.engine, self.epoch = workspace(cuda), engine, engine.epoch
        self.inputs = {s.name: cuda.empty(s.concrete(sizes), s.dtype) for s in component.inputs}
        self.outputs = {s.name: cuda.empty(s.concrete(sizes), s.dtype) for s in component.outputs}

    @property
    def stale(self) -> bool:
        """Whether weights have changed since: they lie at other addresses then."""
        return self.epoch != self.engine.epoch

    def enqueue(self) -> None:
        import torch

        with torch.no_grad():
            for name, value in self.engine.compute(self.inputs).items():
                self.outputs[name].copy_(value)
