"""Sampling constants: how a model is meant to be sampled, as its `sampler.json` or the manifest of its bundle says."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError, unknown

_FIX = 'write {"name": "dpmpp_2m", "steps": 25, "guidance": 7.5}, or "timesteps": [999, 499] instead of "steps"'
# What may be said of a sampler beside its name and grid.
OPTIONS = ("eta", "sigmas", "timestep_spacing", "shift")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are sampled.

    Attributes:
        sampler: name of the sampler, usually a key of `accel.sampling.samplers.SAMPLERS`.
        guidance: scale of classifier-free guidance, at least 0; 0 and 1 mean none.
        steps: number of steps on the sampler's own grid; None where `timesteps` is given.
        timesteps: the grid itself, high noise first.
        options: further options of the sampler, as `accel.sampling.samplers.table` takes them.

    Raises:
        UserError: for a value outside these limits.
    """

    sampler: str
    guidance: float
    steps: int | None = None
    timesteps: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        grid = self.timesteps
        if grid is None and not (isinstance(self.steps, int) and _is_number(self.steps) and self.steps >= 1):
            raise UserError(f"invalid steps: {self.steps!r} (expected an integer >= 1)", _FIX)
        if grid is not None and not (
            isinstance(grid, (list, tuple)) and grid and all(_is_number(t) and t >= 0 for t in grid)
        ):
            raise UserError(f"invalid timesteps: {grid!r} (expected numbers >= 0, highest first)", _FIX)
        if not isinstance(self.options, Mapping) or not set(self.options) <= set(OPTIONS):
            raise UserError(f"invalid options: {self.options!r} (expected {', '.join(OPTIONS)})", _FIX)
        for name, value in self.options.items():
            text = name in ("sigmas", "timestep_spacing")
            if not (isinstance(value, str) if text else _is_number(value)):
                raise UserError(f"invalid {name}: {value!r} (expected a {'name' if text else 'number'})", _FIX)
        if not (_is_number(self.guidance) and self.guidance >= 0):
            raise UserError(
                f"invalid guidance: {self.guidance!r} (expected a number >= 0)",
                "0 for none, 3 to 12 for a guided model",
            )

    @classmethod
    def from_dict(cls, data: Any, where: str, known: Collection[str] | None = None) -> Sampling:
        """The constants of a JSON object: `name`, `guidance`, `steps` or `timesteps`, which goes first, and
        maybe `options`.

        Args:
            data: the object; other keys are ignored.
            where: what it is called in errors.
            known: names of the samplers that may be used; None for any.

        Raises:
            UserError: for anything else than such an object, and for an unknown sampler.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"{where} is not a JSON object", _FIX)
        name, timesteps = data.get("name"), data.get("timesteps")
        if not isinstance(name, str) or known is not None and name not in known:
            raise (
                unknown(f"sampler in {where}", name, known) if known else UserError(f"{where}: no sampler's name", _FIX)
            )
        try:
            return cls(
                sampler=name,
                guidance=data.get("guidance"),  # type: ignore[arg-type]
                steps=data.get("steps") if timesteps is None else None,
                timesteps=tuple(timesteps) if isinstance(timesteps, list) else timesteps,
                options=data.get("options") or {},
            )
        except UserError as error:
            raise UserError(f"{where}: {error.message}", error.fix) from None

    def as_dict(self) -> dict[str, Any]:
        """The same as a JSON object, as `from_dict` reads it."""
        grid = {"steps": self.steps} if self.timesteps is None else {"timesteps": list(self.timesteps)}
        made = {"name": self.sampler, **grid, "guidance": self.guidance}
        return made | ({"options": dict(self.options)} if self.options else {})

    @property
    def count(self) -> int:
        """Number of steps."""
        return len(self.timesteps) if self.timesteps is not None else self.steps or 0


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, of a size that a float can have."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
