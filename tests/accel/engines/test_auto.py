"""What `auto` chooses: it always runs what can run here, and says what would be faster or closer."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import accel
from accel import engines
from accel.bundle import Bundle
from accel.engines import Status
from accel.errors import Notice, UserError
from accel.machine import machine_name
from accel.trt import engine_files


def accepted(ok=True, machine=None, gpu=None, **speeds: float):
    """The shipped int8 UNet with an acceptance that says what a test wants: engine -> times as fast as float32."""
    unet = Bundle.open("digits/4step-int8").component("unet")
    acceptance = {
        "machine": machine or machine_name(),
        "against": "float32",
        "parity": {"ok": ok, "psnr": 18.0, "budget": 20.0},
        "enabled_engines": [name for name, ratio in speeds.items() if ratio > 1 and ok],
        "engines": {
            name: {"int8_seconds": 1 / ratio, "speedup": ratio, "on": gpu if name == "tensorrt" else machine_name()}
            for name, ratio in speeds.items()
        },
    }
    if machine:
        for entry in acceptance["engines"].values():
            entry["on"] = machine
    return replace(unet, int8={**unet.int8, "acceptance": acceptance})


@pytest.fixture
def able(monkeypatch):
    """Let only these engines be able to run."""

    def let(*names: str) -> None:
        monkeypatch.setattr(engines.select, "status", lambda name: Status(name in names, "as the test says", "fix"))

    return let


def choice(component, *arguments, **options) -> tuple[str, list[str]]:
    """What `auto` takes, and what it says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        name = engines.choose("auto", component, *arguments, **options)
    return name, [str(w.message) for w in caught if issubclass(w.category, Notice)]


def test_the_fastest_engine_on_which_int8_is_faster(able):
    able("onnxruntime", "openvino", "eager")
    assert choice(accepted(onnxruntime=3.0, openvino=2.0)) == ("onnxruntime", [])
    assert choice(accepted(onnxruntime=0.9, openvino=1.5)) == ("openvino", [])


def test_slower_than_float_still_runs_and_is_said(able):
    able("onnxruntime", "openvino")
    name, (note,) = choice(accepted(onnxruntime=0.9, openvino=0.8))
    assert name == "onnxruntime" and "not faster than float32 on this machine (onnxruntime 0.90x)" in note


def test_an_engine_that_is_missing_is_named_and_another_runs(able):
    able("onnxruntime", "eager")
    name, (note,) = choice(accepted(openvino=2.0, onnxruntime=0.7))
    assert name == "onnxruntime" and "fastest on openvino, which cannot run here" in note
    name, (note,) = choice(accepted(openvino=2.0))
    assert name == "onnxruntime" and "fastest on openvino, which cannot run here" in note


def test_without_any_int8_engine_torch_runs_it(able):
    able("eager")
    name, (note,) = choice(accepted(onnxruntime=3.0))
    assert name == "eager" and "pip install" in note
    able()
    with pytest.raises(UserError, match="cannot run here"):
        engines.choose("auto", accepted(onnxruntime=3.0))


def test_images_outside_the_budget_are_said(able):
    able("onnxruntime", "eager")
    name, notes = choice(accepted(ok=False, onnxruntime=3.0))
    assert name == "onnxruntime" and "18.0 dB against float32, 20 dB required" in notes[0]


def test_what_was_not_measured_is_said(able):
    able("onnxruntime", "openvino")
    name, (note,) = choice(accepted(machine="elsewhere", onnxruntime=0.5))
    assert name in ("openvino", "onnxruntime") and "was not measured on this machine: `accel bench` does" in note


def test_networks_of_one_bundle_say_it_in_the_same_words(able):
    able("onnxruntime", "openvino")
    unet, decoder = accepted(machine="elsewhere"), replace(accepted(machine="elsewhere"), name="vae_decoder")
    assert choice(unet) == choice(decoder)


def test_the_gpu_of_the_engine_file_counts(able, monkeypatch):
    able("onnxruntime", "openvino", "tensorrt", "eager")
    found = engine_files.EngineFile(Path("p"), {"identity": {"gpu": "one GPU"}}, b"")
    monkeypatch.setattr(engines.select, "fitting_engine_file", lambda *_: found)
    somewhere = Bundle(Path("."), SimpleNamespace(source={}))
    assert choice(accepted(onnxruntime=3.0, tensorrt=9.0, gpu="one GPU"), somewhere) == ("tensorrt", [])
    assert choice(accepted(onnxruntime=3.0, tensorrt=0.8, gpu="one GPU"), somewhere) == ("onnxruntime", [])
    name, (note,) = choice(accepted(tensorrt=0.8, gpu="one GPU"), somewhere)
    assert name == "tensorrt" and "tensorrt 0.80x" in note
    name, (note,) = choice(accepted(onnxruntime=3.0, tensorrt=0.8, gpu="another GPU"), somewhere)
    assert name == "tensorrt" and "faster on tensorrt was not measured" in note


def test_auto_takes_an_engine_that_has_the_options(able):
    able("onnxruntime", "eager")
    unet = replace(accepted(), int8={})
    assert engines.choose("auto", unet) == engines.choose("auto", unet, options=["threads"]) == "onnxruntime"
    assert engines.choose("auto", unet, options=["dtype", "device"]) == "eager"


def test_only_an_explicit_choice_can_fail(able):
    able("onnxruntime")
    with pytest.raises(UserError, match="openvino engine cannot run here"):
        engines.choose("openvino", accepted(onnxruntime=3.0))


def test_an_option_that_an_engine_does_not_have_is_named_with_those_that_do():
    with pytest.raises(UserError) as error:
        accel.load_engine("digits/4step-int8", "unet", "onnxruntime", dtype="bf16")
    assert error.value.message == "the onnxruntime engine has no option 'dtype' (--precision)"
    assert "eager" in error.value.fix and "__init__" not in str(error.value)


def test_the_shipped_int8_student_draws():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Notice)
        with accel.load("digits/4step-int8") as pipe:
            assert pipe("a handwritten seven", seed=0).images[0].size == (64, 64)
