"""What every verb has in common: usage, help, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from accel.cli import VERBS


@pytest.mark.parametrize(
    "args",
    [
        ["explode"],
        ["expotr", "a", "b"],
        ["--frobnicate"],
        ["run"],
        ["run", "bundle"],
        ["export"],
        ["export", "model"],
        ["run", "bundle", "--prompt"],
        ["run", "bundle", "--prompt", "x", "--steps", "many"],
        ["run", "bundle", "--prompt", "x", "--frobnicate"],
        ["inspect", "a", "b"],
        ["doctor", "me"],
        ["export", "a", "b", "--opset", "new"],
    ],
)
def test_wrong_use_ends_with_2_and_the_usage(accel, args):
    code, out, err = accel(*args)
    assert code == 2
    assert err.startswith("usage: accel") and "error:" in err
    assert out == ""


def test_an_unknown_verb_lists_the_known_ones(accel):
    _, _, err = accel("explode")
    assert "explode" in err and all(verb in err for verb in VERBS)


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(accel, args):
    code, out, _ = accel(*args)
    assert code == 0
    assert all(f"  {verb} " in out for verb in VERBS)


def test_the_version_is_printed(accel):
    from accel._version import __version__ as version

    assert accel("--version")[:2] == (0, f"accel {version}\n")


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_has_help_with_an_example(accel, verb):
    code, out, _ = accel(verb, "--help")
    assert code == 0
    assert f"example: accel {verb}" in out


def test_a_reader_that_goes_away_is_no_error_message(smallest_bundle):
    command = f"{sys.executable} -m accel inspect {smallest_bundle} --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
