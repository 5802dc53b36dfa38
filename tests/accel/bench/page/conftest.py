"""A kept result of a real run, with images whose differences are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[4]


@pytest.fixture
def document() -> dict:
    return json.loads((ROOT / "benchmarks/digits.json").read_text())


@pytest.fixture
def images(document) -> dict[str, np.ndarray]:
    """Two prompts: onnxruntime's images are eager's, openvino's differ by at most 7 of 255 in a corner."""
    document["work"]["prompts"] = ["a handwritten seven", "a <b>bold</b> three"]
    document["work"]["seeds"] = [7, 8]
    eager = np.random.default_rng(0).integers(8, 248, (2, 64, 64, 3), np.uint8)
    other = eager.copy()
    other[:, :8, :8, 1] += 7
    return {"eager": eager, "onnxruntime": eager.copy(), "openvino": other}
