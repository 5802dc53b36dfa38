"""A pipeline folder with a small safety checker that rejects some of its images and lets others pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

SIDE = 32  # pixels that its network sees
CALL = {"prompt": ["the cat", "a dog", "the dog", "do", "a cat", "th"], "num_inference_steps": 2, "guidance_scale": 5.0}


def latents():
    """Noise of the six images of `CALL`, 32 px each."""
    import torch

    return torch.randn(6, 4, 8, 8, generator=torch.manual_seed(0))


def make_checker(seed: int = 3):
    """A StableDiffusionSafetyChecker of random weights, with 17 concepts and 3 that need special care."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(seed)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    vision = size | dict(image_size=SIDE, patch_size=8, projection_dim=24)
    config = CLIPConfig(text_config=size | {"projection_dim": 24}, vision_config=vision, projection_dim=24)
    checker = StableDiffusionSafetyChecker(config).eval()
    torch.nn.init.normal_(checker.visual_projection.weight)
    for layer in checker.vision_model.modules():  # else every image looks the same to it
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            torch.nn.init.normal_(layer.weight, std=0.2)
    for embeds in (checker.concept_embeds, checker.special_care_embeds):
        embeds.data = torch.randn(embeds.shape)
    return checker


def set_concepts(checker, shown) -> None:
    """Let image 0 be rejected, image 1 only because it needs special care, and the others pass, all by wide margins.

    Args:
        shown: what the checker is shown of six images.
    """
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import cosine_distance

    with torch.no_grad():
        embeds = checker.visual_projection(checker.vision_model(shown)[1])
    first, second = embeds[:2] - embeds.mean(0)  # in these directions the images differ, whatever they have in common
    checker.concept_embeds.data[4], checker.concept_embeds.data[7] = first, second
    checker.special_care_embeds.data[1] = second
    cosines = cosine_distance(embeds, torch.stack([first, second]))
    others = [cosines[1:, 0].max(), cosines[[0, 2, 3, 4, 5], 1].max()]
    assert cosines[0, 0] - others[0] > 0.02 and cosines[1, 1] - others[1] > 0.02
    checker.concept_embeds_weights.data.fill_(2.0)
    checker.special_care_embeds_weights.data.fill_(2.0)
    checker.concept_embeds_weights.data[4] = (cosines[0, 0] + others[0]) / 2
    checker.concept_embeds_weights.data[7] = cosines[1, 1] + 0.005
    checker.special_care_embeds_weights.data[1] = (cosines[1, 1] + others[1]) / 2


@pytest.fixture(scope="session")
def checked(smallest, tmp_path_factory) -> Path:
    """The smallest pipeline with a checker, `feature_extractor/` of 40 px cropped to 32, in diffusers' own files."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPImageProcessor

    extractor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE})
    pipeline = StableDiffusionPipeline.from_pretrained(smallest)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(**CALL, latents=latents()).images
    checker = make_checker()
    set_concepts(checker, extractor(images, return_tensors="pt").pixel_values)
    whole = StableDiffusionPipeline(**pipeline.components | dict(safety_checker=checker, feature_extractor=extractor))
    folder = tmp_path_factory.mktemp("checked") / "checked"
    whole.save_pretrained(folder)
    return folder


@pytest.fixture
def checked_copy(checked, tmp_path) -> Path:
    return Path(shutil.copytree(checked, tmp_path / "copy"))


@pytest.fixture
def edit_json():
    """Change a JSON file in place: edit_json(path, key=value, ...)."""

    def edit(path: Path, **changes) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


@pytest.fixture(scope="session")
def checked_bundle(checked, smallest_bundle, completed, tmp_path_factory):
    """The same pipeline as an opened fp32 bundle with its checker: batch 1-4, 32 to 64 px."""
    from accel.bundle import Bundle
    from accel.export.pipeline import export_pipeline

    made = export_pipeline(
        checked,
        tmp_path_factory.mktemp("checked-bundle") / "bundle",
        profile="batch=1-4,size=32-64",
        sampler={"name": "dpmpp_2m", "steps": 4, "guidance": 5},
        components=("vae_encoder",),
        safety_checker=True,
    )
    return completed(made, Bundle.open(smallest_bundle))


@pytest.fixture
def checked_bundle_copy(checked_bundle, tmp_path) -> Path:
    return Path(shutil.copytree(checked_bundle.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def drawn(checked):
    """diffusers' own output for `call`, float images."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(checked)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**CALL, latents=latents(), output_type="np")


@pytest.fixture
def call() -> dict:
    """A call that draws six images, of which the checker rejects the first two."""
    return CALL | {"latents": latents()}


@pytest.fixture
def edit_thresholds(tmp_path):
    """edit_thresholds(folder, value): a copy of a pipeline all of whose concepts have this threshold."""

    def edit(folder: Path, value: float) -> Path:
        import torch
        from safetensors.torch import load_file, save_file

        copy = Path(shutil.copytree(folder, tmp_path / f"threshold{value}"))
        file = copy / "safety_checker/model.safetensors"
        state = load_file(file) | {"concept_embeds_weights": torch.full((17,), value)}
        save_file(state, file, metadata={"format": "pt"})
        return copy

    return edit
