"""Where engines run and in what: to answer `.to(device)` and `.to(dtype)`, which cannot move what is compiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..dtypes import SHORT
from ..errors import UserError
from .base import Engine


@dataclass(frozen=True)
class Place:
    """A device such as "cpu" or "cuda:0", and a dtype such as "float32"."""

    device: str
    dtype: str

    @classmethod
    def of(cls, engine: Engine) -> Place:
        compute = getattr(engine, "dtype", engine.component.dtype)
        return cls(_device(getattr(engine, "device", "cpu")), _dtype(compute))

    @classmethod
    def of_module(cls, module: Any) -> Place:
        """Of a network of diffusers or transformers."""
        return cls(_device(module.device), _dtype(module.dtype))


def check_move(what: str, places: Mapping[str, Place], args: Sequence[Any], named: Mapping[str, Any], fix: str) -> None:
    """Refuse a move, unless everything is there already.

    Args:
        what: whose `.to` it was, for people.
        places: where its parts are.
        args, named: as `.to` got them: a device (text, number or `torch.device`), a dtype, or both.
        fix: what to do instead; "{options}" in it becomes the options of `accel.load` that ask for the same.

    Raises:
        UserError: naming the first part that is elsewhere.
    """
    given = [*args, *(named.get(name) for name in ("device", "torch_device", "dtype", "torch_dtype"))]
    for value in (value for value in given if value is not None):
        is_dtype = type(value).__name__ == "dtype" or isinstance(value, str) and value in SHORT.values()
        key, wanted = ("dtype", _dtype(value)) if is_dtype else ("device", _device(value))
        for name, place in places.items():
            if getattr(place, key) != wanted:
                short = next((short for short, dtype in SHORT.items() if dtype == wanted), str(value))
                raise UserError(
                    f"{what} cannot be moved to {wanted}: its {name} is loaded for {getattr(place, key)}",
                    fix.format(options=f"{key}={short!r}"),
                )


def _device(value: Any) -> str:
    text = f"cuda:{value}" if isinstance(value, int) else str(value).lower()
    return {"cuda": "cuda:0", "cpu:0": "cpu"}.get(text, text)


def _dtype(value: Any) -> str:
    return str(value).removeprefix("torch.")
