"""Variants: their names, their options, and which are worth trying here."""

from __future__ import annotations

import argparse

import pytest

from accel import bench
from accel.bench import variants
from accel.bundle import Bundle
from accel.errors import UserError


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("eager", "eager", {"dtype": "fp32"}),
        ("eager:fp32", "eager", {"dtype": "fp32"}),
        ("compile:bf16:cpu", "compile:bf16:cpu", {"dtype": "bf16", "device": "cpu"}),
        ("onnxruntime:cuda", "onnxruntime:cuda", {"provider": "cuda"}),
        ("compile:bf16:max-autotune", "compile:bf16:max-autotune", {"dtype": "bf16", "mode": "max-autotune"}),
        ("compile:regional", "compile:regional", {"dtype": "fp32", "regional": True}),
        ("eager:fp16:cuda:loop", "eager:fp16:cuda:loop", {"dtype": "fp16", "device": "cuda", "cuda_graph": "loop"}),
        ("openvino:gpu", "openvino:gpu", {"dtype": "fp32", "device": "GPU"}),
    ],
)
def test_variant_names(text, name, options):
    variant = bench.parse(text)
    assert (variant.name, variant.options) == (name, options)


@pytest.mark.parametrize(
    "text", ["warp", "eager:int4", "onnxruntime:bf16", "openvino:cuda", "eager,eager:fp32", " , ", "eager:step:loop"]
)
def test_wrong_variants_are_refused(text):
    with pytest.raises(UserError) as error:
        bench.chosen(text)
    assert error.value.fix


def test_dtypes_without_instructions_are_left_out_unless_asked_for(monkeypatch, smallest_bundle):
    bundle = Bundle.open(smallest_bundle)
    monkeypatch.setattr(variants, "_has_gpu", lambda: False)
    monkeypatch.setattr(variants, "machine", lambda: argparse.Namespace(isa=("avx2",)))
    assert "bf16 instructions" in variants.unable(bench.parse("eager:bf16", requested=False), bundle)
    assert variants.unable(bench.parse("eager:bf16"), bundle) == ""
    assert variants.unable(bench.parse("eager", requested=False), bundle) == ""
