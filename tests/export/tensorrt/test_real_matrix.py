"""Every network of the matrix in `docs/tensorrt-rtx.md`, shrunk, goes through NVIDIA's real parser and builder."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from accel.trt import library

ROOT = Path(__file__).parents[3]
# Those with an operator or an input of their own; the others are the same layers in other numbers (SDXL: a minute).
QUICK = ("sd-tiny LCM", "t2i-adapter", "openclip-bigg", "tiny vae decoder")
pytestmark = pytest.mark.skipif(
    library.installed("tensorrt-rtx") is None,
    reason='TensorRT-RTX is not installed: pip install "accel-diffusion[tensorrt-rtx]"',
)


@pytest.fixture
def matrix(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("tensorrt_rtx_matrix")
    sys.modules.pop("tensorrt_rtx_matrix", None)


def names() -> list[str]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return [row.name for row in importlib.import_module("tensorrt_rtx_matrix").ROWS]
    finally:
        sys.path.pop(0)
        sys.modules.pop("tensorrt_rtx_matrix", None)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in names()]
)
def test_it_builds_and_computes_in_the_precision_of_its_graph(matrix, name):
    row = next(row for row in matrix.ROWS if row.name == name)
    found = matrix.measure(row, True)
    assert "problem" not in found, found
    assert found["heavy"]["fp16" if row.dtype == "float16" else "fp32"] > 0
    if row.dtype == "float16":  # what the graph itself keeps in float32 is the embedding of time and size
        assert found["heavy"].get("fp32", 0) <= 4
