"""One progress bar for everything that takes long. rich is imported when a bar is shown."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from . import interrupt

Report = Callable[[str, float], None]


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
    """Show a progress bar on stderr while the body runs.

    Args:
        title: what the whole work is; stands before the bar.
        steps: how many steps there are, to count them; None for work that is measured as a fraction.
        done: steps that an earlier run has done.
        keep: leave the finished bar on the screen, and in a log file. A bar that goes is shown on a terminal only.
        shown: False shows nothing, for processes other than the first.
        console: a rich Console that the body prints on as well; by default one on stderr.

    Yields:
        A function of (text, done): what is being done now, and the fraction or the number of steps so far. It raises
        a KeyboardInterrupt that was lost (`accel.interrupt`).
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = console or Console(stderr=True)
    counter = () if steps is None else (MofNCompleteColumn(),)
    words = [TextColumn("{" + field + "}", markup=False) for field in ("task.description", "task.fields[text]")]
    columns = (words[0], BarColumn(), *counter, TimeElapsedColumn(), TimeRemainingColumn(), words[1])
    silent = not shown or not (keep or console.is_terminal)
    with Progress(*columns, console=console, transient=not keep, disable=silent) as bar:
        task = bar.add_task(title, total=1.0 if steps is None else steps, completed=done, text="")

        def report(text: str, done: float) -> None:
            interrupt.check()
            bar.update(task, completed=done, text=text)

        yield report
