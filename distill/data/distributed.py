"""Processes that share a piece of work wait for each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from accel import interrupt
from accel.errors import UserError

PATIENCE = 3600.0  # seconds without any news from the other processes


def grouped() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier() -> None:
    if grouped():
        torch.distributed.barrier()


def meet(files: Sequence[Path]) -> None:
    """Wait until all processes have done their share, of which each leaves some of the files.

    First by looking for them, because a share may take hours and a barrier gives up after minutes; then at a barrier,
    because a file may be there from an earlier run and just be found damaged.

    Raises:
        UserError: when nothing new has come for an hour.
    """
    waiting, since = list(files), time.monotonic()
    while missing := [file for file in waiting if not file.is_file()]:
        if len(missing) < len(waiting):
            since = time.monotonic()
        if time.monotonic() - since > PATIENCE:
            raise UserError(
                f"{len(missing)} files are missing in {missing[0].parent}, the first one {missing[0].name}; "
                f"nothing new has come for {PATIENCE:.0f} seconds",
                "a process of this run has stopped; start again: what is finished is kept",
            )
        waiting = missing
        interrupt.check()
        time.sleep(0.2)
    barrier()
