"""The command line, run in this process."""

from __future__ import annotations

import re
import warnings

import pytest

from accel.cli import main


@pytest.fixture
def accel(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*args) -> tuple[int, str, str]:
        with warnings.catch_warnings():
            try:
                code = main([str(arg) for arg in args])
            except SystemExit as error:
                code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err and "bug in accel" not in err, err
        return code, out, err

    shown = warnings.showwarning
    yield call
    warnings.showwarning = shown


@pytest.fixture
def refused(accel):
    """Run the command line, which must fail with one message that has a fix."""

    def call(*args) -> str:
        code, _, err = accel(*args)
        assert code in (1, 2)
        # Before the error: notes, stages of the work, and transformers' bar, which is silenced by an environment
        # variable that it reads when it is first imported.
        others = re.compile(r"note:|engine:|Loading weights| *\d+ %: ")
        lines = [line for line in err.splitlines() if line.strip() and not others.match(line)]
        assert lines[0].startswith("error: ") and lines[-1].startswith("  fix: "), err
        assert err.count("error:") == 1
        return err

    return call
