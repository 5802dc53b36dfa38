"""What a component takes and gives: names, dtypes and symbolic shapes, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UserError
from .shape_profiles import Range

# Numbers that are not activations: a timestep, a noise level or a size in pixels is exact in float32 only.
EXACT_INPUTS = ("timestep", "time_ids", "c_noise")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a component.

    Attributes:
        name: as in the ONNX graph.
        dtype: a numpy-style name out of `accel.dtypes.TENSORS`.
        shape: one int or one symbolic dimension name per axis; () for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def is_activation(self) -> bool:
        """Whether this tensor follows the network's dtype."""
        return "float" in self.dtype and self.name not in EXACT_INPUTS

    def concrete(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given values of the symbolic dimensions."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)


def dtype_name(array: Any) -> str:
    """The numpy-style dtype name of a numpy array or a torch tensor."""
    return str(array.dtype).removeprefix("torch.")


def check(
    component: str, specs: tuple[TensorSpec, ...], dims: Mapping[str, Range], profile: str, feeds: Mapping[str, Any]
) -> None:
    """Check names, dtypes and shapes of what is about to be fed to a component.

    Raises:
        UserError: naming the tensor, what it is, what it may be, and the profile that says so.
    """
    expected = {spec.name for spec in specs}
    if expected != set(feeds):
        missing, extra = sorted(expected - set(feeds)), sorted(set(feeds) - expected)
        problem = "; ".join(
            part
            for part in (missing and f"missing {', '.join(missing)}", extra and f"unknown {', '.join(extra)}")
            if part
        )
        raise UserError(f"{component}: {problem}", f"it takes exactly: {', '.join(sorted(expected))}")
    sizes: dict[str, int] = {}
    for spec in specs:
        array = feeds[spec.name]
        if not hasattr(array, "dtype") or not hasattr(array, "shape"):
            raise UserError(
                f"{component}: {spec.name} is a {type(array).__name__}, not an array", "pass a numpy array or a tensor"
            )
        if dtype_name(array) != spec.dtype:
            raise UserError(
                f"{component}: {spec.name} is {dtype_name(array)}, not {spec.dtype}", f"convert it to {spec.dtype}"
            )
        shape = tuple(array.shape)
        if len(shape) != len(spec.shape):
            raise UserError(f"{component}: {spec.name} has shape {shape}", f"it takes {_shape_text(spec, dims)}")
        for axis, (size, dim) in enumerate(zip(shape, spec.shape, strict=True)):
            wanted = sizes.setdefault(dim, size) if isinstance(dim, str) else dim
            if size != wanted:
                what = dim if isinstance(dim, str) else f"axis {axis}"
                raise UserError(
                    f"{component}: {spec.name} has shape {shape}, where {what} should be {wanted}",
                    f"it takes {_shape_text(spec, dims)} under profile {profile!r}",
                )
            if isinstance(dim, str) and not dims[dim].admits(size):
                raise UserError(
                    f"{component}: {dim.replace('_', ' ')} {size} is outside profile {profile!r} ({dims[dim]})",
                    "ask for a size the profile allows, or export again (TensorRT: build again) with another --profile",
                )


def _shape_text(spec: TensorSpec, dims: Mapping[str, Range]) -> str:
    return "[" + ", ".join(f"{d}: {dims[d]}" if isinstance(d, str) else str(d) for d in spec.shape) + "]"
