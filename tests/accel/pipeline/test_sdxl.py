"""SDXL, SSD-1B and Vega from end to end, against diffusers' own pipeline."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

import accel
from accel.bundle import Bundle
from accel.bundle.shape_profiles import PROFILES, SDXL_ASPECTS
from accel.export.pipeline import export_pipeline
from accel.sampling import noise

ONE_STEP_OF_A_PIXEL = 1 / 255


@pytest.fixture(scope="module")
def family(sdxl, sdxl_bundle, sdxl_maker, completed, tmp_path_factory):
    """(pipeline folder, bundle) of a topology. The students have the base's text encoders and VAE."""

    @cache
    def get(topology: str):
        if topology == "sdxl":
            return sdxl, Bundle.open(sdxl_bundle)
        folder = tmp_path_factory.mktemp(topology)
        source = sdxl_maker(folder / "source", topology)
        unet = export_pipeline(
            source,
            folder / "bundle",
            profile="static",
            components=("unet",),
            sampler={"name": "euler", "steps": 3, "guidance": 5.0},
        )
        return source, completed(unet, Bundle.open(sdxl_bundle))

    return get


def reference(source, **options):
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(source)
    pipe.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=3, guidance_scale=5.0, height=64, width=64, output_type="np") | options
    shape = (4, options["height"] // 4, options["width"] // 4)
    return pipe("the cat", latents=torch.from_numpy(noise.normal([5], 0, shape)), **options).images


def check(source, bundle, engine, theirs=(), **options):
    expected = reference(source, **options, **dict(theirs))
    renamed = {"num_inference_steps": "steps", "crops_coords_top_left": "crop"}
    own = {renamed.get(key, key): value for key, value in options.items()}
    actual = accel.load(bundle, engine=engine)("the cat", seed=5, output_type="np", **own).images
    assert expected.std() > 0.01
    assert np.abs(actual - expected).max() < ONE_STEP_OF_A_PIXEL


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_sdxl_equals_diffusers_on_every_engine(family, engine):
    check(*family("sdxl"), engine, negative_prompt="a dog")


@pytest.mark.parametrize(
    "options",
    [
        dict(guidance_scale=0.0),
        dict(width=96),
        dict(original_size=(48, 80), crops_coords_top_left=(8, 4), target_size=(128, 96)),
    ],
    ids=["no guidance", "wide", "sizes"],
)
def test_sdxl_guidance_off_other_sides_and_size_conditioning(family, options):
    source, bundle = family("sdxl")
    # diffusers zeroes only the unprompted half's text; its sizes default to zeros of the target's own.
    check(source, bundle, "onnxruntime", **options)


@pytest.mark.parametrize("topology", ["ssd-1b", pytest.param("vega", marks=pytest.mark.slow)])
def test_pruned_students_of_sdxl_equal_diffusers(family, topology):
    source, bundle = family(topology)
    config = json.loads((bundle.path / "unet/config.json").read_text())
    assert config["mid_block_type"] == "UNetMidBlock2D"
    assert bundle.manifest.family == "sdxl" and bundle.manifest.pipeline["zero_empty_prompt"]
    check(source, bundle, "onnxruntime")


def test_the_manifest_has_both_encoders_with_tokenizers_of_their_own(family):
    _, bundle = family("sdxl")
    assert {"text_encoder", "text_encoder_2"} <= set(bundle.manifest.components)
    tokenizers = accel.load(bundle, engine="onnxruntime").tokenizers
    assert tokenizers["text_encoder"].pad != tokenizers["text_encoder_2"].pad


def test_sdxl_is_benched(family):
    from accel import bench

    _, bundle = family("sdxl")
    variants = [bench.parse(name) for name in ("eager", "onnxruntime")]
    result = bench.measure(bundle, variants, bench.BenchSettings(rounds=1, steps=1, memory=False))
    rows = {row["variant"]: row for row in result.document.as_dict()["rows"]}
    assert set(rows["onnxruntime"]["scopes"]) == {"text_encoder", "text_encoder_2", "unet", "vae_decoder", "image"}
    assert rows["onnxruntime"]["parity"]["image"]["max_abs"] < 1
    assert not result.failed


def test_the_nine_aspect_ratios_are_profiles_of_about_a_megapixel():
    assert len(SDXL_ASPECTS) == 9
    for width, height in SDXL_ASPECTS:
        profile = PROFILES[f"sdxl-{width}x{height}"]
        dims = profile.dims(vae_scale=8, latent_multiple=4, guidance=True)
        assert (dims["latent_width"].min, dims["latent_height"].min) == (width // 8, height // 8)
        assert 0.93 < width * height / 1024**2 <= 1.0001
        assert PROFILES["sdxl-aspects"].width.admits(width) and PROFILES["sdxl-aspects"].height.admits(height)


# float16 and the VAE


@pytest.fixture
def louder(sdxl_maker, tmp_path):
    """An SDXL whose VAE is too loud for float16 in its last block, as the published one is."""
    from diffusers import AutoencoderKL

    def make(force_upcast=True, factor=3e5):
        source = sdxl_maker(tmp_path / "source")
        vae = AutoencoderKL.from_pretrained(source / "vae")
        with torch.no_grad():
            vae.decoder.up_blocks[2].resnets[1].conv2.weight *= factor
        vae.register_to_config(force_upcast=force_upcast)
        vae.save_pretrained(source / "vae")
        return source

    return make


def test_a_loud_vae_gets_float32_islands_and_the_same_image(louder, tmp_path):
    source = louder()
    bundle = export_pipeline(source, tmp_path / "b", profile="static", precision="fp16", components=("vae_decoder",))
    vae = bundle.component("vae_decoder")
    assert vae.dtype == "float16"
    assert "decoder.conv_norm_out" in vae.float32 and any("up_blocks.2" in name for name in vae.float32)
    assert set(vae.fp32_output) < set(vae.float32) and any("up_blocks.2" in name for name in vae.fp32_output)
    assert not any("mid_block" in name or "up_blocks.0" in name for name in vae.float32)
    assert "activations reach" in vae.parity["precision_reason"]
    assert vae.parity["relative_l2"] < 0.02
    again = Bundle.open(bundle.path).component("vae_decoder")
    assert again.fp32_output == vae.fp32_output
    z = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float16)
    outputs = [
        np.asarray(accel.load_engine(bundle, "vae_decoder", engine)(latent_sample=z)["sample"], np.float32)
        for engine in ("eager", "onnxruntime")
    ]
    assert np.isfinite(outputs[0]).all() and np.abs(outputs[0] - outputs[1]).max() < 0.05 * np.abs(outputs[0]).max()


@pytest.mark.parametrize(("asked", "dtype"), [(True, "float32"), (False, "float16")])
def test_a_vae_fixed_for_float16_is_recognised_by_its_config(louder, tmp_path, asked, dtype):
    source = louder(force_upcast=asked, factor=1)
    bundle = export_pipeline(source, tmp_path / "b", profile="static", precision="fp16", components=("vae_decoder",))
    vae = bundle.component("vae_decoder")
    assert vae.dtype == dtype and not vae.fp32_output
    assert ("force_upcast" in vae.parity["precision_reason"]) == asked
