"""Ctrl-C that is never lost.

Python drops an exception that is raised inside a weak-reference or garbage-collection callback, and tracing a network
runs thousands of those: an interrupt that falls into one would vanish. So it is also remembered, and raised again at
the next stage of whatever is going on.
"""

from __future__ import annotations

import signal
import sys

_requested = False


def install() -> None:
    """Remember interrupts from now on; where the caller has its own handler, or none, that stays."""
    global _requested
    _requested = False
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _remember)
        sys.unraisablehook = _report_dropped


def _remember(number, frame) -> None:
    global _requested
    _requested = True
    raise KeyboardInterrupt


def _report_dropped(dropped) -> None:
    """Python's report of an exception it drops, except for an interrupt, which is not lost here."""
    if not isinstance(dropped.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(dropped)


def check() -> None:
    """Raise the interrupt that was lost; called between stages of long work."""
    global _requested
    if _requested:
        _requested = False
        raise KeyboardInterrupt
