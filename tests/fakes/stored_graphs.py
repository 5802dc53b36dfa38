"""Each network is traced once a session: what differs in nothing that a graph can show gets the graph that was made.

Tracing is most of an export's time, and many tests export the same narrowed networks. Weights are no part of a graph,
they lie in the file beside it, so networks with other weights share one too. Every export is still checked against
torch on its own weights (`export.check`), and a first one is always traced.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

INT8 = "int8_packed"


def key(network, dims, folder: Path, opset: int) -> str:
    """Digest of everything that a graph depends on: config, layout of the weights, float32 islands, shapes, opset."""
    from accel.export.graph.trace import WEIGHTS, safetensors_header

    model = network.module.model
    config = model.config if isinstance(model.config, dict) else model.config.to_dict()
    config = sorted((name, value) for name, value in config.items() if not name.startswith("_"))  # no folders
    modules = [
        (name, type(module).__name__, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]
    names = {dim for spec in (*network.inputs, *network.outputs) for dim in spec.shape if isinstance(dim, str)}
    sizes = [(name, dims[name]) for name in sorted(names)]
    layout = (safetensors_header(folder / WEIGHTS), sizes, network.inputs, network.outputs, opset)
    return hashlib.sha256(repr((type(model), config, modules, layout)).encode()).hexdigest()


def remembering(export_graph, place: Path):
    """`accel.export.graph.trace.export_graph` that looks into a folder first."""
    from accel.export.graph.trace import GRAPH

    def export(network, dims, folder: Path, *, opset: int) -> None:
        if any(type(module).__module__.endswith(INT8) for module in network.module.modules()):
            return export_graph(network, dims, folder, opset=opset)  # scales are constants of the graph
        stored = place / key(network, dims, folder, opset)
        if not stored.exists():
            export_graph(network, dims, folder, opset=opset)
            own = stored.with_name(f"{stored.name}-{os.getpid()}")
            shutil.copy(folder / GRAPH, own)
            own.rename(stored)  # another worker may do the same
        shutil.copy(stored, folder / GRAPH)

    return export
