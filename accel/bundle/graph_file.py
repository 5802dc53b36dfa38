"""The ONNX file of a component, after its graph was checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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


def float32_values(model: Any, weights: Path, name: str, instead: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The values of an initializer; None where it is not float32, or there is none of this name.

    Args:
        model: a graph of the component, as `graph` gives it.
        weights: the component's safetensors file.
        instead: other values by name, which are taken first.
    """
    from onnx import TensorProto, numpy_helper

    if name in instead:
        return instead[name]
    tensor = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        return None
    if not tensor.external_data:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(weights, np.float32, "r", int(place["offset"]), tuple(tensor.dims))
