"""Layouts in which models are published, shrunk: each draws what diffusers draws, without an export."""

from __future__ import annotations

import json
import shutil
import warnings

import diffusers
import numpy as np
import pytest
import torch

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
