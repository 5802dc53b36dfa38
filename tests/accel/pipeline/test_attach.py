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


@pytest.fixture
def smallest_pipe(smallest):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(smallest)
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


def test_a_second_attachment_is_refused_with_the_way_out(smallest_pipe, smallest_bundle):
    from diffusers import StableDiffusionImg2ImgPipeline

    originals = (smallest_pipe.unet, smallest_pipe.vae, smallest_pipe.text_encoder)
    attached = accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime")
    shared = StableDiffusionImg2ImgPipeline(**smallest_pipe.components, requires_safety_checker=False)
    for again in (smallest_pipe, shared):
        with pytest.raises(UserError, match="attached to a bundle already") as error:
            accel.attach(again, smallest_bundle, engine="onnxruntime")
        assert "detach()" in error.value.fix
    attached.detach()
    with accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime") as second:
        attached.detach()  # long over: it must not undo the second
        assert smallest_pipe.unet is not originals[0] and "unet" in repr(second)
    assert (smallest_pipe.unet, smallest_pipe.vae, smallest_pipe.text_encoder) == originals
    assert "detached" in repr(second) and all(engine.closed for engine in second.engines.values())


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_other_weights_of_the_same_config_are_refused(part, size, smallest_pipe, smallest_bundle):
    with torch.no_grad():
        for weight in getattr(smallest_pipe, part).parameters():
            weight.mul_(1 + size)
    with pytest.raises(UserError, match="different weights") as error:
        accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime")
    assert "exported from this pipeline" in error.value.fix
    assert isinstance(smallest_pipe.unet, torch.nn.Module) and "to" not in smallest_pipe.__dict__


def test_weights_of_another_dtype_are_the_same_weights(smallest_pipe, smallest_bundle):
    with accel.attach(smallest_pipe.to(torch.float16), smallest_bundle, engine="onnxruntime"):
        pass


def test_lora_layers_are_refused_before_and_after(smallest_pipe, smallest_bundle):
    from peft import LoraConfig

    with accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime"):
        with pytest.raises(UserError, match="load_lora_weights would not reach") as error:
            smallest_pipe.load_lora_weights("some.safetensors")
        assert "detach()" in error.value.fix
    assert "load_lora_weights" not in smallest_pipe.__dict__
    smallest_pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(UserError, match="LoRA layers"):
        accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime")


def test_an_attached_pipeline_saves_its_own_networks(smallest_pipe, smallest_bundle, tmp_path):
    from diffusers import StableDiffusionPipeline

    expected = image(smallest_pipe)
    with accel.attach(smallest_pipe, smallest_bundle, engine="onnxruntime"):
        smallest_pipe.save_pretrained(tmp_path / "saved")
        assert type(smallest_pipe.unet).__name__ == "CompiledUNet", "still attached"
    saved = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    saved.set_progress_bar_config(disable=True)
    assert np.array_equal(image(saved), expected)


def test_an_attached_pipeline_stays_where_it_is(smallest_pipe, smallest_bundle):
    pipe = smallest_pipe
    with accel.attach(pipe, smallest_bundle, engine="onnxruntime"):
        assert pipe.to("cpu") is pipe and pipe.to(torch.float32) is pipe and pipe.unet.to("cpu") is pipe.unet
        assert pipe.vae.to(dtype=torch.float16) is pipe.vae, "SDXL's pipelines ask for it around the decoding"
        for move in (lambda: pipe.to("cuda"), lambda: pipe.to(torch.float16), lambda: pipe.unet.to(dtype=torch.half)):
            with pytest.raises(UserError, match="cannot be moved to") as error:
                move()
            assert "detach()" in error.value.fix
    assert pipe.to(torch.float16).unet.dtype == torch.float16, "detached, it moves again"
