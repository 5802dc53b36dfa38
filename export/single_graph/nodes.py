"""ONNX nodes written one after another: `add = nodes.op("Add", a, b)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

# A tensor by its name, or a constant.
Value = str | np.ndarray


class Nodes:
    """Nodes and constants of a graph that is being written; every name begins with `scope`."""

    def __init__(self, scope: str):
        self.scope = scope
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[Any, ...], onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: Value, name: str = "", domain: str = "", **attributes: Any) -> str:
        """Append a node.

        Args:
            inputs: names, or constants.
            name: of its one output; "" for a new one.

        Returns:
            The name of its output.
        """
        made = name or f"{self.scope}/{len(self.nodes)}_{kind}"
        feeds = [self.name_of(value) for value in inputs]
        self.nodes.append(helper.make_node(kind, feeds, [made], name=made, domain=domain, **attributes))
        return made

    def name_of(self, value: Value) -> str:
        return value if isinstance(value, str) else self.constant(value)

    def vector(self, *parts: Value) -> Value:
        """Numbers one after another: a constant where all of them are."""
        known = [part for part in parts if isinstance(part, np.ndarray)]
        return np.concatenate(known) if len(known) == len(parts) else self.op("Concat", *parts, axis=0)

    def product(self, numbers: Value) -> Value:
        """The product of int64 [n] as int32 []."""
        if isinstance(numbers, np.ndarray):
            return int32(numbers.prod())
        return self.op("Cast", self.op("ReduceProd", numbers, keepdims=0), to=onnx.TensorProto.INT32)

    def constant(self, value: np.ndarray) -> str:
        """An initializer; equal ones are one."""
        key = value.dtype.str, value.shape, value.tobytes()
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(value, f"{self.scope}/constant_{len(self.constants)}")
        return self.constants[key].name

    def text(self, value: str) -> str:
        """An initializer of one string."""
        key = "text", value
        if key not in self.constants:
            name = f"{self.scope}/constant_{len(self.constants)}"
            self.constants[key] = helper.make_tensor(name, onnx.TensorProto.STRING, [1], [value.encode()])
        return self.constants[key].name


def int32(value: Any) -> np.ndarray:
    return np.asarray(value, np.int32)


def int64(value: Any) -> np.ndarray:
    return np.asarray(value, np.int64)


def float32(value: Any) -> np.ndarray:
    return np.asarray(value, np.float32)
