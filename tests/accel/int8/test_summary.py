"""What the command line says about int8."""

from __future__ import annotations

import inspect
import json
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from accel.bundle import Bundle
from accel.int8 import summary
from accel.machine import machine

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("isa", "parameters", "said"),
    [
        (("avx2", "avx512_vnni"), 323_384_964, "2.7 times as fast"),
        (("avx2", "avx_vnni"), 323_384_964, "2.7 times as fast"),
        (("avx2",), 323_384_964, "no VNNI"),
        (("asimd",), 323_384_964, None),  # nothing was measured there
        (("avx2", "avx512_vnni"), 2_500_000, None),
    ],
)
def test_an_export_in_float32_says_what_int8_would_bring(monkeypatch, isa, parameters, said):
    here = replace(machine(), isa=isa)
    monkeypatch.setattr(summary, "machine", lambda: here)
    unet = replace(Bundle.open("digits/4step-int8").component("unet"), int8={}, parameters=parameters)
    line = summary.prospect(unet)
    assert said in line if said else not line


def test_the_figure_is_the_one_that_was_measured():
    rows = json.loads((ROOT / "benchmarks/peers.json").read_text())["rows"]
    slow, fast = (statistics.median(rows[f"accel OpenVINO{kind}"]["seconds"]) for kind in ("", " int8"))
    assert f"about {slow / fast:.1f} times" in inspect.getsource(summary.prospect)


def test_a_unet_in_int8_has_it_already():
    unet = Bundle.open("digits/4step-int8").component("unet")
    assert not summary.prospect(replace(unet, parameters=10**9))
