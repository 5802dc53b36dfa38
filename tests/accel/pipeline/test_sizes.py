"""Sizes that a UNet cannot halve exactly, and images that the VAE sees in tiles, against diffusers' own pipelines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import accel
from accel.bundle.shape_profiles import Range
from accel.cli import main
from accel.errors import UserError
from accel.export.pipeline import export_pipeline
from accel.models.source import open_source
from accel.pipeline.initial_latents import _OF_IMAGE
from accel.sampling import noise

ONE_STEP_OF_A_PIXEL = 1 / 255
SAMPLER = {"name": "dpmpp_2m", "steps": 3, "guidance": 5.0}
SEED = 7


def diffusers_pipeline(source, name: str = "StableDiffusionPipeline", **parts):
    import diffusers

    pipe = getattr(diffusers, name).from_pretrained(source, **parts)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8 px also of a VAE whose scale is 4
    return pipe


def drawn(pipe, height: int, width: int, **options) -> np.ndarray:
    latents = torch.from_numpy(noise.normal([SEED], 0, (4, height // 4, width // 4)))
    how = dict(num_inference_steps=3, guidance_scale=5.0, height=height, width=width, output_type="np")
    return pipe("the cat", latents=latents, **how, **options).images


def ours(pipe, height: int, width: int, **options) -> np.ndarray:
    return pipe("the cat", seed=SEED, height=height, width=width, output_type="np", **options).images


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    return found.shape == expected.shape and expected.std() > 0.01 and np.abs(found - expected).max() < 1 / 255


@pytest.fixture(scope="module")
def one_size(sd15, tmp_path_factory):
    """Four stages at 72 x 88 px: latents of 18 x 22, which become 9 x 11, 5 x 6 and 3 x 3."""
    out = tmp_path_factory.mktemp("one") / "bundle"
    return export_pipeline(sd15, out, profile="batch=1,height=72,width=88", sampler=SAMPLER)


@pytest.fixture(scope="module")
def any_size(sd15_tiny, tmp_path_factory):
    """Three stages at all multiples of 4 px, with a VAE for tiles of 32 px, the size in its config."""
    out = tmp_path_factory.mktemp("any") / "bundle"
    profile = "batch=1-2,height=32-128,width=32-128,step=4,vae_tile=32"
    return export_pipeline(sd15_tiny, out, profile=profile, sampler=SAMPLER)


@pytest.fixture(scope="module")
def theirs(sd15_tiny):
    """(height, width, tiled) -> diffusers' image of the same pipeline."""
    pipe = diffusers_pipeline(sd15_tiny)

    def draw(height: int, width: int, tiled: bool) -> np.ndarray:
        (pipe.vae.enable_tiling if tiled else pipe.vae.disable_tiling)()
        return drawn(pipe, height, width)

    return draw


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_bundle_of_one_odd_size_equals_diffusers(sd15, one_size, engine):
    expected = drawn(diffusers_pipeline(sd15), 72, 88)
    assert close(ours(accel.load(one_size, engine), 72, 88), expected)


def test_a_folder_takes_every_multiple_of_the_vaes_scale(sd15):
    pipe = accel.load(sd15, "eager")
    for size in ((72, 88), (68, 100)):
        found = ours(pipe, *size, sampler="dpmpp_2m", steps=3, guidance_scale=5.0)
        assert close(found, drawn(diffusers_pipeline(sd15), *size))
    with pytest.raises(UserError, match=r"height 70 is outside profile 'any' \(4 to 8192 in steps of 4\)"):
        pipe("the cat", height=70)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_range_in_fine_steps_with_tiles_equals_diffusers(any_size, theirs, engine):
    """The UNet at sizes that are odd at any stage, and the VAE in tiles down to one latent pixel."""
    with accel.load(any_size, engine) as pipe:
        assert pipe.tiling is not None and pipe.tiling.tile == 32
        for size in ((72, 88), (32, 100), (128, 128), (52, 32), (32, 32)):
            assert close(ours(pipe, *size), theirs(*size, True)), size
        assert np.abs(theirs(72, 88, True) - theirs(72, 88, False)).max() > 3 * ONE_STEP_OF_A_PIXEL


def test_the_graphs_take_what_the_profile_says(any_size):
    parts = any_size.manifest.components
    assert parts["unet"].dims["latent_height"] == Range(8, 32, 32, 1)
    assert parts["vae_decoder"].dims["latent_width"] == Range(1, 8, 8, 1)
    assert parts["vae_encoder"].dims["width"] == Range(4, 32, 32, 4)


def test_without_tiles_the_decoder_limits_the_size(any_size):
    with accel.load(any_size, "onnxruntime", vae_tiling=False) as pipe:
        assert pipe.tiling is None
        assert pipe("the cat", height=32, width=32, steps=1).images[0].size == (32, 32)
        with pytest.raises(UserError, match="height 72 is outside profile") as error:
            pipe("the cat", height=72, width=32)
        assert "vae_tiling=True" in error.value.fix


def test_tiles_of_another_size_are_the_callers(any_size, sd15_tiny):
    reference = diffusers_pipeline(sd15_tiny)
    reference.vae.enable_tiling()
    reference.vae.tile_sample_min_size, reference.vae.tile_latent_min_size = 16, 4
    pipe = accel.load(any_size, "onnxruntime", vae_tile=16)
    assert "vae tiling   16 px" in repr(pipe)
    assert close(ours(pipe, 40, 56), drawn(reference, 40, 56))
    pipe.enable_vae_tiling()
    assert pipe.tiling.tile == 32
    pipe.enable_vae_tiling(64)
    with pytest.raises(UserError, match="height of 40 px is one tile, and vae_decoder takes 4 to 32"):
        pipe("the cat", height=40, width=40)
    with pytest.raises(UserError, match="vae_tile is 30, which makes no tiles"):
        pipe.enable_vae_tiling(30)
    with pytest.raises(UserError, match="vae_tile = 32 without tiling"):
        accel.load(any_size, "onnxruntime", vae_tiling=False, vae_tile=32)


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_an_image_to_start_from_is_encoded_in_tiles(any_size, sd15_tiny, engine, monkeypatch):
    import diffusers.models.autoencoders.vae as vae
    from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_img2img as img2img

    queue = iter((_OF_IMAGE, 0))
    for module in (vae, img2img):
        draw = lambda shape, **_: torch.from_numpy(noise.normal([SEED], next(queue), tuple(shape)[1:]))  # noqa: E731
        monkeypatch.setattr(module, "randn_tensor", draw)
    rows, columns = np.mgrid[0:72, 0:88]
    image = Image.fromarray(np.stack([rows * 3, columns * 2, (rows + columns) % 97], -1).astype(np.uint8))
    reference = diffusers_pipeline(sd15_tiny, "StableDiffusionImg2ImgPipeline")
    reference.vae.enable_tiling()
    how = dict(image=image, strength=0.5, num_inference_steps=4, guidance_scale=5.0, output_type="np")
    expected = reference("the cat", **how).images
    found = accel.load(any_size, engine)("the cat", seed=SEED, height=72, width=88, **how).images
    assert close(found, expected)


def test_a_folder_tiles_when_it_is_asked_to(sd15_tiny, theirs):
    how = dict(sampler="dpmpp_2m", steps=3, guidance_scale=5.0)
    pipe = accel.load(sd15_tiny, "eager", vae_tiling=True)
    assert close(ours(pipe, 72, 88, **how), theirs(72, 88, True))
    pipe.disable_vae_tiling()
    assert close(ours(pipe, 72, 88, **how), theirs(72, 88, False))


def test_a_decoder_of_one_size_takes_no_tiles(one_size):
    """Its edge tiles would be smaller, and padded ones would be other images."""
    pipe = accel.load(one_size, "onnxruntime", vae_tiling=True, vae_tile=48)
    with pytest.raises(UserError, match="height of 72 px is cut into tiles of 48, 36 px, and vae_decoder takes 72"):
        pipe("the cat", height=72, width=88)


def test_the_command_line_draws_in_tiles(any_size, sd15_tiny, tmp_path, refused):
    out = tmp_path / "cat.png"
    run = ["run", str(any_size.path), "-p", "the cat", "--engine", "onnxruntime", "--height", "60", "--width", "40"]
    assert main([*run, "--vae-tiling", "--vae-tile", "16", "--out", str(out)]) == 0
    assert Image.open(out).size == (40, 60)
    assert "vae_tile is 30" in refused(*run, "--vae-tile", "30", "--out", tmp_path / "no.png")


@pytest.fixture(scope="module")
def controlled(small, tmp_path_factory):
    """A pipeline with a ControlNet, and the folder of it."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(small / "unet")
    config = dict(ControlNetModel.from_unet(unet).config) | {"conditioning_embedding_out_channels": (8, 16, 16)}
    torch.manual_seed(4)
    model = ControlNetModel.from_config(config).eval()
    with torch.no_grad():  # published ones start as zeros, which would show nothing
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 / parameter[0].numel() ** 0.5)
    folder = tmp_path_factory.mktemp("controlled") / "network"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("engine", ["eager", "onnxruntime"])
def test_a_controlled_image_of_an_odd_size_equals_diffusers(controlled, small, tmp_path, engine):
    model, folder = controlled
    edges = Image.fromarray((np.indices((68, 76)).sum(0)[..., None] % 9 * np.full(3, 28)).astype(np.uint8))
    pipe = diffusers_pipeline(small, "StableDiffusionControlNetPipeline", controlnet=model)
    expected = drawn(pipe, 68, 76, image=edges)
    source = open_source(small, controlnet=folder)
    bundle = export_pipeline(source, tmp_path / "out", profile="batch=1,height=68,width=76", sampler=SAMPLER)
    found = accel.load(bundle, engine)
    assert close(ours(found, 68, 76, control_image=edges), expected)
    assert np.abs(ours(found, 68, 76) - expected).max() > 3 * ONE_STEP_OF_A_PIXEL


def test_control_in_fine_steps_is_refused_before_the_export(controlled, small, tmp_path):
    source = open_source(small, controlnet=controlled[1])
    with pytest.raises(UserError, match="cannot go in steps of 4 px") as error:
        export_pipeline(source, tmp_path / "out", profile="batch=1,size=64-76,step=4")
    assert "height=76" in error.value.fix and not (tmp_path / "out").exists()


def test_a_tile_that_the_vae_cannot_overlap_is_refused_before_the_export(small, tmp_path):
    with pytest.raises(UserError, match="vae_tile is 40, which makes no tiles"):
        export_pipeline(small, tmp_path / "out", profile="size=64,vae_tile=40")
    assert not (tmp_path / "out").exists()
