"""Names of dtypes: the short ones of the command line, the numpy-style ones of the manifest, and torch's."""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SHORT = MappingProxyType({"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"})
FLOATS = tuple(SHORT.values())
BYTES = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})
TENSORS = (*FLOATS, "int64", "int32")  # what the inputs and outputs of a component may be

# Precisions of an export. Quantized ones are made from a float32 bundle (`export.int8.quantize`): the value is the
# number format (`accel.int8.formats`), and the dtype of everything else; `auto` keeps int8 only where it is faster.
PRECISIONS = ("fp32", "fp16")
QUANTIZED = MappingProxyType(
    {
        "int8": ("int8", "float32"),
        "int8-fp16": ("int8", "float16"),
        "fp8": ("fp8", "float16"),
        "int8-weight-only": ("int8-weight-only", "float32"),
        "int4-weight-only": ("int4-weight-only", "float32"),
        "int8-weight-only-fp16": ("int8-weight-only", "float16"),
        "int4-weight-only-fp16": ("int4-weight-only", "float16"),
        "auto": ("int8", "float32"),
    }
)

# Modules that stay float32 in a lower graph: the embeddings of time and size feed every block and take no time, so
# rounding them loses accuracy and gains nothing.
ALWAYS_FLOAT32 = ("time_embedding", "add_embedding")


def torch_dtype(name: str, known: Collection[str] = (*SHORT, *TENSORS), what: str = "dtype") -> torch.dtype:
    """torch's dtype of a short or a numpy-style name: of fp16 as of float16.

    Args:
        known: the names that may be given here.
        what: what the error calls it.

    Raises:
        UserError: for a name that is not one of `known`.
    """
    check_dtype(name, known, what)
    import torch

    return getattr(torch, SHORT.get(name, name))


def check_dtype(name: str, known: Collection[str], what: str = "dtype") -> None:
    """Raises a UserError for a name that is not one of `known`, without importing torch."""
    from .errors import unknown

    if name not in known:
        raise unknown(what, name, known)
