"""How an engine was fused: its kernels, and the float32 tensors that they hand to each other.

A float32 island is a group of kernels that are connected by float32 tensors. In a graph of lower precision each is
memory traffic twice as wide as the graph asks for: what one kernel adds up in float32 inside is none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from .audit import FUSED_ATTENTION, datatype
from .layers import Layer, Tensor

# Names of the graph compiler's fused kernels, as they begin to be read: __myl_SiluGnor_myl0_12.
_NORM = re.compile(r"__myl_\w*?(Gnor|Inor|Lnor|MeanSubMulMean)")
_SHAPES = ("shape_call", "reshape", "cast")  # of shapes, on the host; a cast of activations is a kgen


@dataclass(frozen=True)
class Kernels:
    """Counts of an engine's kernels.

    Attributes:
        kernels: that write activations; what computes shapes and indices does not count.
        by_kind: LayerType -> number of these.
        attentions: attentions that are one kernel.
        norms: kernels with a normalization in them, whatever else is fused into it.
        float32_tensors: activations that one kernel writes in float32 and another reads.
        float32_bytes: of these, each once.
        islands: groups of kernels that these connect.
    """

    kernels: int
    by_kind: dict[str, int]
    attentions: int
    norms: int
    float32_tensors: int
    float32_bytes: int
    islands: int


def count(layers: Sequence[Layer]) -> Kernels:
    """Count the kernels of an engine that was built at fixed sizes; a free dimension counts as one."""
    kernels = [layer for layer in layers if layer.kind not in _SHAPES and any(map(_activation, layer.outputs))]
    read = {tensor.name for layer in kernels for tensor in layer.inputs}
    wide = {
        tensor.name: tensor
        for layer in kernels
        for tensor in layer.outputs
        if tensor.name in read and datatype(tensor) == "fp32"
    }
    islands: list[set[str]] = []  # of names of float32 tensors
    for layer in kernels:
        if own := {tensor.name for tensor in (*layer.inputs, *layer.outputs)} & wide.keys():
            joined = [island for island in islands if island & own]
            islands = [island for island in islands if not island & own] + [own.union(*joined)]
    kinds = [layer.kind for layer in kernels]
    return Kernels(
        kernels=len(kernels),
        by_kind={kind: kinds.count(kind) for kind in sorted(set(kinds))},
        attentions=sum(bool(FUSED_ATTENTION.search(layer.name + layer.kind)) for layer in kernels),
        norms=sum(bool(_NORM.match(layer.name)) for layer in kernels),
        float32_tensors=len(wide),
        float32_bytes=sum(4 * prod(max(size, 1) for size in tensor.shape) for tensor in wide.values()),
        islands=len(islands),
    )


def _activation(tensor: Tensor) -> bool:
    return datatype(tensor) not in ("", "index")
