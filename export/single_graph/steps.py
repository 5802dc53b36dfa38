"""A sampler's rows as nodes: the loop of `accel.sampling.linear` itself runs on tensors that are names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accel.errors import UserError
from accel.sampling.linear import Table

from .nodes import Nodes, float32


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
