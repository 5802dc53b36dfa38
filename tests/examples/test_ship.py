"""The program of docs/ship.md: on a card its engine files, without one ONNX Runtime."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.export.tensorrt.build import build
from accel.trt import library

PAGE = Path(__file__).parents[2] / "docs" / "ship.md"
PROGRAM = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]


def run(folder: Path):
    space = {}
    exec(PROGRAM.replace("my-bundle", str(folder)), space)
    return space["pipe"]


def test_on_a_card_it_runs_the_engine_files(bundle_copy, tensorrt_rtx, capsys):
    build(Bundle.open(bundle_copy), ("text_encoder", "unet", "vae_decoder"), engine="tensorrt-rtx")
    with run(bundle_copy) as pipe:
        pipe("the cat", steps=1, seed=0)
        assert "unet         tensorrt-rtx" in repr(pipe)
    assert "not on" not in capsys.readouterr().out


@pytest.mark.skipif(library.has_driver(), reason="there is a driver here")
def test_without_a_card_it_says_why_and_runs_on_onnx_runtime(bundle_copy, capsys):
    with run(bundle_copy) as pipe:
        pipe("the cat", steps=1, seed=0)
        assert "unet         onnxruntime" in repr(pipe)
    assert "not on tensorrt-rtx: " in capsys.readouterr().out


def test_a_card_that_the_files_are_not_for_is_told_and_goes_on(bundle_copy, tensorrt_rtx, capsys):
    build(Bundle.open(bundle_copy), ("text_encoder", "unet", "vae_decoder"), engine="tensorrt-rtx", targets=["sm120"])
    with run(bundle_copy) as pipe:
        assert "unet         onnxruntime" in repr(pipe)
    assert "built for sm120" in capsys.readouterr().out
