"""Monitors: known signs of a failing run in its figures, reported while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

WINDOW = 50  # values of a figure that are averaged


@dataclass(frozen=True)
class Monitor:
    """A figure whose mean over `WINDOW` values must stay below a bound.

    Attributes:
        figure: as in losses.jsonl.
        above: the bound.
        means: what it means for the run if the mean is above it.
        fix: what to type next.
    """

    figure: str
    above: float
    means: str
    fix: str


class Watch:
    """Reports each monitor once."""

    def __init__(self, monitors: Sequence[Monitor]):
        self._open = list(monitors)
        self._values: dict[str, deque[float]] = {one.figure: deque(maxlen=WINDOW) for one in monitors}

    def see(self, figures: Mapping[str, float]) -> Iterator[str]:
        """The messages of the monitors whose bound these figures pass."""
        for name, values in self._values.items():
            if name in figures:
                values.append(figures[name])
        for one in tuple(self._open):
            values = self._values[one.figure]
            mean = sum(values) / len(values) if len(values) == WINDOW else 0.0
            if mean > one.above:
                self._open.remove(one)
                yield f"{one.figure} is {mean:.3g} on average of {WINDOW} values: {one.means}\n  try: {one.fix}"
