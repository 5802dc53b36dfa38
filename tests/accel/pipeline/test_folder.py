"""A diffusers pipeline folder works at once: eager, and without being exported in silence."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import accel
from accel.errors import Notice, UserError
from accel.pipeline import load
from accel.sampling import noise


def test_it_equals_diffusers(small):
    from diffusers import StableDiffusionPipeline

    reference = StableDiffusionPipeline.from_pretrained(small)
    reference.set_progress_bar_config(disable=True)
    options = dict(guidance_scale=6.0, height=64, width=96, output_type="np", num_inference_steps=3)
    latents = torch.from_numpy(noise.normal([7], 0, (4, 16, 24)))
    expected = reference("the cat", latents=latents, **options).images
    with pytest.warns(Notice, match="accel export"):
        pipe = accel.load(small)
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    actual = pipe("the cat", seed=7, **options).images
    assert {engine.name for engine in map(pipe.engines.__getitem__, pipe.engines)} == {"eager"}
    assert expected.std() > 0.01 and np.abs(actual - expected).max() < 1e-4
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob("*")}


def test_it_starts_from_an_image_and_makes_any_number(small):
    pipe = accel.load(small, "eager")
    image = np.zeros((64, 64, 3), np.uint8)
    made = pipe(["the cat"] * 9, image=image, strength=0.5, seed=1, steps=2, output_type="np").images
    assert made.shape == (9, 64, 64, 3)
    alone = pipe("the cat", image=image, strength=0.5, seed=9, steps=2, output_type="np").images
    assert np.abs(made[8] - alone[0]).max() < 1e-4


def test_sdxl_too(sdxl):
    pipe = accel.load(sdxl, "eager", low_memory=True)
    assert pipe("the cat", steps=1, seed=0).images[0].size == (64, 64)


def test_what_compiles_nothing_refuses_an_engine_for_graphs_with_the_export(small):
    with pytest.raises(UserError, match="onnxruntime engine runs ONNX graphs") as error:
        load(small, "onnxruntime")
    assert "accel export" in error.value.fix


@pytest.mark.parametrize("name", ["digits", "digits/4step"])
def test_the_shipped_models_draw_at_once(name):
    with pytest.warns(Notice, match=f"accel export {name} "):
        pipe = accel.load(name)
    assert pipe("a handwritten seven", seed=0, steps=4).images[0].size == (64, 64)


@pytest.mark.parametrize("name", [None, 3, ["digits"]])
def test_what_is_no_path_is_one_sentence(name):
    with pytest.raises(UserError, match="folder") as error:
        accel.load(name)
    assert error.value.fix
