"""An interrupt that falls where Python drops exceptions still arrives."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from accel import interrupt

LOST = """
import os, signal, weakref
from accel import interrupt

signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt.install()

class Thing:
    pass

def callback(reference):
    os.kill(os.getpid(), signal.SIGINT)
    sum(range(10**6))  # the handler runs in here, and Python drops what it raises

thing = Thing()
reference = weakref.ref(thing, callback)
del thing
print("went on")
interrupt.check()
print("was lost")
"""


def test_an_interrupt_in_a_weak_reference_callback_is_raised_at_the_next_stage():
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True)
    assert "went on" in done.stdout and "was lost" not in done.stdout
    assert done.returncode != 0 and "KeyboardInterrupt" in done.stderr


def test_without_an_interrupt_nothing_happens_and_another_handler_stays(monkeypatch):
    interrupt.check()
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGINT, mine)
    try:
        interrupt.install()
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(interrupt, "_requested", True)
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()
    interrupt.check()  # once is enough
