"""One call of the UNet: the images of one request, or of several that are at different steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..arrays import cast, concat
from ..engines import Engine
from .sampling_plan import SamplingPlan


@dataclass(frozen=True)
class Part:
    """Images that are sampled by one plan and are at one step.

    Attributes:
        plan: says how many rows of the UNet's batch each image takes, and what becomes of its output.
        x: latents [n, C, h, w], float32.
        t: the timestep.
        feeds: what the UNet takes beside latents and timestep, by name, [rows * n, ...], in its own dtypes.
        extra: further input channels [n, c, h, w] for each row of an image; empty for none.
    """

    plan: SamplingPlan
    x: Any
    t: float
    feeds: Mapping[str, Any]
    extra: Sequence[Any] = field(default=())

    @property
    def rows(self) -> int:
        return self.plan.rows * len(self.x)

    @property
    def sample(self) -> Any:
        """The latents as they lie in the UNet's batch."""
        if not self.extra:
            return self.x if self.plan.rows == 1 else concat([self.x] * self.plan.rows)
        rows = [concat([self.x, more], axis=1) for more in self.extra]
        return rows[0] if self.plan.rows == 1 else concat(rows)


def predict(
    unet: Engine,
    parts: Sequence[Part],
    *,
    rows: int = 0,
    add: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> list[Any]:
    """What the UNet predicts for each part, guidance done: float32 [n, C, h, w] each.

    Args:
        parts: of one size; with a UNet that has one timestep for its whole batch, also at one timestep.
        rows: size of the batch that the engine is called with, filled up with the last row; 0 for what the parts need.
        add: (the other inputs) -> more inputs, such as a ControlNet's.
    """
    spec = {s.name: s for s in unet.component.inputs}
    used = sum(part.rows for part in parts)
    lacking = max(rows - used, 0)

    def joined(values: Sequence[Any]) -> Any:
        values = [*values, *[values[-1][-1:]] * lacking]
        return values[0] if len(values) == 1 else concat(values)

    t: Any = parts[0].t
    if spec["timestep"].shape:
        t = [part.t for part in parts for _ in range(part.rows)]
        t += t[-1:] * lacking
    inputs = {name: joined([part.feeds[name] for part in parts]) for name in parts[0].feeds}
    inputs["sample"] = cast(joined([part.sample for part in parts]), spec["sample"].dtype)
    inputs["timestep"] = np.asarray(t, spec["timestep"].dtype)
    out = cast(unet(**inputs, **(add(inputs) if add else {}))["out_sample"], "float32")
    ends = np.cumsum([part.rows for part in parts])
    return [part.plan.combined(out[end - part.rows : end]) for part, end in zip(parts, ends, strict=True)]
