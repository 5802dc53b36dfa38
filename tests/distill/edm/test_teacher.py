"""From nothing to a picture: a teacher of digits, its student of one step, a bundle, and two engines."""

import json

import numpy as np
import pytest
import torch
from sklearn.svm import SVC

import accel
from accel.cli import main
from accel.distill.edm import teacher
from accel.distill.edm.source import is_edm, open_edm, save_edm
from accel.errors import UserError


def test_a_few_steps_of_training_make_a_folder_that_runs(tmp_path):
    counted = []
    net = teacher.train(steps=2, progress=lambda text, done: counted.append(done))
    (tmp_path / "edm").mkdir()
    save_edm(tmp_path / "edm", net)
    assert counted == [1, 2] and is_edm(tmp_path / "edm")
    images, classes = teacher.images(8)
    assert images.shape == (1297, 1, 8, 8) and classes.unique().tolist() == list(range(10))
    assert open_edm(tmp_path / "edm").config("scheduler")["sigma_data"] == pytest.approx(float(images.std()))
    with accel.load(tmp_path / "edm") as pipe:
        assert pipe(7, steps=1).images[0].size == (8, 8)


@pytest.mark.parametrize(("size", "steps"), [(9, 200), (8, 0)])
def test_a_teacher_that_makes_no_sense_is_refused(size, steps):
    with pytest.raises(UserError, match=f"no teacher of {size} px in {steps} steps"):
        teacher.train(size, steps)


@pytest.mark.slow
def test_a_student_of_one_step_draws_the_class_asked_for_on_two_engines(tmp_path):
    """Judged by a classifier of the same real digits, which reads held-out ones for comparison."""
    (tmp_path / "teacher").mkdir()
    save_edm(tmp_path / "teacher", teacher.train())
    command = "distill dmd2 --data digits --resolution 8 --no-random-flip --cache none --few-steps 1 --real-guidance 1"
    command += " --adversarial-weight 0 --steps 100 --batch 64 --learning-rate 1e-4 --sample-every 0 --log none --quiet"
    assert main([*command.split(), "--model", str(tmp_path / "teacher"), "--out", str(tmp_path / "student")]) == 0
    assert json.loads((tmp_path / "student/sampler.json").read_text())["sigmas"] == [80.0]
    bundle = tmp_path / "bundle"
    assert main(["export", str(tmp_path / "student"), str(bundle), "--profile", "batch=1-32", "--quiet"]) == 0

    shown, classes = teacher.images(8)
    reader = SVC(gamma=0.02).fit(shown.flatten(1).numpy(), classes)
    held_out, theirs = teacher.images(8, "held-out")
    asked = [number % 10 for number in range(100)]

    def read(images: np.ndarray, labels) -> float:
        return float(reader.score(images.reshape(len(images), -1), labels))

    drawn = {}
    for engine in ("onnxruntime", "openvino"):
        with accel.load(bundle, engine=engine) as pipe:
            drawn[engine] = pipe(asked, seed=0, output_type="latent").images
            assert read(drawn[engine], asked) > 0.85
    assert np.abs(drawn["onnxruntime"] - drawn["openvino"]).max() < 1e-3
    assert read(held_out.numpy(), theirs) > 0.9
    with accel.load(tmp_path / "teacher") as pipe, torch.no_grad():
        assert read(pipe(asked, steps=18, output_type="latent").images, asked) > 0.85
