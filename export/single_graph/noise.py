"""`accel.sampling.counter_noise` as ONNX nodes: the same words on every engine.

The rounds of Philox multiply and xor words of 32 bits. Engines differ in what they do with such integers: OpenVINO's
CPU plugin divides int32 in float32, int64 becomes int32 there, and TensorRT has no shifts. So a word is 32 zeros and
ones here, an xor is the absolute difference, a product is a sum of nibbles times digits of the multiplier, and no
number in between reaches 2**24: int32 and float32 compute the same, exactly.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from accel.sampling.counter_noise import BUMPS, MULTIPLIERS, ROUNDS

from .nodes import Nodes, Value, float32, int32, int64

# Above it a position is no longer exact in float32.
MOST_POSITIONS = 1 << 24
_HALF = 1 << 16


def normal(nodes: Nodes, seed: str, draws: list[int], count: Value) -> str:
    """Standard normal float32 [images, len(draws) * count] of seeds int32 [images].

    Args:
        draws: as `accel.sampling.counter_noise.normal` counts them.
        count: numbers in one image's latents, int32 [].
    """
    return box_muller(nodes, *words(nodes, seed, draws, count))


def box_muller(nodes: Nodes, first: str, second: str) -> str:
    """Standard normal float32 numbers of two words each; with the sine alone."""
    first, second = (_as_float(nodes, halves) for halves in (first, second))
    unit = nodes.op("Add", nodes.op("Mul", first, float32(2.0**-32)), float32(2.0**-33))
    angle = nodes.op("Add", nodes.op("Mul", second, float32(np.pi * 2.0**-31)), float32(np.pi * 2.0**-32))
    radius = nodes.op("Sqrt", nodes.op("Mul", nodes.op("Log", unit), float32(-2.0)))
    return nodes.op("Mul", radius, nodes.op("Sin", angle))


def model(draws: list[int], count: int, opset: int = 20) -> onnx.ModelProto:
    """The noise as a graph of its own.

    `seed` int32 [images] to `noise` float32 [images, len(draws) * count] and the words that it is made of, `first` and
    `second` int32 [images, 2, len(draws) * count], low halves before high ones.
    """
    nodes, positions = Nodes("noise"), len(draws) * count
    pair = words(nodes, "seed", draws, int32(count))
    for name, value in zip(("first", "second", "noise"), (*pair, box_muller(nodes, *pair)), strict=True):
        nodes.op("Identity", value, name=name)
    value = onnx.helper.make_tensor_value_info
    outputs = [value(name, TensorProto.INT32, ["images", 2, positions]) for name in ("first", "second")]
    outputs += [value("noise", TensorProto.FLOAT, ["images", positions])]
    inputs = [value("seed", TensorProto.INT32, ["images"])]
    graph = onnx.helper.make_graph(nodes.nodes, "noise", inputs, outputs, list(nodes.constants.values()))
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def words(nodes: Nodes, seed: str, draws: list[int], count: Value) -> tuple[str, str]:
    """The first two words of Philox4x32-10 for every position, int32 [images, 2, positions]: low half, high half."""
    keys = _keys(nodes, seed)
    element = nodes.op("Mul", nodes.op("Range", int32(0), count, int32(1)), int32(np.ones((len(draws), 1))))
    draw = nodes.op("Add", nodes.op("Mul", element, int32(0)), _column(draws))
    # The counter is (draw, 0, element, 0). Words are in pairs: even ones (0, 2) and odd ones (1, 3).
    start = [draw, element]
    pair = nodes.op("Concat", *(nodes.op("Reshape", part, int64([1, 1, 1, -1])) for part in start), axis=0)
    # Positions are the last axis, so that kernels run along them.
    nibbles = nodes.op("Div", pair, _column([16**i for i in range(6)] + [_NEVER, _NEVER]))
    nibbles = _modulo(nodes, nibbles, 16)
    odd = int32(np.zeros((2, 1, 32, 1)))
    table = int32([[_digits(factor << 4 * i) for i in range(8)] for factor in MULTIPLIERS])[:, None, ..., None]
    for i in range(ROUNDS):
        product = nodes.op("Mul", nodes.op("Unsqueeze", nibbles, int64([3])), table)
        product = _carried(nodes, nodes.op("ReduceSum", product, int64([2]), keepdims=0))
        product = nodes.op("Gather", product, int64([1, 0]), axis=0)
        bits = _bits(nodes, product)
        lower, upper = (_part(nodes, bits, at, at + 32) for at in (0, 32))
        key = nodes.op("Gather", keys, int64(i), axis=0)
        even = _xor(nodes, _xor(nodes, upper, odd), key)
        odd = lower
        grouped = nodes.op("Reshape", even, int64([0, 0, 8, 4, -1]))
        nibbles = nodes.op("ReduceSum", nodes.op("Mul", grouped, _column([1, 2, 4, 8])), int64([3]), keepdims=0)
    made = []
    for state in (even, odd):
        first = nodes.op("Gather", state, int64(0), axis=0)
        halves = nodes.op("Reshape", first, int64([0, 2, 16, -1]))
        weighted = nodes.op("Mul", halves, _column([1 << j for j in range(16)]))
        made.append(nodes.op("ReduceSum", weighted, int64([2]), keepdims=0))
    return made[0], made[1]


_NEVER = MOST_POSITIONS  # what no position reaches: a digit that is 0


def _keys(nodes: Nodes, seed: str) -> str:
    """The keys of all rounds as bits, int32 [rounds, 2, images, 32, 1]: (seed, 0), and a constant more every round."""
    upper = nodes.op("Div", seed, int32(_HALF))
    lower = nodes.op("Sub", seed, nodes.op("Mul", upper, int32(_HALF)))
    # A division in float32 rounds a large seed up: then the lower half is below 0, and the upper one is 1 too large.
    more = nodes.op("Cast", nodes.op("Less", lower, int32(0)), to=6)
    upper, lower = nodes.op("Sub", upper, more), nodes.op("Add", lower, nodes.op("Mul", more, int32(_HALF)))
    steps = np.array([[i * bump % 2**32 for bump in BUMPS] for i in range(ROUNDS)])[..., None]
    own = int32([[[1], [0]]])  # the second word of the key is 0
    low, high = (
        nodes.op("Add", nodes.op("Mul", own, nodes.op("Reshape", half, int64([1, 1, -1]))), int32(more))
        for half, more in ((lower, steps % _HALF), (upper, steps // _HALF))
    )
    pair = nodes.op("Concat", *(nodes.op("Unsqueeze", half, int64([3, 4])) for half in (low, high)), axis=3)
    return _bits(nodes, _carried(nodes, pair, 2), [ROUNDS, 2, -1, 32, 1])


def _column(numbers: list[int]) -> np.ndarray:
    """Numbers along the last axis but one."""
    return int32(numbers)[:, None]


def _digits(number: int) -> list[int]:
    """The lowest 64 bits as four digits of 16 bits, the lowest first."""
    return [number >> 16 * i & (_HALF - 1) for i in range(4)]


def _carried(nodes: Nodes, limbs: str, count: int = 4) -> str:
    """Sums of digits [..., count, positions] as digits below 2**16."""
    made, carry = [], ""
    for i in range(count):
        limb = _part(nodes, limbs, i, i + 1)
        limb = nodes.op("Add", limb, carry) if carry else limb
        carry = nodes.op("Div", limb, int32(_HALF))
        made.append(nodes.op("Sub", limb, nodes.op("Mul", carry, int32(_HALF))))
    return nodes.op("Concat", *made, axis=-2)


def _bits(nodes: Nodes, limbs: str, shape: list[int] | None = None) -> str:
    """Digits of 16 bits [..., digits, positions] as bits, the lowest first."""
    each = nodes.op("Div", nodes.op("Unsqueeze", limbs, int64([-2])), _column([1 << i for i in range(17)]))
    doubled = nodes.op("Mul", _part(nodes, each, 1, 17), int32(2))
    return nodes.op("Reshape", nodes.op("Sub", _part(nodes, each, 0, 16), doubled), int64(shape or [0, 0, 64, -1]))


def _modulo(nodes: Nodes, value: str, divisor: int) -> str:
    whole = nodes.op("Mul", nodes.op("Div", value, int32(divisor)), int32(divisor))
    return nodes.op("Sub", value, whole)


def _xor(nodes: Nodes, a: str, b: str | np.ndarray) -> str:
    return nodes.op("Abs", nodes.op("Sub", a, b))


def _part(nodes: Nodes, value: str, start: int, end: int) -> str:
    return nodes.op("Slice", value, int64([start]), int64([end]), int64([-2]))


def _as_float(nodes: Nodes, halves: str) -> str:
    """Words [images, 2, positions] as float32 [images, positions], rounded once."""
    low, high = (nodes.op("Gather", halves, int64(i), axis=1) for i in (0, 1))
    low, high = (nodes.op("Cast", part, to=1) for part in (low, high))
    return nodes.op("Add", nodes.op("Mul", high, float32(_HALF)), low)
