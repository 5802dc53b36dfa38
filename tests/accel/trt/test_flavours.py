"""Which flavour a version is, and the libraries of TensorRT-RTX."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from accel.errors import UserError
from accel.trt import library, rtx_libraries
from accel.trt.flavours import FLAVOURS, RTX, TENSORRT_10, TENSORRT_11, flavour_of


@pytest.mark.parametrize(
    "engine, version, flavour",
    [
        ("tensorrt", (10, 13, 9), None),
        ("tensorrt", (10, 14), TENSORRT_10),
        ("tensorrt", (10, 16, 1, 11), TENSORRT_10),
        ("tensorrt", (11, 0, 0), TENSORRT_11),
        ("tensorrt", (12, 1), TENSORRT_11),
        ("tensorrt-rtx", (1, 5), None),
        ("tensorrt-rtx", (1, 7, 1, 116), RTX),
    ],
)
def test_a_version_is_one_flavour(engine, version, flavour):
    assert flavour_of(engine, version) is flavour


def test_what_a_flavour_refuses_is_an_option_of_a_build():
    from dataclasses import fields

    from accel.export.tensorrt.options import BuildOptions

    known = {field.name for field in fields(BuildOptions)} | {"targets", "device"}
    for flavour in FLAVOURS:
        assert {*flavour.lacks, *flavour.driver_only} <= known
        assert set(flavour.default_targets) <= set(flavour.targets)


def test_a_library_knows_its_flavour(tensorrt):
    found = library.load()
    assert found.flavour is {"10": TENSORRT_10, "11": TENSORRT_11}[tensorrt.__version__[:2]]
    assert str(found) == f"TensorRT {tensorrt.__version__}"


def test_an_rtx_library_that_is_too_old_or_missing_is_named(tensorrt_rtx, monkeypatch):
    assert library.load("tensorrt-rtx").module is tensorrt_rtx
    monkeypatch.setattr(tensorrt_rtx, "__version__", "1.5.0.114")
    with pytest.raises(UserError, match="TensorRT-RTX 1.5.0.114 is too old: accel needs 1.7") as caught:
        library.load("tensorrt-rtx")
    assert "accel-diffusion[tensorrt-rtx]" in caught.value.fix
    for name in RTX.modules:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="not installed"):
        library.load("tensorrt-rtx")


def test_bindings_and_libraries_of_two_versions_are_refused(monkeypatch, tmp_path):
    """Loaded together they crash, so nothing is loaded."""
    for name in ("libtensorrt_rtx.so.1.6.2", "libtensorrt_onnxparser_rtx.so.1.6.2"):
        (tmp_path / name).write_bytes(b"no library")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(rtx_libraries, "find_spec", lambda name: spec if name == rtx_libraries.HOLDER else None)
    with pytest.raises(UserError, match="bindings are 1.7.1.116 and its libraries 1.6.2") as caught:
        rtx_libraries.preload("1.7.1.116", RTX.reinstall)
    assert "--force-reinstall" in caught.value.fix
    (tmp_path / "libtensorrt_rtx.so.1.6.2").unlink()
    with pytest.raises(UserError, match="has no libraries of TensorRT-RTX"):
        rtx_libraries.preload("1.7.1.116", RTX.reinstall)


@pytest.mark.parametrize(
    "errors, told",
    [
        (["the cause", "--- Begin node ---", "node { }", "--- End node ---"][:2], "the cause"),
        (["the cause", "CUDA initialization failure with error: 35"], "the cause"),
        (["Cuda Runtime (cudaErrorInsufficientDriver)"], "Cuda Runtime (cudaErrorInsufficientDriver)"),
        ([], "TensorRT gave no reason"),
    ],
)
def test_the_last_message_is_often_noise(errors, told):
    assert library.Messages(errors=errors).last() == told
