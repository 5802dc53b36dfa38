"""What people watch: the loss on held-out images, trackers with throughput and samples, and the card of the result."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from accel.distill import recipes, settings
from accel.distill.data.encoders import Encoders
from accel.distill.methods.kd import Denoising
from accel.distill.run import execute
from accel.distill.training import checkpoints, validation
from accel.distill.watching import card
from accel.errors import UserError
from accel.models.source import open_source


def recipe(model: Path, images: Path, **fields) -> settings.FinetuneRecipe:
    common: dict = dict(
        model=str(model),
        data=str(images),
        resolution=64,
        steps=4,
        batch=2,
        ema=0.5,
        learning_rate=1e-3,
        checkpoint_every=2,
        sample_every=0,
        validation=3,
        validation_every=2,
        log="none",
        seed=5,
    )
    return recipes.changed(settings.FinetuneRecipe(), **common | fields)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(small, twelve_images, tmp_path_factory) -> Path:
    """A run with everything that is watched."""
    pytest.importorskip("tensorboard")
    out = tmp_path_factory.mktemp("watched") / "out"
    fields = dict(sample_every=2, sample_prompts="the cat|the dog", sample_steps=1, log="tensorboard")
    execute(recipe(small, twelve_images, **fields), out)
    return out


def test_the_validation_loss_is_that_of_the_averages_and_the_same_at_every_look(trained, small, twelve_images):
    found = lines(trained.with_name("out-run"))
    assert ["validation/loss" in line for line in found] == [False, True, False, True]
    # The result holds the averages of the last step: its loss on the same examples, measured from its folder.
    made = recipe(small, twelve_images)
    encoders = Encoders(open_source(trained))
    method = Denoising(dataclasses.replace(made, model=str(trained)), encoders)

    from accelerate import Accelerator

    from accel.distill.data.batches import batches_of

    accelerator = Accelerator(cpu=True)
    stream = batches_of(dataclasses.replace(made, cache="none"), encoders, trained.parent / "again", accelerator, print)
    measured = [validation.losses(method, stream.held_out(), encoders, accelerator, 4) for _ in range(2)]
    assert measured[0] == measured[1]
    assert measured[0]["validation/loss"] == pytest.approx(found[-1]["validation/loss"], rel=2e-3)
    assert method.unet.training and stream.images == 9


def test_two_processes_measure_what_one_measures(small, twelve_images, tmp_path, torchrun):
    """Three images in batches of two: the second process has one, and is asked for no more than the first."""
    code = """
import dataclasses, json, sys
from pathlib import Path
from accel.distill import settings
from accel.distill.run import execute
fields = json.loads(sys.argv[1])
execute(settings.FinetuneRecipe(**fields), Path(sys.argv[2]))
"""
    one = recipe(small, twelve_images, steps=2, batch=4)
    execute(one, tmp_path / "one")
    two = dataclasses.replace(one, batch=2)
    torchrun(code, json.dumps(dataclasses.asdict(two)), tmp_path / "two")
    first, second = (lines(tmp_path / f"{name}-run")[-1]["validation/loss"] for name in ("one", "two"))
    assert second == pytest.approx(first, rel=1e-5)


def test_a_run_that_was_stopped_measures_as_if_it_had_not_been(trained, small, twelve_images, tmp_path):
    made = recipe(small, twelve_images, lr_schedule="constant")
    execute(dataclasses.replace(made, steps=2), tmp_path / "half", tmp_path / "run")
    execute(made, tmp_path / "out", tmp_path / "run")
    ours, theirs = (lines(run)[-1] for run in (tmp_path / "run", trained.with_name("out-run")))
    assert ours["validation/loss"] == theirs["validation/loss"] and ours["loss"] == theirs["loss"]


def test_tensorboard_gets_losses_throughput_and_samples(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(trained.with_name("out-run") / "accel"), {"images": 0, "scalars": 0})
    log.Reload()
    seen = {name: [event.value for event in log.Scalars(name)] for name in log.Tags()["scalars"]}
    assert seen["images"] == [2, 4, 6, 8] and all(speed > 0 for speed in seen["images_per_second"])
    assert len(seen["loss"]) == 4 and len(seen["validation/loss"]) == 2
    shown = log.Images("samples")
    assert [event.step for event in shown] == [2, 4]
    grid = Image.open(trained.with_name("out-run") / "samples" / "step-000004.png")
    assert (shown[-1].width, shown[-1].height) == grid.size


def test_wandb_gets_the_same_as_images_of_its_own(small, twelve_images, tmp_path, monkeypatch):
    """Against a module with the calls that accelerate's tracker makes."""
    from accelerate.utils import LoggerType

    told: list[tuple[dict, int]] = []
    fake = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda values, step=None, **_: told.append((values, step)), finish=lambda: None)
    fake.init = lambda **_: run
    fake.config = types.SimpleNamespace(update=lambda *_, **__: None)
    fake.Image = lambda image: np.asarray(image)
    fake.__spec__ = types.SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.WANDB])
    fields = dict(steps=2, log="wandb", sample_every=2, sample_steps=1, sample_prompts="a", validation=0)
    execute(recipe(small, twelve_images, **fields), tmp_path / "out")
    scalars = [(values, step) for values, step in told if "loss" in values]
    assert [step for _, step in scalars] == [1, 2] and [values["images"] for values, _ in scalars] == [2, 4]
    ((pictures, step),) = [(values, step) for values, step in told if "samples" in values]
    assert step == 2 and pictures["samples"][0].ndim == 3 and pictures["samples"][0].dtype == np.uint8


def test_a_checkpoint_from_before_these_options_goes_on(small, twelve_images):
    plain = recipe(small, twelve_images, validation=0)
    assert not {"validation", "buckets", "data_images", "validation_every"} & set(checkpoints.settings(plain, 1))
    held_out = checkpoints.settings(dataclasses.replace(plain, validation=3, buckets=True), 1)
    assert held_out["validation"] == 3 and held_out["buckets"]


# ------------------------------------------------------------------------------------------------------------- the card


def head_of(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_a_card_says_data_settings_figures_and_how_it_is_used(trained):
    text, record = (trained / "README.md").read_text(), json.loads((trained / "training.json").read_text())
    assert head_of(text)["library_name"] == "diffusers" and "license" not in head_of(text)
    assert record["images"] == 8 and record["training_images"] == 9
    for words in ("9 of them were trained on, 3 held out", "| images seen | 8 |", "| learning rate | 0.001 |"):
        assert words in text
    assert "validation/loss, at the end" in text.replace("\\", "") and "StableDiffusionPipeline" in text
    assert (trained / "samples.png").read_bytes() == (
        trained.with_name("out-run") / "samples/step-000004.png"
    ).read_bytes()
    assert "the cat; the dog" in text and str(trained.parent) not in text


@pytest.mark.parametrize("kind", ["lora", "vae", "few", "few-lora", "lcm-few-lora"])
def test_the_code_of_a_card_is_of_its_kind(tmp_path, kind):
    record = dict(steps=10, images=80, seconds_per_step=1.5, processes=1, device="cpu", training_images=None)
    made = settings.LoraRecipe(model="user/model", data="user/images", rank=4, alpha=8.0, sample_prompts="a `cat`")
    if "few" in kind:
        made = settings.DMD2Recipe(model="user/model", data="a=3 | b/c", teacher="user/teacher")
        sampler = {"name": "lcm", "steps": 4} if "lcm" in kind else {"name": "dmd2", "timesteps": [999, 499]}
        (tmp_path / "sampler.json").write_text(json.dumps(sampler | {"guidance": 0.0}))
    if kind == "few":
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    if "lora" in kind:
        (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    text = card.card(tmp_path, record, made, ['{"step": 1, "loss": 0.5}', '{"step": 2, "lo'], sdxl=True, samples=False)
    head = head_of(text)
    assert head["base_model"] == "user/model" and "stable-diffusion-xl" in head["tags"]
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert {
        "lora": "load_lora_weights",
        "vae": "AutoencoderTiny.from_pretrained",
        "few": "num_inference_steps=2, guidance_scale=0.0",
        "few-lora": "timesteps=[999, 499]",
        "lcm-few-lora": "num_inference_steps=4, guidance_scale=0.0",
    }[kind] in code
    assert ("LCMScheduler" in code) == kind.endswith("few-lora")
    assert ("Alpha differs" in text) == (kind == "lora")
    if "few" in kind:
        assert "75.0% of the examples" in text and "user/teacher" in text
    else:
        assert head["datasets"] == ["user/images"]


# ---------------------------------------------------------------------------------------------------- teacher's images


def test_a_teacher_draws_the_images_that_a_student_learns_from(sd15, sd15_tiny, tmp_path):
    """Once, each from its number; the student then trains on these images with their prompts."""
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\n")
    fields = dict(data=f"teacher:{tmp_path / 'prompts.txt'}", data_model=str(sd15), data_images=3, data_steps=1)
    made = recipe(sd15_tiny, tmp_path, **fields, validation=0, steps=2, cache="none", log="none")
    execute(made, tmp_path / "out")
    folder = tmp_path / "out-run" / "teacher-images"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["the cat", "the dog", "the cat"]
    pixels = [np.asarray(Image.open(folder / row["file_name"])) for row in rows]
    assert pixels[0].shape == (64, 64, 3) and not np.array_equal(pixels[0], pixels[2])
    text = (tmp_path / "out" / "README.md").read_text()
    assert "drew of the prompts in prompts.txt" in text.replace("\\", "") and "3 of them were trained on" in text
    with pytest.raises(UserError, match="were generated with another steps"):
        execute(dataclasses.replace(made, data_steps=2, seed=made.seed), tmp_path / "other", tmp_path / "out-run")


def test_dmd2_learns_from_prompts_alone(small, tmp_path):
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\nthe\n")
    made = settings.DMD2Recipe(
        model=str(small),
        data=str(tmp_path / "prompts.txt"),
        adversarial_weight=0.0,
        few_steps=2,
        ratio=2,
        steps=3,
        batch=2,
        learning_rate=1e-4,
        sample_every=0,
        log="none",
    )
    execute(made, tmp_path / "out")
    assert all(np.isfinite(line["critic/loss"]) for line in lines(tmp_path / "out-run"))
    assert not (tmp_path / "out-run" / "cache").exists()
    torch.manual_seed(0)
    assert "2-step student of" in (tmp_path / "out" / "README.md").read_text()
