"""A pipeline that is named with an engine of graphs is compiled on the way, once."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

import accel
from accel.engines.base import Status
from accel.errors import Notice, UserError
from accel.export import pipeline as export
from accel.files import cache_dir
from accel.loading import opened

CALL = dict(prompt="the cat", seed=3, num_inference_steps=2, output_type="np")


@pytest.fixture(scope="module")
def compiled(smallest):
    with pytest.warns(Notice, match="compiled into"):
        return accel.load(smallest, engine="onnxruntime", threads=1)


@pytest.fixture
def no_export(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("exported")

    monkeypatch.setattr(export, "export_pipeline", refused)


def test_it_draws_what_eager_torch_draws(smallest, compiled):
    ours, reference = compiled(**CALL).images, accel.load(smallest, engine="eager")(**CALL).images
    assert np.abs(ours - reference).max() < 1 / 255
    assert all(engine.name == "onnxruntime" for engine in compiled.engines.values())
    assert np.abs(ours - ours.mean()).max() > 0.05


def test_the_second_time_it_is_there_for_every_engine_of_graphs(smallest, compiled, no_export):
    again = accel.load(str(smallest), engine={"unet": "onnxruntime", "vae_decoder": "eager"})
    latents = CALL | dict(output_type="latent")
    assert np.abs(again(**latents).images - compiled(**latents).images).max() < 1e-4


@pytest.mark.parametrize("change", ["weights", "scheduler", "tokenizer", "few_step", "profile"])
def test_whatever_decides_the_image_decides_the_place(smallest, compiled, tmp_path, no_export, change):
    folder, options = shutil.copytree(smallest, tmp_path / smallest.name), {}
    edits = {
        "scheduler": ("scheduler/scheduler_config.json", {"steps_offset": 0}),
        "tokenizer": ("tokenizer/tokenizer_config.json", {"model_max_length": 70}),
    }
    if change in edits:
        name, edit = edits[change]
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | edit))
    elif change == "weights":
        (path,) = (folder / "unet").glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"\1")
    else:
        options = {"export": {"profile": "static"}} if change == "profile" else {"few_step": "lcm"}
    with pytest.raises(AssertionError, match="exported"):
        accel.load(folder, engine="onnxruntime", **options)


def test_the_same_files_elsewhere_are_the_same_model(smallest, compiled, tmp_path, no_export):
    folder = shutil.copytree(smallest, tmp_path / smallest.name)
    assert accel.load(folder, engine="onnxruntime").bundle.path == compiled.bundle.path


@pytest.mark.parametrize("name", ["a model (v1.5)", "x\u202ey", "n" * 250, "..."])
def test_a_folder_may_have_any_name(smallest, tmp_path, monkeypatch, name):
    places = []
    monkeypatch.setattr("accel.loading.compiled._export", lambda model, place, export: places.append(place) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        accel.load(shutil.copytree(smallest, tmp_path / name), engine="onnxruntime")
    (place,) = places
    assert place.parent == cache_dir() / "compiled" and place.name.isascii() and len(place.name) < 80


def test_what_the_compiled_one_would_not_accept_is_refused_before(smallest, refused, no_export):
    said = refused("run", smallest, "--engine", "onnxruntime", "-p", "the cat", "--height", "512")
    assert "height 512 is outside profile" in said


def test_an_engine_that_cannot_run_here_is_refused_before(smallest, no_export, monkeypatch):
    monkeypatch.setattr("accel.engines.openvino.status", lambda: Status(False, "it is not installed", "x"))
    with pytest.raises(UserError, match="cannot run here"):
        accel.load(smallest, engine="openvino")


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_other_engines_take_the_pipeline_as_it_is(smallest, engine, no_export):
    assert not accel.load(smallest, engine=engine).bundle.path.is_relative_to(cache_dir())
    with pytest.raises(UserError, match="nothing is exported"):
        accel.load(smallest, engine=engine, export={"precision": "fp16"})


def test_export_options_and_a_bundle_contradict(smallest_bundle):
    for option in ({"export": {"precision": "fp16"}}, {"few_step": "lcm"}):
        with pytest.raises(UserError, match="is a bundle already"):
            accel.load(smallest_bundle, **option)


def test_a_hub_id_that_cannot_be_had_says_both_readings():
    with pytest.raises(UserError, match="org/name is neither a local folder nor to be had from the hub"):
        opened("org/name")
