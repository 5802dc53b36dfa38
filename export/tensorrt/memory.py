"""Estimate the memory that a build needs, before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from accel.bench.memory.graph import peak_of
from accel.bundle import Bundle, Component
from accel.bundle.graph_file import graph_file

# While TensorRT times tactics, the GPU holds the weights twice: as given, and in the kernel's layout.
# The host also holds the parsed network and the serialized engine.
_COPIES_DEVICE, _COPIES_HOST = 2, 3.5
# Of the library itself, and of the code it makes for each node (TensorRT-RTX 1.7 on a CPU: docs/tensorrt.md).
_LIBRARY, _PER_NODE = 300 << 20, 100 << 10


@dataclass(frozen=True)
class Estimate:
    """Bytes of the weights, of the activations alive at once at the largest shapes, and of the whole build."""

    weights: int
    activations: int
    device: int
    host: int

    def text(self, gpu: bool = True) -> str:
        """In words.

        Args:
            gpu: whether the build happens on one.
        """
        host = f"{_gb(self.host)} of host memory"
        if not gpu:
            return f"about {host}; running it about {_gb(self.activations)} on the card beside its weights"
        return f"about {_gb(self.device)} on the GPU and {host} (an estimate from the graph)"


def estimate(bundle: Bundle, component: Component, sizes: Mapping[str, int], workspace: int | None) -> Estimate:
    """Estimate a build.

    Args:
        sizes: dimension -> its largest size in any optimization profile.
        workspace: limit of the workspace memory pool in bytes, None for no limit.
    """
    return of_graph(
        graph_file(bundle, component), bundle.file(component.weights).stat().st_size, sizes, workspace=workspace
    )


def of_graph(path: Path, weights: int, sizes: Mapping[str, int], *, workspace: int | None = None) -> Estimate:
    """`estimate` of a graph's file and the bytes of its weights."""
    model = ir.load(path)
    nodes = len(model.graph)
    activations = peak_of(model, sizes)
    device = _COPIES_DEVICE * weights + activations + min(workspace or activations, 8 * activations)
    return Estimate(weights, activations, device, int(_LIBRARY + _COPIES_HOST * weights + _PER_NODE * nodes))


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{max(1, size // 10**6)} MB"
