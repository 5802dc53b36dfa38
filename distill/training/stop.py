"""Stop a run on a signal, after the current step and with a checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Any


class Stop:
    """Ctrl-C or SIGTERM ends the run after the current step; a second one ends it at once."""

    def __init__(self, accelerator: Any):
        self.accelerator, self.wanted, self.before = accelerator, False, {}
        self.agreed = False  # by all processes: the figures of a step tell each whether another was asked

    def __enter__(self) -> Stop:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the caller's business then
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
        if self.accelerator.is_main_process:  # not print: a signal may come in the middle of one
            os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    def asked(self) -> bool:
        """Whether any process was asked to stop; all of them agree."""
        return self.wanted if self.accelerator.num_processes == 1 else self.agreed
