"""What a run must know of every image before it starts: its size, and numbers such as an aesthetic score.

Processes divide the rows among themselves in files that stay in the run folder, so a run that goes on reads nothing
again.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from accel import interrupt
from accel.errors import UserError
from accel.files import digest_of, disk_error, write_bytes

from ..sources.item import BrokenItem, ImageSource
from . import distributed

ROWS = 4096  # in one file
PATIENCE = 3600.0  # seconds without a new file from the other processes
_THREADS = 8


@dataclass(frozen=True, eq=False)
class Survey:
    """By row; NaN where it is not known.

    Attributes:
        sizes: (width, height) in pixels, float64 [rows, 2].
        score: the value of the column asked for, float64 [rows].
    """

    sizes: np.ndarray
    score: np.ndarray


def survey(
    source: ImageSource,
    folder: Path,
    *,
    sizes: bool = True,
    column: str = "",
    rank: int = 0,
    world: int = 1,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Survey:
    """Look at every row once. All processes of a run call it.

    Args:
        folder: where the files lie.
        sizes: read the sizes, which takes the header of every image.
        column: of the score; "" for none.
        progress: called with the share of this process's rows that is done.

    Raises:
        UserError: when the disk does not take the files, or the other processes have stopped.
    """
    name = digest_of(dict(data=source.identity, sizes=sizes, column=column))[:20]
    starts = range(0, len(source), ROWS)
    files = [folder / f"{name}-{start // ROWS:05}.npy" for start in starts]
    own = [(start, file) for start, file in list(zip(starts, files, strict=True))[rank::world] if not file.is_file()]
    try:
        for done, (start, file) in enumerate(own):
            progress(done / len(own))
            held = io.BytesIO()
            np.save(held, _look(source, range(start, min(start + ROWS, len(source))), sizes, column))
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(file, held.getvalue())
    except OSError as error:
        raise disk_error(error, folder) from error
    progress(1.0)
    if missing := distributed.wait_for_files(files, PATIENCE):
        raise UserError(
            f"{len(missing)} files are missing in {folder}; nothing new has come for {PATIENCE:g} seconds",
            "a process of this run has stopped; start again: what is finished is kept",
        )
    try:
        found = np.concatenate([np.zeros((0, 3)), *(np.load(file, allow_pickle=False) for file in files)])
        if found.shape != (len(source), 3):
            raise ValueError(f"{len(found)} rows")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"the survey in {folder} is damaged ({error})", f"delete it: rm -r {folder}") from None
    return Survey(found[:, :2], found[:, 2])


def _look(source: ImageSource, rows: Sequence[int], sizes: bool, column: str) -> np.ndarray:
    """Width, height and score, float64 [rows, 3]."""

    def one(row: int) -> tuple[float, float, float]:
        interrupt.check()
        wide = high = score = float("nan")
        try:
            wide, high = source.size(row) if sizes else (wide, high)
            score = _number(source.value(row, column)) if column else score
        except BrokenItem:
            pass  # it is named when it is to be used, or where it is left out
        return wide, high, score

    with ThreadPoolExecutor(_THREADS) as pool:
        return np.array(list(pool.map(one, rows)), np.float64).reshape(-1, 3)


def _number(value: object) -> float:
    """A number, or text that is one, as CSV has it; NaN for anything else."""
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except ValueError:
        return float("nan")
