"""The progress bar: what it shows where, and that an interrupt is not lost in it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from accel import interrupt
from accel.progress import progress


def screen(**options) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def test_a_kept_bar_leaves_title_count_and_last_words():
    console = screen()
    with progress("training", steps=10, done=4, keep=True, console=console) as report:
        report("loss [0.5]", 10)  # brackets are not markup
    text = console.file.getvalue()
    assert all(word in text for word in ("training", "10/10", "loss [0.5]"))


@pytest.mark.parametrize("options", [{}, {"shown": False, "keep": True}])
def test_nothing_is_printed_where_nobody_looks(options):
    console = screen()
    with progress("export", console=console, **options) as report:
        report("unet", 0.5)
    assert console.file.getvalue() == ""


def test_a_terminal_shows_a_bar_that_goes_away():
    console = screen(force_terminal=True)
    with progress("export", console=console) as report:
        report("unet", 0.5)
    assert "unet" in console.file.getvalue()


def test_a_lost_interrupt_is_raised_at_the_next_report(monkeypatch):
    monkeypatch.setattr(interrupt, "_requested", True)
    with pytest.raises(KeyboardInterrupt), progress(console=screen()) as report:
        report("unet", 0.5)
