"""`accel doctor`: tries what is installed, and says how to fix what does not work."""

from __future__ import annotations

import json
import sys

import pytest

from accel.commands import doctor
from accel.engines import ENGINES
from accel.engines.attempt import attempt


@pytest.mark.parametrize("name", ["eager", "onnxruntime", "openvino"])
def test_an_engine_that_can_run_is_tried(name):
    state = attempt(name)
    assert state.ok and "tried: cpu" in state.detail.lower()


def test_what_is_missing_comes_with_its_fix(accel):
    code, out, _ = accel("doctor", "--fast", "--json")
    report = json.loads(out)
    assert code == 0 and set(report["engines"]) == set(ENGINES)
    assert report["optional"]["torch"]["ok"]
    assert all(state["ok"] or state["fix"] for state in report["optional"].values())


def test_a_package_that_breaks_when_it_is_imported_is_named_and_the_next_ones_are_still_looked_at(
    tmp_path, monkeypatch
):
    (tmp_path / "breaks.py").write_text("raise OSError('libcudart.so.13: no such file')")
    (tmp_path / "crashes.py").write_text("import os; os.abort()")
    (tmp_path / "works.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = (doctor.Package(name, (name,), "a test", "extra") for name in ("breaks", "crashes", "works", "absent"))
    monkeypatch.setattr(doctor, "PACKAGES", tuple(rows))
    found = doctor._packages(fast=False)
    assert "libcudart.so.13" in found["breaks"]["detail"] and "pip install" in found["breaks"]["fix"]
    assert "ends with code -6" in found["crashes"]["detail"]
    assert found["works"] == {"ok": True, "detail": "installed: a test", "fix": ""}
    assert found["absent"]["fix"] == 'pip install "accel-diffusion[extra]"'
    monkeypatch.setattr(doctor, "version_of", lambda name: "1.0")
    monkeypatch.setattr(doctor, "PACKAGES", (doctor.Package("works", ("a", "b"), "a test", alone=True),))
    assert "overwrite each other" in doctor._packages(fast=True)["a"]["detail"]


def test_an_engine_that_is_installed_and_fails_is_not_ok(tmp_path, monkeypatch):
    (tmp_path / "toy_engine.py").write_text(
        "from accel.engines.base import Status\n"
        "def status(): return Status(True, 'toy 1')\n"
        "def attempt(): raise RuntimeError('no kernel image is available')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for module in ("accel.engines.select", "accel.engines.attempt"):
        monkeypatch.setattr(sys.modules[module], "ENGINES", {"toy": "toy_engine"})
    state = attempt("toy")
    assert not state.ok and "no kernel image" in state.detail and state.fix
