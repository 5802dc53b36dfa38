"""Whether an engine really runs here: a small product of matrices on it, in a process of its own, which may crash."""

from __future__ import annotations

import subprocess
import sys

from .base import Status
from .select import ENGINES, status

_CODE = "from importlib import import_module; print('ran:', import_module({module!r}).attempt())"


def attempt(name: str, *, seconds: float = 180) -> Status:
    """`status` of an engine and, where that is good, what it does with a small product.

    An engine's module has `attempt()` for this: it computes the product wherever the engine can, and returns where that
    was, in words. A module without it is taken at its word.
    """
    from importlib import import_module

    state = status(name)
    if not state.ok or not hasattr(import_module(ENGINES[name]), "attempt"):
        return state
    command = [sys.executable, "-c", _CODE.format(module=ENGINES[name])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return Status(False, f"{state.detail}, but a small product takes over {seconds:g} s", "name another engine")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"]
        detail = f"{state.detail}, but a small product fails: {lines[-1][:300]}"
        return Status(False, detail, "install its package again, or name another engine")
    ran = [line.removeprefix("ran: ") for line in done.stdout.splitlines() if line.startswith("ran: ")]
    return Status(True, f"{state.detail}; tried: {ran[-1]}")
