"""The progress bar: what it shows where, and that an interrupt is not lost in it."""

from __future__ import annotations

import io
import re

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


def test_a_log_gets_a_line_for_each_stage_and_not_for_each_number():
    console = screen()
    with progress("export", console=console) as report:
        for i in range(100):
            report(f"round {i} of 100", i / 200)
        report("[unet]", 0.5)
    assert console.file.getvalue().splitlines() == ["export: 0 %: round 0 of 100", "export: 50 %: [unet]"]


def test_long_stages_say_from_time_to_time_how_much_is_left(monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("accel.progress.time.monotonic", lambda: next(clock))
    console = screen()
    with progress(steps=10, console=console) as report:
        for i in range(1, 5):
            report(f"loss {i}", i)
    assert console.file.getvalue().splitlines() == ["3/10, 0:01:10 left: loss 3", "4/10, 0:01:00 left: loss 4"]


@pytest.mark.parametrize("quiet", ["argument", "environment"])
def test_nothing_is_printed_where_nobody_wants_it(quiet, monkeypatch):
    console = screen(force_terminal=True)
    if quiet == "environment":
        monkeypatch.setenv("ACCEL_QUIET", "1")
    with progress("export", console=console, keep=True, shown=quiet != "argument") as report:
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


@pytest.mark.parametrize("width", [80, 60])
def test_step_and_time_left_are_whole_in_a_narrow_terminal(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, legacy_windows=False)
    long = "generator/loss 0.0791 generator/matching 0.0077 generator/adversarial 0.7138 critic/loss 1.1865"
    with progress("training", steps=390_000, done=0, keep=True, console=console) as report:
        report(long, 12_345)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).rsplit("\r")[-1].rstrip("\n").split("\n")[-1]
    assert "training" in last and "12345/390000" in last and "left," in last and "generator/l" in last
    assert re.search(r"\d:\d\d|-:--", last) and len(last) <= width


def test_counted_work_gets_a_line_every_fifty_steps_in_a_log():
    out = io.StringIO()
    with progress("training", steps=120, console=Console(file=out, width=200)) as report:
        for step in range(1, 121):
            report(f"loss {1 / step:.4f}", step)
    assert [line.split()[1].rstrip(":") for line in out.getvalue().splitlines()] == ["50/120", "100/120", "120/120"]
