"""Compiled networks inside somebody else's diffusers pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import accel
from accel.errors import UserError


@pytest.fixture
def pipe(sd15):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd15)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe, **options):
    generator = torch.Generator().manual_seed(3)
    options = dict(num_inference_steps=4, guidance_scale=5.0, height=64, width=64) | options
    return pipe("the cat", generator=generator, output_type="np", **options).images


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_the_image_stays_the_same(engine, guidance, pipe, sd15_bundle):
    pytest.importorskip(engine)
    before = image(pipe, guidance_scale=guidance)
    with accel.attach(pipe, sd15_bundle, engine=engine) as attached:
        assert set(attached.engines) == {"text_encoder", "unet", "vae_decoder"}
        assert np.abs(image(pipe, guidance_scale=guidance) - before).max() < 1 / 255


def test_the_engine_really_does_the_work(pipe, sd15_bundle):
    with accel.attach(pipe, sd15_bundle, engine="onnxruntime") as attached:
        calls = []
        unet = attached.engines["unet"]
        run = unet.run
        unet.run = lambda feeds: calls.append(1) or run(feeds)
        image(pipe, num_inference_steps=3)
        assert len(calls) >= 3


def test_detach_restores_the_pipeline_exactly(pipe, sd15_bundle):
    before, parts = image(pipe), (pipe.unet, pipe.vae, pipe.text_encoder)
    attached = accel.attach(pipe, sd15_bundle, engine="onnxruntime")
    attached.detach()
    assert (pipe.unet, pipe.vae, pipe.text_encoder) == parts
    assert np.array_equal(image(pipe), before)


def test_another_model_is_refused_and_nothing_changes(sd15_tiny, sd15_bundle):
    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline.from_pretrained(sd15_tiny)
    unet = other.unet
    with pytest.raises(UserError, match="different models"):
        accel.attach(other, sd15_bundle, engine="onnxruntime")
    assert other.unet is unet


def test_features_the_graph_does_not_have_are_refused(pipe, sd15_bundle):
    with accel.attach(pipe, sd15_bundle, engine="onnxruntime"):
        with pytest.raises(UserError, match="hidden states"):
            image(pipe, clip_skip=1)
        with pytest.raises(UserError, match="cross_attention_kwargs"):
            pipe("the cat", num_inference_steps=1, cross_attention_kwargs={"gligen": {"boxes": 1}})
