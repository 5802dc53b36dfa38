"""Import paths of 0.1 go on working."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import accel
from accel import _moved


@pytest.mark.parametrize(("old", "new"), sorted(_moved.TABLE.items()))
def test_an_old_path_is_the_module_that_took_its_place(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        sys.modules.pop(old, None)
        assert import_module(old) is import_module(new)
    assert import_module(new).__name__ == new


def test_names_are_imported_from_old_paths_as_before():
    code = (
        "from accel.sampler import NoiseSchedule\nfrom accel.source import open_source\n"
        "from accel import noise, request\n"
        "from accel.bundle import Bundle\nfrom accel.pipeline import load\nfrom accel.export import export_pipeline\n"
        "from accel.distill.run import execute\nfrom accel.distill.train_digits import load as load_digits\n"
        "from accel.loading import load as first\nimport accel.engines, accel.topology\n"
        "assert accel.topology.narrowed and accel.load is first and load and callable(request.plan)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_old_module_can_still_be_run():
    command = [sys.executable, "-m", "accel.distill.train_digits", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "accel.distill.digits.train" in done.stderr and "--out" in done.stdout


def test_what_never_was_a_module_is_none_now():
    with pytest.raises(ModuleNotFoundError):
        import_module("accel.nothing_like_it")
    assert not hasattr(accel, "nothing_like_it")
