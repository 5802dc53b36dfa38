"""Figures of a step: summed on the device, and read when they are there, so that nobody waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


class OnTheWay:
    """Numbers of the device that are copied to the host behind the work that is queued.

    On a GPU `read` waits for that work alone, and not for what was queued after it.
    """

    def __init__(self, values: torch.Tensor):
        self._values = values.detach().to("cpu", non_blocking=True)
        self._there: torch.cuda.Event | None = None
        if values.is_cuda:
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        if self._there is not None:
            self._there.synchronize()
        return self._values.tolist()


@dataclass
class Turn:
    """The figures of one turn of a step, by name; `rate` is known on the host."""

    phase: str
    names: Sequence[str]
    values: OnTheWay
    rate: float

    def read(self) -> dict[str, float]:
        return dict(zip(self.names, self.values.read(), strict=True))


@dataclass
class Step:
    """A step whose work is queued: its number (from 1), its turns, and the names of its images."""

    number: int
    turns: Sequence[Turn]
    images: Sequence[str]


def stacked(values: Sequence[torch.Tensor | float], device: torch.device) -> torch.Tensor:
    """Scalars as one float32 tensor [n] on the device, where the tensors among them are."""
    return torch.stack(
        [
            value.detach().float().reshape(()).to(device)
            if isinstance(value, torch.Tensor)
            else torch.full((), value, device=device)
            for value in values
        ]
    )
