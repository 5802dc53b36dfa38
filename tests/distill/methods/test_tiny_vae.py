"""A tiny VAE: what it is taught, that it learns, and that everything downstream takes it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import accel
from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders
from accel.distill.methods.tiny_vae import TinyVaeMethod, psnr, tiny_config
from accel.errors import UserError
from accel.models.source import open_source
from accel.sampling import noise


@pytest.fixture(scope="module")
def method(sd15):
    recipe = recipes.changed(settings.TinyVaeRecipe(), width=8, blocks=1, seed=3)
    return TinyVaeMethod(recipe, Encoders(open_source(sd15)))


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 4, 8, 8, generator=generator)
    return {"latent_mean": mean, "latent_std": torch.full_like(mean, 0.1), "index": [0, 1, 2, 3]}


def test_the_teacher_is_the_full_decoder_on_latents_as_the_unet_sees_them(method, sd15, batch):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(sd15 / "vae").eval()
    with torch.no_grad():
        expected = vae.decode(batch["latent_mean"] / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert torch.equal(method.truth(batch["latent_mean"]), expected)


def test_it_has_as_many_stages_as_the_vae_and_loads_as_diffusers_own(method, tmp_path):
    from diffusers import AutoencoderTiny

    full = {"block_out_channels": (1,) * 4, "latent_channels": 4, "in_channels": 3, "out_channels": 3}
    assert tiny_config(full, 64, 3)["num_decoder_blocks"] == (3, 3, 3, 1)  # TAESD's
    method.save(tmp_path)
    again = AutoencoderTiny.from_pretrained(tmp_path)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.decode(z).sample, method.tiny.decode(z).sample)
        assert again.decode(z).sample.shape == (1, 3, 32, 32)


def test_gradients_reach_the_tiny_vae_and_nothing_else_and_it_learns(sd15, batch):
    recipe = recipes.changed(settings.TinyVaeRecipe(), width=8, blocks=1)
    method = TinyVaeMethod(recipe, Encoders(open_source(sd15)))
    method.place(torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(method.tiny.parameters(), lr=5e-3)
    seen = []
    for step in range(25):
        loss, terms = method.loss(method.phases[0], batch, step)
        assert set(terms) == {"reconstruction", "encoder", "perceptual"}
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.tiny.parameters())
        optimizer.step()
        seen.append({name: float(term.detach()) for name, term in terms.items()})
    assert all(p.grad is None for p in method.encoders.vae.parameters())
    assert seen[-1]["reconstruction"] < 0.7 * seen[0]["reconstruction"]
    assert seen[-1]["perceptual"] < seen[0]["perceptual"]


def test_weights_decide_the_terms(sd15, batch):
    recipe = recipes.changed(settings.TinyVaeRecipe(), width=8, blocks=1, perceptual_weight=0.0, encoder_weight=0.0)
    method = TinyVaeMethod(recipe, Encoders(open_source(sd15)))
    loss, terms = method.loss(method.phases[0], batch, 0)
    assert "perceptual" not in terms and torch.equal(loss, terms["reconstruction"])
    with pytest.raises(UserError, match="weights"):
        TinyVaeMethod(recipes.changed(recipe, reconstruction_weight=0.0), Encoders(open_source(sd15)))


def test_psnr_of_equal_images_has_no_end_and_noise_lowers_it(method):
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        own = method.tiny.decode(z).sample.clamp(-1, 1)
    assert psnr(method.tiny, z, own) > 100
    assert 15 < psnr(method.tiny, z, own + 0.2 * torch.randn_like(own)) < 30


# The one that ships


def test_the_shipped_decoder_is_as_good_as_its_figures_say():
    from diffusers import AutoencoderTiny

    from accel.assets import DIGITS
    from accel.distill.sources import digits

    folder = DIGITS / "tiny-vae"
    quality, card = json.loads((folder / "quality.json").read_text()), (folder / "README.md").read_text()
    tiny, vae = AutoencoderTiny.from_pretrained(folder).eval(), open_source("digits").load("vae")
    images = digits.dataset("held-out")[0][::4]
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        full = vae.decode(latents).sample.clamp(-1, 1)
    found = psnr(tiny, latents * vae.config.scaling_factor, full)
    # A quarter of the images stands for all of them.
    assert found > 25 and found == pytest.approx(quality["psnr_against_full_db"], abs=0.3)
    count = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("tiny_decoder", tiny.decoder), ("full_decoder", vae.decoder))
    }
    assert count == quality["parameters"] and count["tiny_decoder"] < 0.3 * count["full_decoder"]
    for figure in (quality["psnr_against_full_db"], *count.values()):
        assert f"{figure:,}" in card


# Everything downstream takes it


@pytest.fixture(scope="module")
def tiny(sd15, sd15_bundle, completed, tmp_path_factory):
    """(pipeline, folder of a tiny VAE with random weights, bundle with it)."""
    from diffusers import AutoencoderTiny

    from accel.bundle import Bundle
    from accel.export.pipeline import export_pipeline

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(2)
    config = tiny_config(open_source(sd15).config("vae"), 8, 1)
    AutoencoderTiny(**config).save_pretrained(folder / "tiny-vae")
    halves = export_pipeline(
        open_source(sd15, vae=folder / "tiny-vae"),
        folder / "bundle",
        profile="batch=1-2,size=64",
        components=("vae_decoder", "vae_encoder"),
        sampler={"name": "dpmpp_2m", "steps": 4, "guidance": 3.0},
    )
    return sd15, folder / "tiny-vae", completed(halves, Bundle.open(sd15_bundle))


def tiny_pipeline(tiny):
    import diffusers

    source, folder, _ = tiny
    vae = diffusers.AutoencoderTiny.from_pretrained(folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(source, vae=vae)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("engine", ["eager", "onnxruntime", "openvino"])
def test_a_tiny_decoder_makes_diffusers_image(tiny, engine):
    _, _, bundle = tiny
    assert bundle.manifest.pipeline["scaling_factor"] == 1.0
    latents = torch.from_numpy(noise.normal([5], 0, (4, 16, 16)))
    expected = tiny_pipeline(tiny)(
        "the cat", num_inference_steps=4, guidance_scale=3.0, latents=latents, output_type="np", height=64, width=64
    ).images
    found = accel.load(bundle, engine=engine)("the cat", seed=5, output_type="np").images
    assert expected.std() > 0.01 and np.abs(found - expected).max() < 1 / 255


def test_the_tiny_encoder_gives_latents_without_a_posterior(tiny):
    from diffusers import AutoencoderTiny

    from accel.pipeline.initial_latents import encode

    _, folder, bundle = tiny
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = AutoencoderTiny.from_pretrained(folder).encode(torch.from_numpy(pixels)).latents.numpy()
    encoder = accel.load_engine(bundle, "vae_encoder", "onnxruntime")
    found = encode(encoder, pixels, bundle.manifest.pipeline, [0], 0)
    assert np.abs(found - expected).max() < 1e-4


def test_attach_decodes_with_the_tiny_decoder(tiny):
    pipe = tiny_pipeline(tiny)

    def draw():
        return pipe(
            "the cat",
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            height=64,
            width=64,
        ).images

    before = draw()
    with accel.attach(pipe, tiny[2], engine="onnxruntime") as attached:
        assert "vae_decoder" in attached.engines
        assert np.abs(draw() - before).max() < 1 / 255
