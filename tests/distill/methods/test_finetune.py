"""Fine-tuning any pipeline: it learns, keeps its topology, and loads in diffusers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from accel.distill import recipes, settings
from accel.distill.run import execute


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Four smooth images with captions."""
    folder = tmp_path_factory.mktemp("pictures")
    lines = []
    for number in range(4):
        ramp = np.linspace(0, 255, 64) if number % 2 else np.full(64, 60 * number)
        Image.fromarray(np.tile(ramp, (64, 1))[..., None].repeat(3, -1).astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"the {'cat' if number % 2 else 'dog'}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def finetune(source: Path, images: Path, **fields) -> settings.FinetuneRecipe:
    common: dict = dict(
        model=str(source),
        data=str(images),
        resolution=64,
        cache="none",
        steps=30,
        batch=4,
        learning_rate=3e-3,
        checkpoint_every=100,
        sample_every=0,
        log="none",
        seed=1,
    )
    return recipes.changed(settings.FinetuneRecipe(), **common | fields)


@pytest.mark.parametrize("model", ["small", "smallest"])  # with a middle block and without
def test_the_loss_falls_and_the_topology_stays(model, images, request, tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = request.getfixturevalue(model)
    assert not execute(finetune(folder, images), tmp_path / "out").stopped
    tasks = [json.loads(line)["task"] for line in (tmp_path / "out-run" / "losses.jsonl").read_text().splitlines()]
    assert np.mean(tasks[-10:]) < 0.8 * np.mean(tasks[:10])
    tuned, base = (StableDiffusionPipeline.from_pretrained(path) for path in (tmp_path / "out", folder))
    assert {k: v for k, v in tuned.unet.config.items() if k[0] != "_"} == {
        k: v for k, v in base.unet.config.items() if k[0] != "_"
    }
    ours, theirs = tuned.unet.state_dict(), base.unet.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert not all(torch.equal(ours[key], theirs[key]) for key in ours)
    for name in ("vae", "text_encoder"):
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (tuned, base))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    image = tuned("the cat", num_inference_steps=2, height=64, width=64, output_type="np").images
    assert np.isfinite(image).all() and image.shape == (1, 64, 64, 3)


def test_sdxl_with_both_text_encoders(sdxl, images, tmp_path):
    """What nothing reads of the first encoder, behind its last but one layer, is left as it was."""
    from diffusers import StableDiffusionXLPipeline

    assert not execute(finetune(sdxl, images, steps=2, text_encoder=True), tmp_path / "out").stopped
    with safe_open(tmp_path / "out" / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118 (not a dict)
    tuned, base = (StableDiffusionXLPipeline.from_pretrained(path) for path in (tmp_path / "out", sdxl))
    for name in ("unet", "text_encoder", "text_encoder_2"):
        ours, theirs = (getattr(pipe, name).state_dict() for pipe in (tuned, base))
        assert ours.keys() == theirs.keys()
        same = {key for key in ours if torch.equal(ours[key], theirs[key])}
        if name == "text_encoder":
            unread = {key for key in ours if "layers.1." in key or "final_layer_norm" in key}
            assert unread <= same
            same -= unread
        assert len(same) < len(ours) / 10
