"""The number formats of quantized layers, as data and without torch.

int8 and fp8 round activations too, so that engines multiply in the format. The weight-only ones store weights and
multiply in float: they save memory, and speed only where reading weights is what takes the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Format:
    """How a layer's numbers are stored: multiples of a scale, within a range.

    Attributes:
        name: as `--precision` has it.
        stored: torch's dtype of stored weights; int4 weights are pairs in uint8, the first in the low half.
        low, high: least and largest number, in units of the scale.
        opset: first ONNX opset whose DequantizeLinear reads it.
        activations: whether activations are rounded too.
        evenly: whether its numbers are evenly spaced. Those of fp8 are not: a large value among small ones costs them
            no accuracy, so begin-of-text tokens need no exclusion.
        bits: of a stored weight.
        blocked: whether a weight has a scale for each block of inputs, not only for each output.
        capability: least CUDA compute capability that multiplies in it, as 89 for 8.9; 0 for all of TensorRT's.
    """

    name: str
    stored: str
    low: float
    high: float
    opset: int = 18
    activations: bool = True
    evenly: bool = True
    bits: int = 8
    blocked: bool = False
    capability: int = 0


INT8 = Format("int8", "int8", -128, 127)
# E4M3FN (Micikevicius et al. 2022, arXiv 2209.05433): 448 is the largest number, there is no infinity.
FP8 = Format("fp8", "float8_e4m3fn", -448, 448, opset=19, evenly=False, capability=89)
INT8_WEIGHTS = Format("int8-weight-only", "int8", -128, 127, activations=False)
INT4_WEIGHTS = Format("int4-weight-only", "uint8", -8, 7, opset=21, activations=False, bits=4, blocked=True)
FORMATS: Mapping[str, Format] = MappingProxyType({own.name: own for own in (INT8, FP8, INT8_WEIGHTS, INT4_WEIGHTS)})
BLOCKS = (32, 64, 128)  # inputs that share a scale, of int4 weights

_BLOCK = "block-"


def of_layer(traits: Sequence[str]) -> tuple[Format, int]:
    """The format of a layer, and its block (0 for none), by its traits in a manifest; int8 is not written there."""
    form = next((FORMATS[trait] for trait in traits if trait in FORMATS), INT8)
    return form, next((int(trait.removeprefix(_BLOCK)) for trait in traits if trait.startswith(_BLOCK)), 0)


def as_traits(form: Format, block: int) -> list[str]:
    """What `of_layer` reads."""
    return [form.name] * (form is not INT8) + [f"{_BLOCK}{block}"] * bool(block)


def for_layer(form: Format, block: int, shape: Sequence[int]) -> tuple[Format, int]:
    """The format of a layer of a network: int4 is for linear layers that whole blocks fit into, int8 for the others.

    Args:
        shape: of its weight, [out, in, ...]; empty for a product of activations.
    """
    if not form.blocked:
        return form, 0
    fits = len(shape) == 2 and shape[1] % block == 0 and shape[0] % 2 == 0
    return (form, block) if fits else (INT8_WEIGHTS, 0)
