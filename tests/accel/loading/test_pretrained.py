"""Programs that were written for diffusers: the same names, the same image."""

from __future__ import annotations

import warnings

import diffusers
import numpy as np
import pytest
import torch

import accel
from accel import AccelPipeline, Notice, UserError
from accel.bundle import Bundle
from accel.bundle.hub import origin

CALL = dict(num_inference_steps=3, guidance_scale=5.0, height=64, width=64, output_type="np")


@pytest.fixture(scope="module")
def pipe(sd15_bundle):
    with AccelPipeline.from_pretrained(sd15_bundle, engine="onnxruntime", threads=1) as loaded:
        loaded.set_progress_bar_config(disable=True)
        yield loaded


def test_a_program_for_diffusers_draws_diffusers_image(pipe, sd15):
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd15)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    kept = pipe.schedule, pipe.bundle
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    images = [
        made("a cat", generator=torch.Generator().manual_seed(3), **CALL).images for made in (theirs, pipe.to("cpu"))
    ]
    assert type(pipe.scheduler) is diffusers.EulerDiscreteScheduler
    pipe.schedule, pipe.bundle = kept
    assert np.abs(images[0] - images[1]).max() < 1 / 255


def test_it_is_a_pipeline_of_accel(pipe):
    assert isinstance(pipe, accel.Pipeline) and isinstance(pipe, AccelPipeline) and pipe.dtype == "float32"


def test_moving_it_is_harmless_and_said(pipe):
    with pytest.warns(Notice, match="cannot be moved to cuda:0"):
        assert pipe.to("cuda") is pipe
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pipe.to("cpu") is pipe and pipe.to(torch.float32) is pipe


def test_what_saves_memory_in_diffusers_is_said_to_do_nothing(pipe):
    for name in ("enable_model_cpu_offload", "enable_attention_slicing"):
        with pytest.warns(Notice, match="low_memory"):
            getattr(pipe, name)()


def test_another_dtype_than_the_bundles_is_said(sd15_bundle):
    with pytest.warns(Notice, match="computes in float32"):
        how = dict(engine="onnxruntime", threads=1, low_memory=True, use_safetensors=True)
        AccelPipeline.from_pretrained(sd15_bundle, torch_dtype=torch.float16, **how).close()


def test_eager_torch_takes_the_dtype(sd15_bundle):
    with AccelPipeline.from_pretrained(sd15_bundle, engine="eager", torch_dtype=torch.bfloat16) as loaded:
        assert "bfloat16" in loaded.engines["unet"].description


def test_a_saved_bundle_is_the_bundle(pipe, sd15_bundle, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    saved = Bundle.open(tmp_path / "saved")
    saved.verify()
    assert saved.digest == Bundle.open(sd15_bundle).digest
    with pytest.raises(UserError, match="exists already"):
        pipe.save_pretrained(tmp_path / "saved")


def test_a_pipeline_that_was_never_compiled_is_not_saved(sd15, tmp_path):
    with AccelPipeline.from_pretrained(sd15, engine="eager") as loaded:
        with pytest.raises(UserError, match="is a diffusers pipeline and no bundle"):
            loaded.save_pretrained(tmp_path / "saved")


def test_it_is_pushed_and_loaded_by_name(hub, pipe):
    pipe.push_to_hub("someone/sd", licence="openrail++")
    origin._answers.clear()
    again = AccelPipeline.from_pretrained("someone/sd", engine="onnxruntime", threads=1, low_memory=True)
    assert again.bundle.manifest.files["unet/model.safetensors"] == pipe.bundle.manifest.files["unet/model.safetensors"]


def test_a_scheduler_without_a_sampler_is_refused(pipe):
    with pytest.raises(UserError, match="no sampler that equals VQDiffusionScheduler"):
        pipe.scheduler = diffusers.VQDiffusionScheduler(num_vec_classes=4)
