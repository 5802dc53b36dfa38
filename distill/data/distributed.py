"""Processes that share a piece of work wait for each other's files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from accel import interrupt

POLL = 0.2  # seconds between two looks


def grouped() -> bool:
    """Whether there is a process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def barrier() -> None:
    if grouped():
        torch.distributed.barrier()


def wait_for_files(
    files: Sequence[Path], patience: float, progress: Callable[[int], None] = lambda there: None
) -> list[Path]:
    """Wait until every process has written its files: a share may take hours, and a barrier gives up after minutes.

    Args:
        files: of all processes together.
        patience: seconds without a new file after which to give up.
        progress: called with the number of files that are there.

    Returns:
        The files that are missing when it gives up; none where all are there.
    """
    missing, since = list(files), time.monotonic()
    while True:
        still = [file for file in missing if not file.is_file()]
        if len(still) < len(missing):
            since = time.monotonic()
        missing = still
        progress(len(files) - len(missing))
        if not missing or time.monotonic() - since > patience:
            return missing
        interrupt.check()
        time.sleep(POLL)
