"""Image to image and inpainting against diffusers' own pipelines, on the same noise."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import accel
from accel import images
from accel.errors import UserError
from accel.pipeline.initial_latents import _OF_IMAGE, _OF_MASKED
from accel.sampling import noise

ONE_STEP_OF_A_PIXEL = 1 / 255
SEED = 7


@pytest.fixture(scope="module")
def image():
    rows, columns = np.mgrid[0:80, 0:96]
    array = np.stack([rows * 3, columns * 2, (rows + columns) % 97 * 2], axis=-1)
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def mask():
    array = np.zeros((80, 96), np.uint8)
    array[20:60, 30:80] = 255
    return Image.fromarray(array)


def draws(monkeypatch, *numbers):
    """Let diffusers take our noise, in the order in which it asks for it."""
    import diffusers.models.autoencoders.vae as vae
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint as inpaint
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as xl_img2img

    queue = iter(numbers)
    for module in (vae, img2img, inpaint, xl_img2img):
        monkeypatch.setattr(
            module,
            "randn_tensor",
            lambda shape, **_: torch.from_numpy(noise.normal([SEED], next(queue), tuple(shape)[1:])),
        )


def diffusers_pipeline(name, source, scheduler):
    import diffusers

    pipe = getattr(diffusers, name).from_pretrained(source)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    if scheduler == "DDIMScheduler":
        pipe.scheduler.register_to_config(clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


SAMPLERS = {"dpmpp_2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler", "ddim": "DDIMScheduler"}


@pytest.mark.parametrize(("sampler", "strength"), [("dpmpp_2m", 0.6), ("euler", 0.5), ("ddim", 0.8)])
def test_image_to_image_equals_diffusers(sd15, sd15_bundle, image, monkeypatch, sampler, strength):
    pipe = diffusers_pipeline("StableDiffusionImg2ImgPipeline", sd15, SAMPLERS[sampler])
    draws(monkeypatch, _OF_IMAGE, 0)
    expected = pipe(
        "the cat",
        image=image.resize((64, 64), Image.Resampling.LANCZOS),
        strength=strength,
        num_inference_steps=5,
        guidance_scale=4.0,
        output_type="np",
    ).images
    found = accel.load(sd15_bundle, engine="onnxruntime")(
        "the cat",
        image=image,
        strength=strength,
        sampler=sampler,
        steps=5,
        guidance_scale=4.0,
        seed=SEED,
        output_type="np",
    )
    assert expected.std() > 0.01
    assert np.abs(found.images - expected).max() < ONE_STEP_OF_A_PIXEL
    assert found.seconds["vae_encoder"] > 0


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_with_an_ordinary_unet_equals_diffusers(sd15, sd15_bundle, image, mask, monkeypatch, strength):
    pipe = diffusers_pipeline("StableDiffusionInpaintPipeline", sd15, "DDIMScheduler")
    # The third is of the masked image, which diffusers encodes for a UNet that does not look at it.
    draws(monkeypatch, _OF_IMAGE, 0, _OF_MASKED)
    expected = pipe(
        "the cat",
        image=image,
        mask_image=mask,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=4.0,
        height=64,
        width=64,
        output_type="np",
    ).images
    found = accel.load(sd15_bundle, engine="onnxruntime")(
        "the cat",
        image=image,
        mask_image=mask,
        strength=strength,
        sampler="ddim",
        steps=5,
        guidance_scale=4.0,
        seed=SEED,
        output_type="np",
    )
    assert np.abs(found.images - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.fixture(scope="module")
def inpainting(small, sd15_bundle, completed, tmp_path_factory):
    """(pipeline, bundle) with a UNet of nine input channels."""
    from diffusers import UNet2DConditionModel

    from accel.bundle import Bundle
    from accel.export.pipeline import export_pipeline

    folder = tmp_path_factory.mktemp("inpainting")
    source = Path(shutil.copytree(small, folder / "source"))
    torch.manual_seed(5)
    config = UNet2DConditionModel.load_config(small / "unet") | {"in_channels": 9}
    UNet2DConditionModel.from_config(config).save_pretrained(source / "unet")
    unet = export_pipeline(
        source,
        folder / "bundle",
        profile="batch=1,size=64",
        components=("unet",),
        sampler={"name": "dpmpp_2m", "steps": 5, "guidance": 4.0},
    )
    return source, completed(unet, Bundle.open(sd15_bundle))


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_inpainting_with_nine_channels_equals_diffusers(inpainting, image, mask, monkeypatch, strength):
    source, bundle = inpainting
    pipe = diffusers_pipeline("StableDiffusionInpaintPipeline", source, "DPMSolverMultistepScheduler")
    draws(monkeypatch, *((0, _OF_MASKED) if strength == 1.0 else (_OF_IMAGE, 0, _OF_MASKED)))
    expected = pipe(
        "the cat",
        image=image,
        mask_image=mask,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=4.0,
        height=64,
        width=64,
        output_type="np",
    ).images
    found = accel.load(bundle, engine="onnxruntime")(
        "the cat",
        image=image,
        mask_image=mask,
        strength=strength,
        sampler="dpmpp_2m",
        steps=5,
        guidance_scale=4.0,
        seed=SEED,
        output_type="np",
    )
    assert np.abs(found.images - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize("tensorrt", ["11.4"], indirect=True)
@pytest.mark.parametrize("channels", [4, 9])
def test_what_differs_from_the_captured_loop_runs_step_by_step(
    sd15_bundle, inpainting, tensorrt, image, mask, channels, with_engine_file_of_unet
):
    """A whole-loop CUDA graph holds plain text to image; an image, a mask and a callback need the steps one by one."""
    theirs, ours = with_engine_file_of_unet(sd15_bundle if channels == 4 else inpainting[1].path)
    cases = [dict(image=image, mask_image=mask, strength=strength) for strength in (1.0, 0.6)]
    if channels == 4:
        cases += [dict(image=image, strength=0.6), dict(callback=lambda i, t, x: None)]
    for options in cases:
        found, expected = (
            pipe("the cat", steps=3, sampler="euler", seed=SEED, output_type="latent", **options).latents
            for pipe in (ours, theirs)
        )
        assert np.abs(found - expected).max() < 1e-4, options


def test_an_inpainting_model_without_an_image_says_what_it_needs(inpainting):
    with pytest.raises(UserError, match="inpainting model") as error:
        accel.load(inpainting[1], engine="onnxruntime")("the cat", steps=1)
    assert "--mask" in error.value.fix


def test_a_few_step_student_starts_from_an_image_on_its_own_grid(sd15_bundle, image):
    """Half the strength is half of the four steps, and what is kept shows."""
    pipe = accel.load(sd15_bundle, engine="onnxruntime")
    seen = []
    options = dict(sampler="dmd2", timesteps=[999, 749, 499, 249], guidance_scale=0.0, seed=SEED)
    pipe("the cat", image=image, strength=0.5, callback=lambda i, t, x: seen.append((i, t)), **options)
    assert seen == [(2, 499), (3, 249)]


def test_what_is_masked_off_is_kept(sd15_bundle, image, mask):
    pipe = accel.load(sd15_bundle, engine="onnxruntime")
    made = pipe("the cat", image=image, mask_image=mask, steps=4, seed=SEED)
    known = pipe("the cat", image=image, strength=1.0, steps=4, seed=SEED)
    small = images.shrunk(images.masks(mask, 1, (64, 64)), 4)
    assert small.min() == 0 and small.max() == 1
    again = pipe("a dog", image=image, mask_image=mask, steps=4, seed=SEED)
    kept = np.broadcast_to(small == 0, made.latents.shape)
    assert np.array_equal(made.latents[kept], again.latents[kept])
    assert not np.array_equal(made.latents[~kept], again.latents[~kept])
    assert not np.array_equal(known.latents, made.latents)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_low_memory_makes_the_same_image_and_holds_nothing(sd15_bundle, image, engine):
    options = dict(steps=2, seed=SEED, output_type="np", image=image)
    pipe = accel.load(sd15_bundle, engine=engine, low_memory=True)
    assert pipe.engines._loaded == {}
    made = pipe(["the cat"] * 3, **options).images
    assert pipe.engines._loaded == {}
    assert set(pipe.engines.descriptions) == {"text_encoder", "unet", "vae_decoder", "vae_encoder"}
    assert np.array_equal(made, accel.load(sd15_bundle, engine=engine)(["the cat"] * 3, **options).images)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (dict(strength=0.5), "without an image"),
        (dict(mask_image=np.zeros((64, 64))), "without an image"),
        (dict(image="missing.png"), "missing.png"),
        (dict(image=np.zeros((64, 64, 4))), "(64, 64, 4)"),
        (dict(image=np.full((64, 64, 3), 7.0)), "outside 0 to 1"),
        (dict(image=np.zeros((64, 64, 3)), strength=0.0), "strength = 0"),
        (dict(image=np.zeros((64, 64, 3)), strength=1.5), "strength = 1.5"),
        (dict(image=np.zeros((64, 64, 3)), strength=0.2, steps=4), "leaves no step"),
        (dict(image=[np.zeros((64, 64, 3))] * 3), "3 images for 1"),
        (dict(control_image=np.zeros((64, 64, 3))), "without adapter"),
        (dict(control_end=2.0), "control_end = 2"),
    ],
)
def test_wrong_images_are_named(sd15_bundle, arguments, named):
    with pytest.raises(UserError) as error:
        accel.load(sd15_bundle, engine="onnxruntime")("the cat", **arguments)
    assert named in str(error.value) and error.value.fix


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "x.png").write_bytes(b"hello")
    with pytest.raises(UserError, match="x.png is not an image"):
        images.batch(tmp_path / "x.png", 1, (8, 8))


def test_canny_draws_the_border_of_a_square():
    pytest.importorskip("skimage")
    array = np.zeros((64, 64), np.uint8)
    array[16:48, 16:48] = 255
    edges = np.asarray(images.canny(array))
    assert edges.shape == (64, 64, 3) and set(np.unique(edges)) == {0, 255}
    assert edges[24:40, 24:40].max() == 0 and edges[14:19, 30].max() == 255
