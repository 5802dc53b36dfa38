"""The command line on models that draw images of classes: what works, and that all the rest is a sentence."""

import json

import pytest
from PIL import Image


def test_run_draws_a_class_with_a_bundle(accel, edm_bundle, tmp_path):
    out = tmp_path / "seven.png"
    common = ("run", edm_bundle, "--class", 7, "--steps", 2, "--engine", "onnxruntime", "--threads", 1)
    code, said, _ = accel(*common, "--seed", 3, "--out", out)
    assert code == 0 and "seed 3" in said and Image.open(out).size == (16, 16)
    code, said, _ = accel(
        *common, "--class", 2, "--images", 2, "--churn", 2, "--json", "--out", tmp_path / "several.png"
    )
    record = json.loads(said)
    assert code == 0 and record["classes"] == [7, 7, 2, 2] and record["seeds"] == [0, 1, 2, 3]
    assert len(record["images"]) == 4 and list(record["engines"]) == ["denoiser"]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--class", 10), "10 is not one of the 10 classes"),
        (("--prompt", "a cat"), "--prompt is for models of texts"),
        (("--class", 1, "--guidance", 3), "--guidance"),
        (("--class", 1, "--height", 64), "--height"),
        (("--class", 1, "--lora", "x"), "--lora"),
        ((), "no class is given"),
        (("--class", 1, "--steps", 0), "invalid steps"),
        (("--class", 1, "--images", 0), "invalid images"),
    ],
)
def test_run_refuses_what_makes_no_sense(options, problem, refused, edm_bundle):
    assert problem in refused("run", edm_bundle, *options)


@pytest.mark.parametrize("option", ["--class", "--churn"])
def test_a_model_of_texts_has_no_classes(option, refused):
    said = refused("run", "digits/4step-int8", option, 3)
    assert f"{option} is for models that draw images of classes" in said and "--prompt" in said


@pytest.mark.parametrize(
    "command",
    [
        ("bench",),
        ("tune",),
        ("serve",),
        ("studio",),
        ("export", "--precision", "int8", "--out", "x"),
        ("export", "--target", "single-graph", "--out", "x"),
        ("export", "--target", "openvino-genai", "--out", "x"),
        ("export", "--target", "triton-server", "--out", "x"),
        ("evaluate", "--out", "x"),
    ],
    ids=" ".join,
)
def test_every_other_verb_says_why_not(command, refused, edm_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verb, *options = command
    assert "class" in refused(verb, edm_bundle, *options)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("model", ["edm_bundle", "edm"])
def test_the_demo_is_of_texts_and_says_so_before_it_measures(model, refused, tmp_path, request):
    said = refused("demo", "--model", "digits/4step", request.getfixturevalue(model), "--out", tmp_path / "x")
    assert "draws images of classes" in said and "--class 0" in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["bench", "serve"])
def test_a_folder_says_what_to_type(verb, refused, edm):
    assert f"accel export {edm} OUT" in refused(verb, edm)


def test_inspect_shows_the_classes(accel, edm_bundle):
    code, said, _ = accel("inspect", edm_bundle)
    assert code == 0 and "10 classes" in said and "3 files match" in said and "denoiser" in said


def test_export_says_how_it_is_run_and_refuses_a_vae(accel, refused, edm, tmp_path, stored_graphs):
    code, said, _ = accel("export", edm, tmp_path / "b", "--steps", 5)
    assert code == 0 and f"accel run {tmp_path / 'b'} --class 0" in said
    assert json.loads((tmp_path / "b/accel.json").read_text())["sampler"]["steps"] == 5
    assert "--vae is for models of texts" in refused("export", edm, tmp_path / "c", "--vae", "x")
