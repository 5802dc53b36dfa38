"""Inpainting: masks, the nine channels as diffusers' pipeline makes them, and training from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders
from accel.distill.diffusion import inpainting
from accel.distill.run import execute
from accel.errors import UserError
from accel.models.source import open_source


def with_channels(folder: Path, source: Path, channels: int) -> Path:
    """A pipeline whose UNet takes so many input channels."""
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel

    parts = StableDiffusionPipeline.from_pretrained(source).components
    torch.manual_seed(0)
    parts["unet"] = UNet2DConditionModel.from_config(dict(parts["unet"].config) | {"in_channels": channels})
    StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def inpaint(sd15, tmp_path_factory) -> Path:
    return with_channels(tmp_path_factory.mktemp("inpaint") / "model", sd15, 9)


@pytest.fixture(scope="module")
def images(six_images) -> Path:
    return six_images


def recipe(make, source: Path, images: Path, **fields) -> settings.Recipe:
    common: dict = dict(
        model=str(source),
        data=str(images),
        resolution=64,
        steps=2,
        batch=2,
        checkpoint_every=2,
        sample_every=2,
        sample_steps=1,
        sample_prompts="the cat",
        log="none",
    )
    return recipes.changed(make(), **common | fields)


def test_masks_are_rectangles_of_every_size_and_some_hide_all():
    masks = inpainting.masks(3, range(2000), 16, 12)
    assert masks.shape == (2000, 1, 16, 12) and set(masks.unique().tolist()) == {0.0, 1.0}
    for mask in masks[:, 0]:
        rows, columns = mask.amax(1), mask.amax(0)
        assert torch.equal(mask, rows[:, None] * columns[None]) and mask.any()  # a product: one rectangle
        assert all((line.diff() == 1).sum() <= 1 and (line.diff() == -1).sum() <= 1 for line in (rows, columns))
    share = (masks.flatten(1).amin(1) == 1).float().mean()
    assert 0.22 < share < 0.29  # a quarter, and the few rectangles that are as large
    assert all(masks[:, 0].mean(0).flatten() > 0.26)  # no corner is spared
    assert torch.equal(masks[7:9], inpainting.masks(3, [7, 8], 16, 12))


def test_the_channels_are_those_of_diffusers_pipeline(inpaint):
    from diffusers import StableDiffusionInpaintPipeline

    encoders = Encoders(open_source(inpaint))
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(inpaint)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixels": pixels, "index": [0, 4], **encoders.images(pixels)}
    ours = inpainting.hidden(batch, 3, encoders)
    mask = inpainting.masks(3, [0, 4], 16, 16)
    assert 0 < mask.mean() < 1
    large = torch.nn.functional.interpolate(mask, (64, 64))
    with torch.no_grad():
        seen = pipeline.vae.encode(pixels * (large < 0.5)).latent_dist
        theirs, _ = pipeline.prepare_mask_latents(
            large, seen.mean * pipeline.vae.config.scaling_factor, 2, 64, 64, torch.float32, "cpu", None, False
        )
    assert torch.equal(ours[:, :1], theirs)
    spread = (ours[:, 1:] - seen.mean * pipeline.vae.config.scaling_factor) / (
        seen.std * pipeline.vae.config.scaling_factor
    )
    assert abs(spread.mean()) < 0.1 and abs(spread.std() - 1) < 0.1  # a draw of the posterior, as the pipeline's


@pytest.mark.parametrize(
    "make", [recipes.tiny, settings.FinetuneRecipe, settings.LoraRecipe], ids=lambda made: made.__name__
)
def test_training_an_inpainting_model(inpaint, images, tmp_path, make):
    from diffusers import StableDiffusionInpaintPipeline

    made = recipe(make, inpaint, images)
    assert execute(made, tmp_path / "out").steps == 2
    losses = [json.loads(line) for line in (tmp_path / "out-run" / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(np.isfinite(line["task"]) for line in losses)
    assert (tmp_path / "out-run" / "samples" / "step-000002.png").is_file()
    if make is settings.LoraRecipe:
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(inpaint)
        pipeline.load_lora_weights(tmp_path / "out")
    else:
        pipeline = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.unet.config.in_channels == 9
    image = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    out = pipeline("the cat", image=image, mask_image=image, height=64, width=64, num_inference_steps=1)
    assert out.images[0].size == (64, 64)


def test_what_cannot_be_is_refused_at_the_start(inpaint, sd15, images, tmp_path):
    with pytest.raises(UserError, match="masks are drawn anew"):
        execute(recipe(recipes.tiny, inpaint, images, cache=str(tmp_path / "cache")), tmp_path / "out")
    five = with_channels(tmp_path / "five", sd15, 5)
    with pytest.raises(UserError, match="5 input channels"):
        execute(recipe(recipes.tiny, five, images), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["five"]
