"""A sampler's rows as nodes: one `Loop` whose body holds the UNet once, whatever the number of steps.

A row makes the next state of the variables of this row and of rows before it (`accel.sampling.linear`). In the loop a
variable is known by its kind and its age in rows, and its factors are a constant with one number for each row. Written
out instead, four steps of digits are 13,000 nodes: ONNX Runtime's memory planner compares every tensor with every free
one and took a minute to load them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from accel.errors import UserError
from accel.sampling.linear import Table, Terms

from .nodes import Nodes, float32, int64

# A variable of a row by its kind and its age: ("m", 1) is the x0 of the row before.
Aged = tuple[str, int]


@dataclass(frozen=True)
class Symbol:
    """A float32 tensor of the graph; `+` and `*` with a number or another one write nodes."""

    nodes: Nodes
    name: str

    def __add__(self, other: Symbol | float) -> Symbol:
        return self._with("Add", other)

    def __mul__(self, other: Symbol | float) -> Symbol:
        return self._with("Mul", other)

    def __sub__(self, other: Symbol | float) -> Symbol:
        return self._with("Sub", other)

    __radd__, __rmul__ = __add__, __mul__

    def clip(self, low: float, high: float) -> Symbol:
        return Symbol(self.nodes, self.nodes.op("Clip", self.name, float32(low), float32(high)))

    def _with(self, kind: str, other: Symbol | float) -> Symbol:
        value: Any = other.name if isinstance(other, Symbol) else float32(other)
        return Symbol(self.nodes, self.nodes.op(kind, self.name, value))


def check(table: Table | None, sampler: str) -> Table:
    """The table, if its loop can be written as nodes.

    Raises:
        UserError: for a sampler with a loop of its own, and for dynamic thresholding.
    """
    if table is None:
        raise UserError(f"sampler {sampler} has a loop of its own, which is not written as a graph", "--sampler euler")
    if table.clip is not None and table.clip.ratio is not None:
        fix = 'set "thresholding": false in scheduler_config.json of the model, and export it again'
        raise UserError("dynamic thresholding takes a quantile, which engines have no operator for", fix)
    return table


def loop(
    outer: Nodes,
    body: Nodes,
    table: Table,
    predict: Callable[[Symbol, str], Symbol],
    start: Symbol,
    noise: Callable[[str], Symbol],
    finished: Callable[[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]], onnx.GraphProto],
    shape: tuple[int | str, ...],
) -> Symbol:
    """Write the whole run as one node.

    Args:
        outer: where the loop stands.
        body: where its body is written.
        predict: (x, row) -> the model's prediction; `row` is the name of an int64 number.
        start: N(0, 1).
        noise: row -> fresh noise.
        finished: (inputs, outputs) -> the body's graph.
        shape: of the states; OpenVINO wants to know it.

    Returns:
        The last state.
    """
    rows = table.rows
    columns = [_aged(i, row.next) for i, row in enumerate(rows)]
    stored = [_aged(i, row.stored) for i, row in enumerate(rows)]
    used = {variable for column in (*columns, *stored) for variable in column}
    ages = {kind: max((age for name, age in used if name == kind), default=-1) for kind in "xpmns"}
    known: dict[Aged, Symbol] = {("x", 0): Symbol(body, "loop/x")}
    kept = [(kind, age) for kind, oldest in ages.items() for age in range(1, oldest + 1)]
    known |= {(kind, age): Symbol(body, f"loop/{kind}_{age}") for kind, age in kept}

    def combined(factors: list[Mapping[Aged, float]]) -> Symbol:
        total = None
        for variable in sorted({variable for row in factors for variable in row}):
            term = known[variable] * _of_row(body, [row.get(variable, 0.0) for row in factors])
            total = term if total is None else total + term
        assert total is not None
        return total

    known["p", 0] = predict(known["x", 0], "loop/row")
    if ages["m"] >= 0:
        a, b = (_of_row(body, [row.clean[i] for row in rows]) for i in (0, 1))
        x0 = known["x", 0] * a + known["p", 0] * b
        known["m", 0] = x0.clip(-table.clip.limit, table.clip.limit) if table.clip else x0
    if ages["n"] >= 0:
        known["n", 0] = noise("loop/row")
    if ages["s"] >= 0:
        known["s", 0] = combined(stored)
    following = combined(columns)
    going = body.op("Identity", "loop/going")
    after = [following.name, *(known[kind, age - 1].name for kind, age in kept)]
    carried = [body.op("Identity", name) for name in after]
    value = helper.make_tensor_value_info
    inputs = [value("loop/row", TensorProto.INT64, []), value("loop/going", TensorProto.BOOL, [])]
    inputs += [value(known[variable].name, TensorProto.FLOAT, shape) for variable in [("x", 0), *kept]]
    outputs = [value(going, TensorProto.BOOL, []), *(value(name, TensorProto.FLOAT, shape) for name in carried)]
    first = start * table.scale if table.scale != 1 else start
    nothing = (start * 0.0).name if kept else ""
    made = [f"loop/last_{i}" for i in range(len(carried))]
    trips, go = outer.constant(int64(len(rows))), outer.constant(np.array(True))
    graph = finished(inputs, outputs)
    outer.nodes.append(
        helper.make_node("Loop", [trips, go, first.name, *[nothing] * len(kept)], made, name="loop", body=graph)
    )
    return Symbol(outer, made[0])


def _aged(i: int, terms: Terms) -> dict[Aged, float]:
    return {(kind, i - row): factor for (kind, row), factor in terms}


def _of_row(body: Nodes, numbers: list[float]) -> Symbol | float:
    """A number of the row that the loop is at."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return Symbol(body, body.op("Gather", float32(numbers), "loop/row", axis=0))
