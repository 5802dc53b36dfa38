"""Layouts in which models are published, shrunk: each draws what diffusers draws, without an export."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from accel.bundle import Bundle
from accel.distill.data.encoders import Encoders
from accel.errors import Notice, UserError
from accel.export.pipeline import export_pipeline
from accel.models import constants
from accel.models.pipeline_bundle import open_pipeline
from accel.models.source import open_source
from accel.pipeline import load

CALL = dict(prompt="the cat", output_type="np")
PLAYGROUND = {"latents_mean": [-1.6574, 1.886, -1.383, 2.5155], "latents_std": [8.4927, 5.9022, 6.5498, 5.2299]}


def edited(source, to, part, **fields):
    """A copy of a pipeline with other fields in the config of a part."""
    folder = shutil.copytree(source, to)
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def ours(folder, **call):
    return load(open_pipeline(folder), "eager")(**CALL | call).images


def theirs(folder, cls=diffusers.DiffusionPipeline, **call):
    pipeline = cls.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        return pipeline(**CALL | call).images


def same(a, b):
    return a.std() > 0.01 and a.shape == b.shape and np.abs(a - b).max() < 1 / 255


# ------------------------------------------------------------------------------------------- latents of their own scale


def test_latents_with_a_mean_and_a_deviation_for_each_channel(sdxl, tmp_path):
    folder = edited(sdxl, tmp_path / "playground", "vae", **PLAYGROUND)
    latents = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    call = dict(num_inference_steps=3, guidance_scale=3.0)
    expected = theirs(folder, latents=latents, **call)
    assert same(ours(folder, latents=latents.numpy(), **call), expected)
    assert not same(ours(sdxl, latents=latents.numpy(), **call), expected)


def test_an_image_is_encoded_into_them(sdxl, tmp_path):
    folder = edited(sdxl, tmp_path / "playground", "vae", **PLAYGROUND)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    made = Encoders(open_source(folder)).images(pixels)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    mean, std = (torch.tensor(PLAYGROUND[f"latents_{name}"]).reshape(1, 4, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        wanted = (vae.encode(pixels).latent_dist.mean - mean) * vae.config.scaling_factor / std
    assert torch.allclose(made["latent_mean"], wanted, atol=1e-5)


def test_pipelines_of_sd1_do_not_read_them(smallest, tmp_path):
    folder = edited(smallest, tmp_path / "sd1", "vae", **PLAYGROUND)
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    call = dict(num_inference_steps=2, guidance_scale=3.0)
    assert same(ours(folder, latents=latents.numpy(), **call), theirs(folder, latents=latents, **call))


@pytest.mark.parametrize("fields", [{"latents_mean": [1.0]}, {"latents_std": [1, 2, 0, 4]}, {"latents_mean": "x"}])
def test_a_scale_that_is_none_is_refused(sdxl, tmp_path, fields):
    with pytest.raises(UserError, match="latents_|factor"):
        open_pipeline(edited(sdxl, tmp_path / "odd", "vae", **PLAYGROUND | fields))


# ------------------------------------------------------------------------------------------------------ sizes, variants


@pytest.mark.parametrize("sides", [[8, 16], [16, 8], [8, 8]])
def test_a_model_that_is_not_square_draws_its_own_size(smallest, tmp_path, sides):
    folder = edited(smallest, tmp_path / "wide", "unet", sample_size=sides)
    call = dict(num_inference_steps=1, guidance_scale=3.0)
    latents = torch.randn(1, 4, *sides, generator=torch.manual_seed(0))
    made, expected = ours(folder, **call), theirs(folder, cls=diffusers.StableDiffusionPipeline, **call)
    assert made.shape == expected.shape == (1, 4 * sides[0], 4 * sides[1], 3)
    assert same(ours(folder, latents=latents.numpy(), **call), theirs(folder, latents=latents, **call))


def test_its_native_profile_is_of_that_size(smallest, tmp_path):
    from accel.bundle.shape_profiles import profile

    bundle = open_pipeline(edited(smallest, tmp_path / "wide", "unet", sample_size=[8, 16]))
    made = profile("native", native=bundle.manifest.pipeline["native_size"])
    assert (made.height.opt, made.width.opt) == (32, 64) and "32 x 64 px" in bundle.title


@pytest.mark.parametrize("size", [[], [8, 8, 8], ["8", 8], [8, 0]])
def test_a_size_that_is_none_is_refused(smallest, tmp_path, size):
    with pytest.raises(UserError, match="sample_size|native_size"):
        open_pipeline(edited(smallest, tmp_path / "odd", "unet", sample_size=size))


def test_a_variant_that_only_some_parts_have(smallest, tmp_path):
    """As diffusers loads it: the others' plain files."""
    folder = shutil.copytree(smallest, tmp_path / "some")
    for part, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folder / part / f"{name}.safetensors"
        path.rename(path.with_name(f"{name}.fp16.safetensors"))
    with pytest.warns(Notice, match="no variant fp16 of vae is there: plain weights are taken"):
        source = open_source(folder, variant="fp16")
    with torch.no_grad():
        assert same(load(open_pipeline(source), "eager")(**CALL, num_inference_steps=1, seed=1).images, made(smallest))
    with pytest.raises(UserError, match="has no variant 'bf16'") as error:
        open_source(folder, variant="bf16")
    assert "fp16" in error.value.fix


def made(folder):
    return ours(folder, num_inference_steps=1, seed=1)


@pytest.mark.parametrize(
    "channels, name", [(8, "InstructPix2Pix"), (5, "depth-to-image"), (7, "no supported pipeline")]
)
def test_a_unet_that_no_call_can_run_is_refused_before_the_export(smallest, tmp_path, channels, name):
    with pytest.raises(UserError, match=f"takes {channels} channels.*{name}"):
        open_pipeline(edited(smallest, tmp_path / "pix2pix", "unet", in_channels=channels))


# ------------------------------------------------------------------------------------------------ InstructPix2Pix


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def editing(request, tmp_path_factory):
    """A pipeline whose UNet takes the latents of an image beside its own, and diffusers' class for it."""
    source = request.getfixturevalue(request.param)
    folder = tmp_path_factory.mktemp("editing") / "pipeline"
    config = dict(diffusers.UNet2DConditionModel.load_config(source / "unet")) | {"in_channels": 8}
    torch.manual_seed(2)
    unet = diffusers.UNet2DConditionModel.from_config(config)
    xl = request.param == "sdxl"
    cls = diffusers.StableDiffusionXLInstructPix2PixPipeline if xl else diffusers.StableDiffusionInstructPix2PixPipeline
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(source / "scheduler")
    options = {} if xl else dict(safety_checker=None, requires_safety_checker=False)
    cls.from_pretrained(source, unet=unet.eval(), scheduler=scheduler, **options).save_pretrained(folder)
    return folder, cls


@pytest.fixture(scope="module")
def photo():
    rows, columns = np.mgrid[0:64, 0:64]
    return Image.fromarray(np.stack([rows * 4, columns * 4, (rows + columns) % 64 * 4], -1).astype(np.uint8))


@pytest.mark.parametrize("guidance, image_guidance", [(5.0, 1.5), (5.0, 1.0), (1.0, 1.5), (5.0, 0.5)])
def test_a_model_that_edits_images_is_guided_by_text_and_image(editing, photo, guidance, image_guidance):
    """Three rows for each image, in the order of the paper; one where either guidance is off, as diffusers has it."""
    folder, cls = editing
    latents = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    call = dict(num_inference_steps=2, guidance_scale=guidance, image_guidance_scale=image_guidance, image=photo)
    expected = theirs(folder, cls, latents=latents, negative_prompt="dog", **call)
    pipeline = load(open_pipeline(folder), "eager")
    found = pipeline(latents=latents.numpy(), negative_prompt="dog", **CALL | call)
    assert same(found.images, expected)


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_exported_model_that_edits_images_draws_the_same_in_a_batch_of_two(editing, photo, tmp_path, engine):
    folder, _ = editing
    if "StableDiffusionXL" in (folder / "model_index.json").read_text():
        pytest.skip("what differs from SDXL is what differs here from SD1.5")
    bundle = export_pipeline(folder, tmp_path / "bundle", profile="batch=2,size=64")
    assert bundle.component("unet").dims["batch"].max == 6
    call = dict(prompt=["the cat", "a dog"], image=[photo, photo.rotate(90)], steps=2, seed=3, output_type="np")
    with load(bundle, engine) as compiled, load(open_pipeline(folder), "eager") as eager:
        assert same(compiled(**call).images, eager(**call).images)


def test_what_an_editing_model_cannot_take_is_refused(editing, smallest, photo):
    pipeline = load(open_pipeline(editing[0]), "eager", low_memory=True)
    for call, words in (
        ({}, "needs an image to edit"),
        (dict(image=photo, mask_image=photo), "no mask"),
        (dict(image=photo, strength=0.5), "takes all steps"),
        (dict(image=photo, image_guidance_scale=-1), "invalid image_guidance_scale"),
    ):
        with pytest.raises(UserError, match=words):
            pipeline("the cat", **call)
    with pytest.raises(UserError, match="does not edit images"):
        load(open_pipeline(smallest), "eager", low_memory=True)("the cat", image=photo, image_guidance_scale=1.5)
    with pytest.raises(UserError, match="cannot be quantized"):
        export_pipeline(editing[0], "never", precision="int8")


# ----------------------------------------------------------------------------------------------------- learned tokens


@pytest.fixture(scope="module")
def inverted(smallest, tmp_path_factory):
    """A pipeline with a token of three vectors and one of a single one, as diffusers saves it."""
    folder = tmp_path_factory.mktemp("inverted") / "pipeline"
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(smallest)
    torch.manual_seed(9)
    pipeline.load_textual_inversion({"<toy>": torch.randn(3, 32) * 0.5})
    pipeline.load_textual_inversion({"<dot>": torch.randn(1, 32) * 0.5})
    pipeline.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prompt", ["the <toy> cat", "<toy>, <dot> and <toy>", "a dog <toy>" + " cat" * 90])
def test_a_token_of_several_vectors_stands_for_all_of_them(inverted, prompt):
    latents = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))
    call = dict(prompt=prompt, num_inference_steps=2, guidance_scale=5.0)
    expected = theirs(inverted, latents=latents, **call)
    assert same(ours(inverted, latents=latents.numpy(), **call), expected)
    weighted = ours(inverted, latents=latents.numpy(), prompt_weights=True, **call)
    assert same(weighted, expected)


# --------------------------------------------------------------------------------------------------------- ControlNets


def test_a_controlnet_that_pools_what_it_adds(small, tmp_path):
    """Shuffle's: one value for each channel, and nothing for the rows without a prompt."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(small / "unet")
    torch.manual_seed(3)
    made = diffusers.ControlNetModel.from_unet(unet)
    controlnet = diffusers.ControlNetModel.from_config(
        dict(made.config) | {"global_pool_conditions": True, "conditioning_embedding_out_channels": (8, 16, 16)}
    )
    for name, parameter in controlnet.named_parameters():
        if "controlnet_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    controlnet.save_pretrained(tmp_path / "shuffle")
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        **diffusers.StableDiffusionPipeline.from_pretrained(small).components,
        controlnet=controlnet,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    image = np.random.default_rng(1).random((1, 64, 64, 3), np.float32)
    latents = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    mine = load(open_pipeline(open_source(small, controlnet=tmp_path / "shuffle")), "eager")
    for guidance in (1.0, 5.0):
        call = dict(num_inference_steps=2, guidance_scale=guidance)
        shown = torch.tensor(image).permute(0, 3, 1, 2)
        with torch.no_grad():
            expected = pipeline(**CALL, image=shown, latents=latents, **call).images
        drawn = mine(**CALL, control_image=image[0], latents=latents.numpy(), **call).images
        assert same(drawn, expected), guidance


# ------------------------------------------------------------------------------------------------- what is left out


def test_what_a_bundle_leaves_out_is_said(smallest, sdxl, tmp_path, monkeypatch):
    checked = shutil.copytree(smallest, tmp_path / "checked")
    index = json.loads((checked / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (checked / "model_index.json").write_text(json.dumps(index))
    with pytest.warns(Notice, match="safety checker is left out.* --safety-checker .*exports it"):
        constants.note_left_out(open_source(checked), safety_checker=True)
    monkeypatch.setattr(constants, "find_spec", lambda name: name)
    with pytest.warns(Notice, match="no invisible watermark"):
        constants.note_left_out(open_source(sdxl), safety_checker=True)
    monkeypatch.setattr(constants, "find_spec", lambda name: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constants.note_left_out(open_source(sdxl), safety_checker=True)
        constants.note_left_out(open_source(smallest), safety_checker=True)
        constants.note_left_out(open_source(checked), safety_checker=False)


def test_the_export_says_what_it_leaves_out(smallest, tmp_path, monkeypatch):
    def said(source, safety_checker):
        raise UserError(f"asked about {source.name}", "")

    monkeypatch.setattr("accel.export.pipeline.note_left_out", said)
    with pytest.raises(UserError, match="asked about"):
        export_pipeline(smallest, tmp_path / "bundle")


# ------------------------------------------------------------------------------------------------- SDXL's refiner


@pytest.fixture(scope="module")
def refiner(sdxl, tmp_path_factory):
    """A refiner as it is published: the second text encoder alone, and an aesthetic score in its size conditioning."""
    folder = tmp_path_factory.mktemp("refiner") / "pipeline"
    base = diffusers.StableDiffusionXLPipeline.from_pretrained(sdxl)
    config = dict(base.unet.config) | {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 72}
    torch.manual_seed(8)
    diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=diffusers.UNet2DConditionModel.from_config(config).eval(),
        scheduler=base.scheduler,
        requires_aesthetics_score=True,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def refiner_bundle(refiner, tmp_path_factory):
    return export_pipeline(refiner, tmp_path_factory.mktemp("refiner-bundle") / "bundle", profile="batch=1,size=64")


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_refiner_goes_on_where_the_base_model_stopped(sdxl, refiner, refiner_bundle, engine):
    """The ensemble of experts of SDXL's report: the base for 80 % of the noise, the refiner for the rest."""
    latents = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    how = dict(num_inference_steps=10, guidance_scale=5.0)
    half = theirs(sdxl, latents=latents, denoising_end=0.8, **how | {"output_type": "latent"})
    call = dict(denoising_start=0.8, aesthetic_score=7.0, **how)
    expected = theirs(refiner, diffusers.StableDiffusionXLImg2ImgPipeline, image=half, **call)
    base = load(open_pipeline(sdxl), "eager")(latents=latents.numpy(), denoising_end=0.8, **CALL | how).latents
    bundle = open_pipeline(refiner) if engine == "eager" else refiner_bundle
    with load(bundle, engine) as pipeline:
        assert same(pipeline(latents=base, **CALL | call).images, expected)


def test_a_refiner_starts_from_an_image(refiner, photo, monkeypatch):
    from diffusers.models.autoencoders import vae
    from diffusers.pipelines.stable_diffusion_xl import pipeline_stable_diffusion_xl_img2img as xl

    from accel.pipeline.initial_latents import _OF_IMAGE
    from accel.sampling import noise

    draws = iter((_OF_IMAGE, 0))
    drawn = lambda shape, **_: torch.from_numpy(noise.normal([5], next(draws), tuple(shape)[1:]))  # noqa: E731
    monkeypatch.setattr(vae, "randn_tensor", drawn)
    monkeypatch.setattr(xl, "randn_tensor", drawn)
    call = dict(image=photo, num_inference_steps=10, guidance_scale=5.0)
    expected = theirs(refiner, diffusers.StableDiffusionXLImg2ImgPipeline, **call)
    assert same(ours(refiner, seed=5, **call), expected), "with a strength of 0.3, as diffusers has it"


def test_what_a_refiner_cannot_do_is_refused(refiner, sdxl, photo):
    pipeline = load(open_pipeline(refiner), "eager", low_memory=True)
    latents = np.zeros((1, 4, 16, 16), np.float32)
    for call, words in (
        ({}, "needs one to start from"),
        (dict(denoising_start=0.8), "goes on with the latents of another run"),
        (dict(denoising_start=0.8, image=photo, latents=latents), "not an image"),
        (dict(denoising_start=0.9995, steps=5, latents=latents), "no step of 5"),
        (dict(denoising_start=1.5, latents=latents), "invalid denoising_start"),
    ):
        with pytest.raises(UserError, match=words):
            pipeline("the cat", **call)
    with pytest.raises(UserError, match="a refiner cannot be quantized"):
        export_pipeline(refiner, "never", precision="int8")


# ------------------------------------------------------------------------------------------------------- clip skip


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_clip_skip_counts_as_in_diffusers(family, request, monkeypatch):
    """For prompts alone: negative ones take all layers."""
    # diffusers asks for `text_model`, which transformers 5 has no more.
    monkeypatch.setattr(transformers.CLIPTextModel, "text_model", property(lambda model: model), raising=False)
    folder = request.getfixturevalue(family)
    latents = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(0))
    call = dict(num_inference_steps=2, guidance_scale=5.0, negative_prompt="dog")
    expected = theirs(folder, latents=latents, clip_skip=1, **call)
    found = ours(folder, latents=latents.numpy(), clip_skip=1, **call)
    assert same(found, expected) and not same(ours(folder, latents=latents.numpy(), **call), expected)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_bundle_keeps_the_clip_skip_that_it_was_exported_with(smallest, smallest_bundle, tmp_path, engine, completed):
    made = export_pipeline(smallest, tmp_path / "bundle", clip_skip=1, components=("text_encoder", "unet"))
    bundle = completed(made, Bundle.open(smallest_bundle))
    call = dict(steps=2, guidance_scale=5.0, negative_prompt="dog", seed=3)
    expected = ours(smallest, clip_skip=1, **call)
    with load(bundle, engine) as pipeline:
        assert same(pipeline(**CALL | call).images, expected)
        assert same(pipeline(**CALL | call, clip_skip=0).images, ours(smallest, **call))


def test_a_clip_skip_that_a_bundle_has_no_output_for_is_refused(smallest, smallest_bundle):
    with load(Bundle.open(smallest_bundle), "onnxruntime", low_memory=True) as pipeline:
        with pytest.raises(UserError, match="invalid clip_skip: 1 .this bundle's text_encoder can do: 0") as error:
            pipeline("the cat", clip_skip=1)
        assert error.value.fix == "accel export MODEL OUT --clip-skip 1"
    for skip in (2, -1):
        with pytest.raises(UserError, match=f"invalid clip_skip: {skip}"):
            export_pipeline(smallest, "never", clip_skip=skip)
