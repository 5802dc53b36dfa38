"""What the command line says about int8."""

from __future__ import annotations

from dataclasses import replace

import pytest

from accel.bundle import Bundle
from accel.int8 import summary
from accel.machine import machine


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


def test_a_unet_in_int8_has_it_already():
    unet = Bundle.open("digits/4step-int8").component("unet")
    assert not summary.prospect(replace(unet, parameters=10**9))
