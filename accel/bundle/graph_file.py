"""The ONNX file of a component, and that it reads nothing but its own bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import inside
from .manifest import Bundle, Component


def graph_file(bundle: Bundle, component: Component, engine: str = "") -> Path:
    """The ONNX file that an engine loads, after making sure that its external data stay inside the bundle.

    Raises:
        UserError: when the graph reads a file that is not part of the bundle.
    """
    import onnx

    path = bundle.file(component.graph_for(engine))
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        raise UserError(
            f"{path} is not a readable ONNX file ({type(error).__name__})", "export the model again"
        ) from None
    tensors = [*_tensors(model.graph)] + [t for f in model.functions for t in _tensors(f)]
    locations = {entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"}
    for location in sorted(locations):
        inside(path.parent, location, "the graph's external data")
        bundle.file(f"{component.folder}/{location}")
    return path


def _tensors(graph: Any) -> Iterator[Any]:
    """Every tensor of an ONNX graph or function, in attributes and subgraphs too: any of them may name a file."""
    yield from getattr(graph, "initializer", ())
    for sparse in getattr(graph, "sparse_initializer", ()):
        yield from (sparse.values, sparse.indices)
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)
