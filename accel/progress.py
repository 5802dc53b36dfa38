"""One progress bar for everything that takes long; where nobody sees a bar, a line for each stage."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from . import interrupt

Report = Callable[[str, float], None]

QUIET = "ACCEL_QUIET"  # environment variable; any value shows no progress, in child processes too
_SECONDS_BETWEEN_LINES = 30.0
_STEPS_BETWEEN_LINES = 50


@contextlib.contextmanager
def progress(
    title: str = "",
    *,
    steps: int | None = None,
    done: float = 0,
    keep: bool = False,
    shown: bool = True,
    console: Any = None,
) -> Iterator[Report]:
    """Show on stderr how far the body is: a bar in a terminal; in a pipe or a log file a line for each stage.

    Args:
        title: what the whole work is; stands before the bar.
        steps: how many steps there are, to count them; None for work that is measured as a fraction.
        done: steps that an earlier run has done.
        keep: leave the finished bar on the screen.
        shown: False shows nothing, for processes other than the first.
        console: a rich Console that the body prints on as well; by default one on stderr.

    Yields:
        A function of (text, done): what is being done now, and the fraction or the number of steps so far. Texts that
        differ in their numbers alone are one stage. It raises a KeyboardInterrupt that was lost (`accel.interrupt`).
    """
    from rich.console import Console

    console = console or Console(stderr=True, soft_wrap=True)
    if not shown or os.environ.get(QUIET):
        show: Any = contextlib.nullcontext(lambda text, done: None)
    elif console.is_terminal:
        show = _bar(console, title, steps, done, keep)
    else:
        show = _lines(console, title, steps, done)
    with show as update:

        def report(text: str, done: float) -> None:
            interrupt.check()
            update(text, done)

        yield report


@contextlib.contextmanager
def _bar(console: Any, title: str, steps: int | None, done: float, keep: bool) -> Iterator[Report]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def whole() -> Column:  # what stays readable in a narrow terminal
        return Column(no_wrap=True, min_width=1, overflow="ignore")

    # The text gets what the others leave of the line, and loses its end.
    rest = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    counter = () if steps is None else (MofNCompleteColumn(table_column=whole()),)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=whole()),
        BarColumn(bar_width=None if console.width < 40 else 10),
        *counter,
        TimeRemainingColumn(elapsed_when_finished=True, table_column=whole()),
        TextColumn("{task.fields[time]}", table_column=whole()),
        TextColumn("{task.fields[text]}", markup=False, table_column=rest),
    )
    with Progress(*columns, console=console, transient=not keep, expand=True) as bar:
        total = 1.0 if steps is None else steps
        task = bar.add_task(title, total=total, completed=done, text="", time="left,")

        def update(text: str, done: float) -> None:
            bar.update(task, completed=done, text=text, time="in all," if done >= total else "left,")

        yield update


@contextlib.contextmanager
def _lines(console: Any, title: str, steps: int | None, done: float) -> Iterator[Report]:
    began, first = time.monotonic(), done
    total = 1.0 if steps is None else steps
    stage, told = None, began
    last, written = "", ""

    def line(text: str, done: float, spent: float) -> str:
        so_far = f"{done:g}/{steps}" if steps else f"{100 * done:.0f} %"
        share = done - first
        left = f", {_clock(spent / share * (total - done))} left" if share > 0 and spent > 5 and done < total else ""
        return ": ".join(part for part in (title.strip(), f"{so_far}{left}", text) if part)

    def update(text: str, done: float) -> None:
        nonlocal stage, told, last, written
        now = time.monotonic()
        last = line(text, done, now - began)
        name = re.sub(r"\d+", "", text)
        due = done > first and done % _STEPS_BETWEEN_LINES == 0 if steps else name != stage
        if due or now - told >= _SECONDS_BETWEEN_LINES:
            stage, told, written = name, now, last
            console.print(last, markup=False, highlight=False)

    yield update
    if steps and last != written:  # counted work ends with its last figures
        console.print(last, markup=False, highlight=False)


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
