"""diffusers' own ModularPipeline loads a repository of ours."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest

import accel

MODEL, REPO = "digits/1step-int8", "someone/digits"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """diffusers keeps the code of repositories in a folder of its own, which it takes from a constant."""
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))


def test_a_modular_pipeline_draws_our_image(hub, modules):
    accel.push(MODEL, REPO)
    pipe = diffusers.ModularPipeline.from_pretrained(REPO, trust_remote_code=True)
    image = pipe(prompt="a handwritten seven", seed=7, engine="onnxruntime", output_type="np", output="images")
    ours = accel.load(MODEL, "onnxruntime")("a handwritten seven", seed=7, output_type="np").images
    assert np.array_equal(image, ours)


def test_without_trust_nothing_of_the_repository_runs(hub, modules):
    accel.push(MODEL, REPO)
    with pytest.raises(ValueError, match="trust_remote_code"):
        diffusers.ModularPipeline.from_pretrained(REPO, trust_remote_code=False)
