"""Each network is traced once: what differs in nothing that a graph can show gets the graph that was made.

Tracing is most of an export's time, and many tests export the same narrowed networks. Weights are no part of a graph,
they lie in the file beside it, so networks with other weights share one too. Every export is still checked against
torch on its own weights (`export.check`), and a first one is always traced.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path


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


def remembering(export_graph, made: Callable[[str, Callable[[Path], object]], Path]):
    """`accel.export.graph.trace.export_graph` that asks `made(key, make)` for the folder of a graph (`made_once`)."""
    from accel.export.graph.trace import GRAPH
    from accel.int8 import packed

    def export(network, dims, folder: Path, *, opset: int) -> None:
        def make(stored: Path) -> None:
            export_graph(network, dims, folder, opset=opset)
            shutil.copy(folder / GRAPH, stored / GRAPH)

        if any(type(module).__module__ == packed.__name__ for module in network.module.modules()):
            return export_graph(network, dims, folder, opset=opset)  # scales are constants of the graph
        shutil.copy(made(key(network, dims, folder, opset), make) / GRAPH, folder / GRAPH)

    return export
