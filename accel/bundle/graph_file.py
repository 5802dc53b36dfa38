"""The ONNX file of a component, after its graph was checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .graph_check import read_graph
from .manifest import Bundle, Component


def graph_file(bundle: Bundle, component: Component, engine: str = "") -> Path:
    """The ONNX file that an engine loads, after making sure that it is a graph of this component and nothing else.

    Raises:
        UserError: when the graph reads anything but the component's own weights, or has what no export writes.
    """
    graph(bundle, component, engine)
    return bundle.file(component.graph_for(engine))


def graph(bundle: Bundle, component: Component, engine: str = "") -> Any:
    """The same graph as an `onnx.ModelProto`, its weights left in their file."""
    return read_graph(bundle.file(component.graph_for(engine)), component, bundle.file(component.weights))
