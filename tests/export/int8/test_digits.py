"""The int8 bundles that ship: intact, of the students beside them, in int8 on every engine, and drawing the same."""

import json

import numpy as np
import pytest
import torch

import accel
from accel.assets import DIGITS
from accel.bundle import Bundle
from accel.distill.evaluation.digits import evaluate
from accel.distill.from_nothing.parts import load
from accel.distill.sources import digits
from accel.export.int8.audit import audit
from accel.machine import int8_saturates
from accel.models.source import open_source
from accel.parity import psnr
from accel.sampling.noise import normal

STUDENTS = ("1step", "4step", "tiny-1step", "tiny-4step")


@pytest.mark.parametrize("name", STUDENTS)
def test_a_bundle_is_intact_and_of_the_student_beside_it(name):
    bundle = Bundle.open(f"digits/{name}-int8")
    bundle.verify()
    assert bundle.manifest.precision == "int8" and set(bundle.manifest.components) == {
        "text_encoder",
        "unet",
        "vae_decoder",
    }
    student = open_source(f"digits/{name}")
    assert bundle.manifest.source["name"] == f"digits/{name}"
    assert bundle.manifest.source["weights_sha256"] == student.digest(["text_encoder", "unet", "vae"])
    assert bundle.manifest.sampler["timesteps"] == json.loads((DIGITS / name / "sampler.json").read_text())["timesteps"]
    assert bundle.component("unet").int8["calibration"]["sampler"]["timesteps"] == bundle.manifest.sampler["timesteps"]


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_every_quantized_layer_runs_in_int8(engine):
    pytest.importorskip(engine)
    bundle = Bundle.open("digits/tiny-4step-int8")
    found = audit(bundle, bundle.component("unet"), engine)
    assert found["share"] == 1 and found["layers"] > 100


@pytest.mark.parametrize("name", STUDENTS)
def test_it_draws_what_the_student_draws(name):
    """From the same noise, by diffusers in float32 and by the int8 bundle."""
    from diffusers import LCMScheduler

    texts, wanted = zip(*digits.prompt_set(2), strict=True)
    low = accel.load(f"digits/{name}-int8", "onnxruntime")
    steps = list(low.bundle.manifest.sampler["timesteps"])
    made = low(list(texts), seed=40, output_type="np").images
    assert evaluate(torch.from_numpy(made).permute(0, 3, 1, 2) * 2 - 1, torch.tensor(wanted))["prompt_accuracy"] >= 0.95
    if len(steps) > 1:
        return  # the noise between the steps is diffusers' own
    student = load(DIGITS / name)
    student.scheduler = LCMScheduler.from_config(student.scheduler.config)
    student.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(normal(range(40, 40 + len(texts)), 0, (4, 16, 16)))
    truth = student(
        list(texts), latents=noise, guidance_scale=0.0, timesteps=steps, output_type="np", height=64, width=64
    ).images
    least = 25 if int8_saturates() else 35  # a trained model bears it, with a note
    assert least < psnr(made, truth, 1.0) < 60 and not np.array_equal(made, truth)


@pytest.mark.skipif(int8_saturates(), reason="without VNNI OpenVINO computes transposed convolutions in float")
def test_a_folded_upsampling_counts_as_the_convolution_that_it_was(monkeypatch, tmp_path):
    """OpenVINO's engine makes a transposed convolution of upsampling and the convolution after it."""
    pytest.importorskip("openvino")
    from accel.engines.folds import in_openvino

    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path))
    bundle, folded = Bundle.open("digits/4step-int8"), []
    monkeypatch.setattr(in_openvino, "fold", lambda model, fold=in_openvino.fold: folded.append(fold(model)))
    plain = audit(bundle, bundle.component("vae_decoder"), "openvino")
    monkeypatch.setattr(in_openvino, "CHANNELS", 16)
    monkeypatch.setenv("ACCEL_CACHE", str(tmp_path / "other"))
    found = audit(bundle, bundle.component("vae_decoder"), "openvino")
    assert folded == [0, 2] and found["share"] == plain["share"] == 1 and found["ok"]
