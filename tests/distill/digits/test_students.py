"""The shipped students: what they are, and that they draw what they are asked for."""

import json

import pytest
import torch

from accel.assets import DIGITS, resolve
from accel.distill.digits import networks
from accel.distill.evaluation.digits import evaluate, generate
from accel.distill.from_nothing.parts import load
from accel.distill.methods.students import student_config
from accel.distill.registry import recipe
from accel.distill.sources import digits

STUDENTS = ("tiny", "small")
FEW_STEPS = ("1step", "4step", "tiny-1step", "tiny-4step")


@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_unet_is_the_teachers_with_the_blocks_removed(name):
    pipeline = load(resolve(f"digits/{name}"))
    wanted = student_config(networks.UNET, name)
    built = type(pipeline.unet).from_config(wanted)
    assert {key: value.shape for key, value in built.state_dict().items()} == {
        key: value.shape for key, value in pipeline.unet.state_dict().items()
    }
    assert pipeline.unet.config.mid_block_type is None and pipeline.scheduler.config.prediction_type == "v_prediction"
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_draws_the_digit_it_is_asked_for(name):
    texts, wanted = zip(*digits.prompt_set(4), strict=True)
    images = generate(load(DIGITS / name), list(texts), guidance=3.0, steps=12, seed=4_000)
    assert evaluate(images, torch.tensor(wanted))["prompt_accuracy"] >= 0.97


@pytest.mark.parametrize("name", STUDENTS)
def test_the_card_the_figures_and_the_record_tell_the_same(name):
    quality = json.loads((DIGITS / name / "quality.json").read_text())
    record = json.loads((DIGITS / name / "training.json").read_text())
    card = (DIGITS / name / "README.md").read_text()
    assert quality["images"] == 500 and quality["prompt_accuracy"] >= 0.97
    assert f"{quality['frechet_distance']:.2f}" in card and f"{quality['parameters']:,}" in card
    assert record["recipe"]["student"] == name and record["steps"] == quality["steps"]


@pytest.mark.parametrize("name", FEW_STEPS)
def test_a_few_step_student_draws_the_digit_it_is_asked_for_in_its_steps(name):
    from diffusers import LCMScheduler

    texts, wanted = zip(*digits.prompt_set(6), strict=True)
    pipeline = load(DIGITS / name)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    timesteps = json.loads((DIGITS / name / "sampler.json").read_text())["timesteps"]
    images = generate(pipeline, list(texts), guidance=0.0, seed=4_000, timesteps=timesteps)
    assert evaluate(images, torch.tensor(wanted))["prompt_accuracy"] >= 0.95


@pytest.mark.parametrize("name", FEW_STEPS)
def test_a_few_step_students_card_figures_and_record_tell_the_same(name):
    quality = json.loads((DIGITS / name / "quality.json").read_text())
    record = json.loads((DIGITS / name / "training.json").read_text())
    card = (DIGITS / name / "README.md").read_text()
    assert quality["images"] == 500 and quality["prompt_accuracy"] >= 0.97
    assert f"{quality['frechet_distance']:.2f}" in card and str(quality["timesteps"]) in card
    kind = "digits_dmd2_1step" if len(quality["timesteps"]) == 1 else "digits_dmd2"
    assert f"--recipe {kind}" in card and record["steps"] == recipe(kind).steps == quality["steps"]
